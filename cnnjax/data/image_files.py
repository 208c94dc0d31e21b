"""Image files of any size, converted to what a network expects."""

from __future__ import annotations

import functools
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# A 236 KB PNG can hold 9,000 x 9,000 pixels, which decode to hundreds of megabytes.
MAX_PIXELS = 50_000_000
# He et al. 2016, section 3.4: of a shorter side of 256 pixels the middle 224.
CROP_SHARE = 0.875

# In MNIST the digit fills a box of 20 of the 28 pixels (LeCun et al. 1998, section III.A).
_BOX_SHARE = 20 / 28
# Strokes of MNIST digits are rarely thinner than this, in pixels of the 28x28 image.
_MIN_STROKE_PIXELS = 2.0
_MIN_CONTRAST = 16.0


def read_image(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file, turned upright as its EXIF orientation says.

    Args:
      path: any format that Pillow reads; of an animation the first frame.
      max_pixels: larger images are refused by their header, before anything is decoded.

    Returns:
      uint8 `[height, width, channels]`: 1 channel (gray), 3 (RGB) or 4 (RGBA, for any file with
      transparency). Deeper files are scaled to 8 bits.

    Raises:
      UserError: when the file is missing, is not an image, is cut off, or is too large.
    """
    from PIL import ImageOps

    with open_image(path, max_pixels=max_pixels) as image:
        try:
            image.load()
            image = _as_8_bit(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise UserError(f"cannot decode image {os.fspath(path)!r}: {error}") from error
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def open_image(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image and checks its header; nothing is decoded yet. Raises as `read_image`."""
    from PIL import Image, UnidentifiedImageError

    name = os.fspath(path)
    if os.path.isdir(name):
        raise UserError(f"{name!r} is a directory: give an image file")
    try:
        with warnings.catch_warnings():
            # Pillow only warns from 89 megapixels on; the bound below is stricter.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(name)
    except FileNotFoundError as error:
        raise UserError(f"no image file {name!r}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name!r} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name!r} is not an image in a format known to Pillow") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read image {name!r}: {error}") from error
    if image.width * image.height > max_pixels:
        image.close()
        raise UserError(
            f"image {name!r} has {image.width} x {image.height} pixels, more than the "
            f"{max_pixels:,} that are accepted: make it smaller"
        )
    return image


def _as_8_bit(image: Image.Image) -> Image.Image:
    """Converts any of Pillow's modes to L, RGB or RGBA."""
    from PIL import Image

    if image.mode in ("L", "RGB", "RGBA"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        values = np.asarray(image, np.float64)
        largest = 65535.0 if image.mode != "F" else max(float(values.max(initial=0.0)), 1e-12)
        return Image.fromarray(np.clip(np.round(values / largest * 255.0), 0, 255).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB")


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 `[height, width, channels]` to `size` (height, width), antialiased bilinear."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image[..., channel])).resize(
                (size[1], size[0]), Image.Resampling.BILINEAR
            )
        )
        for channel in range(image.shape[-1])
    ]
    return np.stack(planes, axis=-1)


def fit_image(image: np.ndarray, size: tuple[int, int], fit: str = "pad") -> np.ndarray:
    """Brings uint8 `[height, width, channels]` to `size` (height, width).

    Args:
      image: the image.
      size: the height and width wanted.
      fit: `"pad"` centers the image on black, made smaller first (its aspect ratio kept) where it
        does not fit; `"resize"` stretches it to the size; `"crop"` scales it until the size is
        0.875 of it in height or width and at most that in the other, and cuts the middle out;
        `"crop:0.95"`, or `"crop(share=0.95)"`, does so with another share.
    """
    kind, share = parse_fit(fit)
    if kind == "resize":
        return resize_image(image, size)
    if kind == "crop":
        found = image.shape[:2]
        scale = share * min(found[0] / size[0], found[1] / size[1])
        height, width = (max(1, round(side * scale)) for side in size)
        top, left = (found[0] - height) // 2, (found[1] - width) // 2
        return resize_image(image[top : top + height, left : left + width], size)
    return pad_to(resize_image(image, shrunk_size(image.shape[:2], size)), size)


def _whole() -> float:
    return 1.0


def _crop(share: float = CROP_SHARE) -> float:
    if not 0.0 < share <= 1.0:
        raise UserError(f"share={share}: give a share above 0 and at most 1")
    return share


FITS: spec.Registry = {"pad": _whole, "resize": _whole, "crop": _crop}


@functools.cache
def parse_fit(fit: str) -> tuple[str, float]:
    """Returns the kind of a `fit` of `fit_image` and its share, 1 where it has none.

    Raises:
      UserError: another name, or a share outside (0, 1].
    """
    item = spec.parse_one(fit, "fit")
    return item.name, spec.call(item, FITS, "fit")


def pad_to(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Centers `[..., height, width, channels]` on black of `size` (height, width), not smaller."""
    *leading, height, width, channels = images.shape
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = np.zeros((*leading, *size, channels), images.dtype)
    padded[..., top : top + height, left : left + width, :] = images
    return padded


def shrunk_size(found: tuple[int, ...], wanted: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the same aspect within `wanted`, never above `found`."""
    scale = min(1.0, wanted[0] / found[0], wanted[1] / found[1])
    return max(1, round(found[0] * scale)), max(1, round(found[1] * scale))


def image_to_shape(
    image: np.ndarray, shape: tuple[int, int, int], *, fit: str = "resize"
) -> np.ndarray:
    """Brings any uint8 `[height, width, channels]` to `shape` (height, width, channels).

    Transparency is laid over white; color becomes gray by ITU-R 601 luma, gray becomes RGB by
    repetition.

    Raises:
      UserError: when `shape` has neither 1 nor 3 channels.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise UserError(f"cannot make an image of {channels} channels: 1 and 3 are supported")
    if image.shape[-1] == 4:
        image = np.round(_over(image, 255.0)).astype(np.uint8)
    if channels == 1 and image.shape[-1] == 3:
        image = np.round(_luma(image)).astype(np.uint8)[..., None]
    elif channels == 3 and image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return fit_image(image, (height, width), fit)


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
        visible = np.sum(_luma(image[..., :3]) * opacity) / max(opacity.sum(), 1.0)
        image = _over(image, 255.0 if visible < 128.0 else 0.0)
    return _luma(image)


def _over(image: np.ndarray, background: float) -> np.ndarray:
    opacity = image[..., 3:] / 255.0
    return image[..., :3] * opacity + background * (1.0 - opacity)


def _luma(image: np.ndarray) -> np.ndarray:
    """Gray levels, float64 `[height, width]`; of three channels the ITU-R 601 luma."""
    if image.shape[-1] == 1:
        return image[..., 0].astype(np.float64)
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


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
            f"background by more than {max(strongest, 0.0):.0f} of 255 gray levels"
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
