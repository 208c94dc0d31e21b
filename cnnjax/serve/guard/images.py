"""Images of strangers: their size is read from the header before a pixel is decoded."""

from __future__ import annotations

import io
import warnings

from cnnjax.errors import UserError
from cnnjax.serve.guard.refusal import Refused

# Formats with decoders that are fuzzed by many, and a size in their header. Others that Pillow
# knows start programs (EPS), or hold many images of one name each (ICO, ICNS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 16_000_000


def check_image(content: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Returns (height, width) as the header of an image says.

    Args:
      content: of the file.
      max_pixels: that are accepted.

    Raises:
      Refused: `image_too_large`: more pixels, as of a decompression bomb.
      UserError: no image, or one of a format that is not in `FORMATS`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow has a bound of its own, which is higher.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise Refused("image_too_large", f"at most {max_pixels:,}") from None
    except UnidentifiedImageError:
        raise UserError(f"the body is no image: send one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Of many types, by the format; none of them documented.
        raise UserError(f"the image is damaged: {error}") from None
    if width * height > max_pixels:
        raise Refused("image_too_large", f"{width} x {height}; at most {max_pixels:,}")
    return height, width
