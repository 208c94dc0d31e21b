"""The MNIST that ships inside the package, and pictures of digits made as MNIST was.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86(11), 1998. Attribution and license stand next to the files.
"""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import struct

import numpy as np

from cnnjax.data.dataset import Arrays
from cnnjax.data.image_files import luma, over_background
from cnnjax.errors import UserError

DIRECTORY = pathlib.Path(__file__).parent / "mnist"
CLASS_NAMES = tuple("0123456789")

# SHA-256 of the published files, as TensorFlow Datasets has them registered for mnist 3.0.1.
SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}

# In MNIST the digit fills a box of 20 of the 28 pixels (LeCun et al. 1998, section III.A).
_BOX_SHARE = 20 / 28
# Strokes of MNIST digits are rarely thinner than this, in pixels of the 28x28 image.
_MIN_STROKE_PIXELS = 2.0
_MIN_CONTRAST = 16.0


def read(directory: str | pathlib.Path = DIRECTORY) -> dict[str, Arrays]:
    """Returns `train` (60,000) and `test` (10,000) as published, in about a second.

    Args:
      directory: holds the four files; the shipped ones by default.

    Raises:
      UserError: when a file is missing or is not, byte for byte, the published one.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image = read_idx(read_verified(pathlib.Path(directory), f"{prefix}-images-idx3-ubyte.gz"))
        label = read_idx(read_verified(pathlib.Path(directory), f"{prefix}-labels-idx1-ubyte.gz"))
        splits[split] = Arrays(image[..., None], label.astype(np.int32))
    return splits


def read_verified(directory: pathlib.Path, name: str) -> bytes:
    """Returns the unzipped content of one of the four files once its SHA-256 is found right."""
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read MNIST file {path} ({error.strerror}): install cnnjax again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"MNIST file {path} is damaged: expected SHA-256 {SHA256[name]}, found {found}; "
            "install cnnjax again, or restore the file from version control"
        )
    return gzip.decompress(content)


def read_idx(content: bytes) -> np.ndarray:
    """Decodes an IDX file of unsigned bytes into a read-only uint8 array.

    The format is described at http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (8 for
    unsigned bytes), the number of dimensions, each dimension as a big-endian int32, the values.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"not an IDX file of unsigned bytes: it starts with {content[:4]!r}")
    num_dimensions = content[3]
    start = 4 + 4 * num_dimensions
    if len(content) < start:
        raise UserError(f"IDX file of {len(content)} bytes ends inside its header")
    shape = struct.unpack(f">{num_dimensions}i", content[4:start])
    if len(content) - start != np.prod(shape):
        raise UserError(
            f"IDX file announces shape {list(shape)} but holds {len(content) - start} values"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def digit_from_image(image: np.ndarray, size: int = 28) -> np.ndarray:
    """Turns a picture of one digit into an image as MNIST has them.

    The steps, of which the last two are those of MNIST's makers (LeCun et al. 1998, section III.A):

    1. Transparency is laid over white for dark ink, over black for light ink; color becomes gray.
    2. A plane is fitted to the picture's border and subtracted: even an unevenly lit sheet of
       paper becomes 0. The side to which the picture departs further is the ink, so dark on light
       and light on dark are the same.
    3. Contrast is stretched: three standard deviations of the border become 0, full ink 1; once
       more after step 6.
    4. Specks smaller than a fiftieth of the largest stroke are removed.
    5. Strokes that would be thinner than 2 pixels in the result are thickened to that.
    6. The ink's bounding box is cut out and scaled to fit 20 x 20 pixels, its aspect ratio kept.
    7. It is placed in 28 x 28 pixels with its center of mass in the middle.

    Args:
      image: uint8 `[height, width, channels]`, 1, 3 or 4 channels, as `read_image` returns it.
      size: side of the result; the box scales along.

    Returns:
      uint8 `[size, size, 1]`, ink light on black.

    Raises:
      UserError: when nothing stands out from the background.
    """
    gray = _gray_with_background(image)
    ink = _without_specks(_stretched_ink(gray))
    box_pixels = max(1, round(size * _BOX_SHARE))
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    scale = box_pixels / max(np.ptp(rows) + 1, np.ptp(columns) + 1)
    ink = _thickened(ink, _MIN_STROKE_PIXELS * size / 28 / scale)
    digit = _scaled_to_box(ink, box_pixels)
    return np.round(255.0 * _centered(digit, size)).astype(np.uint8)[..., None]


def _gray_with_background(image: np.ndarray) -> np.ndarray:
    if image.shape[-1] == 4:
        opacity = image[..., 3].astype(np.float64)
        visible = np.sum(luma(image[..., :3]) * opacity) / max(opacity.sum(), 1.0)
        image = over_background(image, 255.0 if visible < 128.0 else 0.0)
    return luma(image)


def _stretched_ink(gray: np.ndarray) -> np.ndarray:
    """Background to 0, full ink to 1, whichever of the two is the darker one."""
    height, width = gray.shape
    rows, columns = np.mgrid[:height, :width]
    frame = max(1, round(0.02 * min(height, width)))
    is_border = np.ones(gray.shape, bool)
    is_border[frame : height - frame, frame : width - frame] = False
    plane = np.stack([np.ones_like(rows), rows / height, columns / width], axis=-1)
    # Ink may touch the border: fit the half of its pixels that lies nearest to the median.
    distance = np.abs(gray - np.median(gray[is_border]))
    kept = is_border & (distance <= np.median(distance[is_border]))
    coefficients = np.linalg.lstsq(plane[kept], gray[kept], rcond=None)[0]
    departure = gray - plane @ coefficients
    ink = departure if departure.max() > -departure.min() else -departure
    noise = 3.0 * float(np.std(departure[kept]))
    strongest = float(ink.max())
    if strongest - noise < _MIN_CONTRAST:
        raise UserError(
            f"no digit found: nothing in the picture of {width} x {height} pixels departs from its "
            f"background by more than {abs(max(strongest, 0.0)):.0f} of 255 gray levels"
        )
    # Full ink is what most of the stroke reaches, not what one bright pixel does.
    full = np.percentile(ink[ink > noise + 0.5 * (strongest - noise)], 90)
    return np.clip((ink - noise) / (full - noise), 0.0, 1.0)


def _without_specks(ink: np.ndarray) -> np.ndarray:
    """Keeps the connected parts that have at least a fiftieth of the largest one's ink.

    A part reaches as far as its ink is above a tenth of full ink; what is fainter is removed too.
    """
    from scipy import ndimage

    parts, count = ndimage.label(ink > 0.1, structure=np.ones((3, 3)))
    mass = ndimage.sum_labels(ink, parts, np.arange(count + 1))
    mass[0] = 0.0
    kept = mass >= 0.02 * mass.max()
    kept[0] = False
    return np.where(kept[parts], ink, 0.0)


def _thickened(ink: np.ndarray, min_width_pixels: float) -> np.ndarray:
    from scipy import ndimage

    # Along a strip of w pixels the distances to its edge are 1, 2, .. w/2 .. 2, 1: w = 4 mean - 2.
    is_stroke = np.pad(ink > 0.5, 1)
    width = 4.0 * float(ndimage.distance_transform_edt(is_stroke)[is_stroke].mean()) - 2.0
    radius = int(np.ceil((min_width_pixels - width) / 2.0))
    if radius < 1:
        return ink
    ink = np.pad(ink, radius)
    square = 2 * radius + 1
    return ndimage.grey_dilation(ink, size=(square, square))


def _scaled_to_box(ink: np.ndarray, box_pixels: int) -> np.ndarray:
    from PIL import Image

    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = box_pixels / max(cut.shape)
    height, width = (max(1, round(side * scale)) for side in cut.shape)
    digit = np.asarray(
        Image.fromarray(cut.astype(np.float32)).resize((width, height), Image.Resampling.HAMMING)
    )
    # Shrinking pales thin strokes; in MNIST half of a stroke's pixels are white.
    white = float(np.median(digit[digit > 0.5 * digit.max()]))
    return np.clip(digit.astype(np.float64) / white, 0.0, 1.0)


def _centered(digit: np.ndarray, size: int) -> np.ndarray:
    canvas = np.zeros((size, size))
    corner = []
    for axis, side in enumerate(digit.shape):
        weight = digit.sum(axis=1 - axis)
        center = float(weight @ np.arange(side)) / weight.sum()
        # No part of the digit may leave the image, however lopsided it is.
        corner.append(int(np.clip(round(size / 2.0 - center), 0, size - side)))
    canvas[corner[0] : corner[0] + digit.shape[0], corner[1] : corner[1] + digit.shape[1]] = digit
    return canvas
