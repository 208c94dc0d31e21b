"""Image files of any size, converted to what a network expects."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import struct
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cnnjax import spec
from cnnjax.data import directories
from cnnjax.errors import UserError, unknown_name

if TYPE_CHECKING:
    from PIL import Image, ImageFile

# A 236 KB PNG can hold 9,000 x 9,000 pixels, which decode to hundreds of megabytes.
MAX_PIXELS = 50_000_000
# He et al. 2016, section 3.4: of a shorter side of 256 pixels the middle 224.
CROP_SHARE = 0.875
Source = str | os.PathLike | bytes
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

# EXIF orientations that turn the image by a quarter.
_TURNED = (5, 6, 7, 8)
_EXIF_ORIENTATION = 0x0112
# TIFF 6.0, section 8; the byte of a PNG file that has the bits of a sample (PNG, section 11.2.2).
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
_PNG_DEPTH = 24


def read_image(path: Source | ImageFile.ImageFile, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file, turned upright as its EXIF orientation says.

    Files of more than 8 bits are scaled from a range that is the same for all files of their type,
    so that images keep their brightness relative to each other:

    | type | black | white |
    |---|---|---|
    | unsigned integers of 16 bits (PNG, TIFF, PGM) | 0 | 65535 |
    | unsigned integers of 12 bits (TIFF) | 0 | 4095 |
    | floats (TIFF, PFM) | 0.0 | 1.0 |

    Args:
      path: any format that Pillow reads, its content, or opened by Pillow; of many the first frame.
      max_pixels: larger ones are refused by their header, but not what is opened already.

    Returns:
      uint8 `[height, width, channels]`: 1 channel (gray), 3 (RGB) or 4 (RGBA, for any file with
      transparency: an alpha channel, a palette with alpha, or one color that is transparent).

    Raises:
      UserError: when the file is missing, is not an image, is cut off, or is too large; or when its
        type has no range (other integers) or its values leave the range (floats).
    """
    from PIL import ImageFile, ImageOps

    name = os.fspath(path) if isinstance(path, str | os.PathLike) else "sent"
    opened = path if isinstance(path, ImageFile.ImageFile) else open_image(path, max_pixels)
    with opened as image:
        largest, is_negative, clear = white_level(image), _is_negative(image), _clear_level(image)
        if image.format == "TIFF":
            # Pillow 13 would map the pixels by their size after the turn, and mix up the rows.
            image.filename = ""
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if largest is not None:
                pixels = _scaled(np.asarray(upright), largest, name, is_negative=is_negative)
            else:
                pixels = np.asarray(_as_8_bit(upright))
            if clear is not None:
                pixels = _with_alpha(pixels, np.asarray(upright) != clear)
        except UserError:
            raise
        except Exception as error:  # Of many types, by the format; none of them documented.
            raise UserError(f"cannot decode image {name!r}: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def open_image(path: Source, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Opens an image and checks its header; nothing is decoded yet. Raises as `read_image`."""
    from PIL import Image, UnidentifiedImageError

    name = "sent" if isinstance(path, bytes) else os.fspath(path)
    source = io.BytesIO(path) if isinstance(path, bytes) else directories.checked_image(path)
    try:
        with warnings.catch_warnings():
            # Pillow only warns from 89 megapixels on; the bound below is stricter.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name!r} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name!r} is not an image in a format known to Pillow") from error
    except Exception as error:  # Of many types, by the format; none of them documented.
        raise UserError(f"cannot read image {name!r}: {error}") from error
    if image.width * image.height > max_pixels:
        image.close()
        raise UserError(
            f"image {name!r} has {image.width} x {image.height} pixels, more than the "
            f"{max_pixels:,} that are accepted: make it smaller"
        )
    return image


def upright_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """(height, width) that `read_image` gives an opened image: turned as its EXIF says.

    Nothing is decoded, but for PNG files whose EXIF follows the pixels.
    """
    from PIL import Image

    width, height = image.size
    if image.format == "TIFF":
        # Pillow's `size` is turned already in some of its versions.
        width = _tiff_tag(image, _TIFF_WIDTH) or width
        height = _tiff_tag(image, _TIFF_HEIGHT) or height
    try:
        if image.format == "PNG" and "exif" not in image.info and _says_more_after_pixels(image):
            image.load()
        # A PNG's own would decode the pixels to look for what follows them.
        is_turned = Image.Image.getexif(image).get(_EXIF_ORIENTATION) in _TURNED
    except Exception:  # Of many types; whatever is wrong with the file is told when it is decoded.
        is_turned = False
    return (width, height) if is_turned else (height, width)


def _reopened(image: ImageFile.ImageFile) -> BinaryIO:
    """Returns the bytes of an opened image from their start."""
    if isinstance(image.fp, io.BytesIO):
        return io.BytesIO(image.fp.getbuffer())
    return open(image.filename, "rb")


def is_upright(image: ImageFile.ImageFile) -> bool:
    """Whether an opened image, other than a PNG, is neither turned nor mirrored by its EXIF."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    except Exception:  # Of many types; whatever is wrong is told when the file is decoded.
        return False


def _says_more_after_pixels(image: ImageFile.ImageFile) -> bool:
    """Whether EXIF or XMP stands behind the pixels of a PNG file."""
    with _reopened(image) as file:
        file.seek(8)
        is_behind = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if is_behind and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                start = file.read(min(length, 32))
                if kind == b"eXIf" or start.startswith((b"XML:com.adobe.xmp", b"Raw profile type")):
                    return True
                length -= len(start)
            is_behind |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
    return False


def is_gray(image: ImageFile.ImageFile) -> bool:
    """Whether an opened image has one channel, transparency apart."""
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def white_level(image: ImageFile.ImageFile) -> float | None:
    """The value that is white in an opened image of more than 8 bits; None for one of 8 bits.

    Raises:
      UserError: integers that have no such value.
    """
    if image.mode == "F":
        return 1.0
    if image.mode.startswith("I;"):
        is_12_bit = image.format == "TIFF" and _tiff_tag(image, _TIFF_BITS) == 12
        return 4095.0 if is_12_bit else 65535.0
    if image.mode != "I":
        return None
    if image.format in ("PNG", "PPM"):
        return 65535.0
    bits = _tiff_tag(image, _TIFF_BITS) or 32
    raise UserError(
        f"image {image.filename!r} holds integers of {bits} bits{' with a sign' * (bits < 32)}, of "
        "which none is known to be white: save all images of the dataset as 8 or 16 bits without a "
        "sign, or as floats from 0 to 1, divided by one number"
    )


def _tiff_tag(image: ImageFile.ImageFile, tag: int) -> int | None:
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def _is_negative(image: ImageFile.ImageFile) -> bool:
    """Whether 0 is white: Pillow inverts such TIFF files of 8 bits, and no deeper ones."""
    return _tiff_tag(image, _TIFF_PHOTOMETRIC) == 0


def _scaled(values: np.ndarray, largest: float, name: str, *, is_negative: bool) -> np.ndarray:
    """Deep gray levels as uint8: 0 to 0, `largest` to 255."""
    levels = values.astype(np.float64) / largest
    if not np.isfinite(levels).all():
        raise UserError(
            f"image {name!r} has {np.count_nonzero(~np.isfinite(levels))} pixels that are not "
            "numbers (NaN or infinite): replace them by values from 0 to 1"
        )
    # What rounds to a level is within the range.
    if levels.min() < -0.5 / 255 or levels.max() > 1 + 0.5 / 255:
        raise UserError(
            f"image {name!r} has floats from {levels.min():g} to {levels.max():g}, which must lie "
            "from 0 (black) to 1 (white): divide all images of the dataset by one number"
        )
    if is_negative:
        levels = 1.0 - levels
    return np.clip(np.round(levels * 255.0), 0, 255).astype(np.uint8)


def _clear_level(image: ImageFile.ImageFile) -> int | tuple[int, int, int] | None:
    """The gray level or color, as decoded, that an opened image declares transparent (tRNS)."""
    clear = image.info.get("transparency")
    if clear is None or not (image.mode in ("1", "L", "RGB") or image.mode.startswith("I")):
        return None
    depth = 8
    if image.format == "PNG":
        with _reopened(image) as file:
            depth = file.read(_PNG_DEPTH + 1)[_PNG_DEPTH]
    if image.mode == "RGB":
        # Pillow decodes the high byte of 16 bits.
        red, green, blue = (level >> 8 if depth == 16 else level for level in clear)
        return red, green, blue
    if image.mode == "1":
        return bool(clear)
    return clear * 255 // (2**depth - 1) if depth < 8 else clear


def _with_alpha(pixels: np.ndarray, is_opaque: np.ndarray) -> np.ndarray:
    """RGBA of gray or RGB pixels that are opaque where any channel `is_opaque`."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
        is_opaque = is_opaque[..., None]
    alpha = 255 * is_opaque.any(axis=-1, keepdims=True).astype(np.uint8)
    return np.concatenate([pixels, alpha], axis=-1)


def _as_8_bit(image: Image.Image) -> Image.Image:
    """Converts Pillow's modes of 8 bits and fewer to L, RGB or RGBA."""
    if image.mode in ("L", "RGB", "RGBA"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB")


def resize_image(
    image: np.ndarray, size: tuple[int, int], interpolation: str = "bilinear"
) -> np.ndarray:
    """Resizes uint8 `[height, width, channels]` to `size` (height, width), antialiased."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image

    def resized(pixels: np.ndarray) -> np.ndarray:
        whole = Image.fromarray(np.ascontiguousarray(pixels))
        resampling = Image.Resampling[interpolation.upper()]
        return np.asarray(whole.resize((size[1], size[0]), resampling))

    if image.shape[-1] == 3:
        return resized(image)
    # One by one: Pillow would weigh the colors of RGBA by their opacity.
    return np.stack([resized(image[..., channel]) for channel in range(image.shape[-1])], axis=-1)


def fit_image(image: np.ndarray, size: tuple[int, int], fit: str = "pad") -> np.ndarray:
    """Brings uint8 `[height, width, channels]` to `size` (height, width).

    Args:
      image: the image.
      size: the height and width wanted.
      fit: `"pad"` centers the image on black, made smaller first (its aspect ratio kept) where it
        does not fit; `"resize"` stretches it to the size; `"crop"` scales it until the size is
        0.875 of it in height or width and at most that in the other, and cuts the middle out;
        `"crop:0.95"`, or `"crop(share=0.95)"`, does so with another share.
        `"center(resize=256, interpolation=bicubic)"` scales the shorter side to `resize` pixels and
        cuts the middle out, to the pixel as torchvision's Resize and CenterCrop do of an image of
        Pillow's: published weights are tested so.
    """
    kind, share = parse_fit(fit)
    if kind == "resize":
        return resize_image(image, size)
    if kind == "center":
        return center_crop(image, size, share)
    if kind == "crop":
        found = image.shape[:2]
        scale = share * min(found[0] / size[0], found[1] / size[1])
        height, width = (max(1, round(side * scale)) for side in size)
        top, left = (found[0] - height) // 2, (found[1] - width) // 2
        return resize_image(image[top : top + height, left : left + width], size)
    return pad_to(resize_image(image, shrunk_size(image.shape[:2], size)), size)


@dataclasses.dataclass(frozen=True)
class Center:
    """The shorter side in pixels before the middle is cut out, and how it gets so long."""

    resize: int
    interpolation: str


def center_crop(image: np.ndarray, size: tuple[int, int], how: Center) -> np.ndarray:
    """Scales uint8 `[height, width, channels]` by its shorter side, and cuts out the middle.

    Raises:
      UserError: what is cut out would be larger than the scaled image.
    """
    if how.resize < max(size):
        raise UserError(
            f"an image whose shorter side is {how.resize} has no middle of {size[0]}x{size[1]}: "
            f"give center(resize={max(size)}) or more"
        )
    shorter = min(image.shape[:2])
    # As in torchvision the longer side is rounded down.
    height, width = (int(how.resize * side / shorter) for side in image.shape[:2])
    whole = resize_image(image, (height, width), how.interpolation)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return whole[top : top + size[0], left : left + size[1]]


def _whole() -> float:
    return 1.0


def _center(resize: int = 256, interpolation: str = "bilinear") -> Center:
    if interpolation not in INTERPOLATIONS:
        raise unknown_name("interpolation", interpolation, INTERPOLATIONS)
    if resize < 1:
        raise UserError(f"resize={resize}: give at least 1 pixel")
    return Center(resize, interpolation)


def _crop(share: float = CROP_SHARE) -> float:
    if not 0.0 < share <= 1.0:
        raise UserError(f"share={share}: give a share above 0 and at most 1")
    return share


FITS: spec.Registry = {"pad": _whole, "resize": _whole, "crop": _crop, "center": _center}


@functools.cache
def parse_fit(fit: str) -> tuple[str, Any]:
    """Returns the kind of a `fit` of `fit_image` and its share: 1 where it has none.

    Of `center` it is a `Center`.

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
        image = np.round(over_background(image, 255.0)).astype(np.uint8)
    if channels == 1 and image.shape[-1] == 3:
        image = np.round(luma(image)).astype(np.uint8)[..., None]
    elif channels == 3 and image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return fit_image(image, (height, width), fit)


def over_background(image: np.ndarray, background: float) -> np.ndarray:
    """Lays RGBA `[height, width, 4]` over a gray level; float64 `[height, width, 3]`."""
    opacity = image[..., 3:] / 255.0
    return image[..., :3] * opacity + background * (1.0 - opacity)


def luma(image: np.ndarray) -> np.ndarray:
    """Gray levels, float64 `[height, width]`; of three channels the ITU-R 601 luma."""
    if image.shape[-1] == 1:
        return image[..., 0].astype(np.float64)
    return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
