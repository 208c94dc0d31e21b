"""Image files that clients send, decoded for a model, within limits that their headers tell."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnnjax.errors import UserError
from cnnjax.serve.refusals import Invalid, TooLarge
from cnnjax.serve.runtime import Runtime

if TYPE_CHECKING:
    from PIL import ImageFile

# 4096 x 4096 pixels: 48 MiB of RGB.
MOST_PIXELS = 4096 * 4096
# Formats with a size in their header. Of others that Pillow knows some start a program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Files of fewer bytes and pixels are decoded where they are: a thread costs as much.
FEW_BYTES, FEW_PIXELS = 16_384, 4_096


def decode(content: bytes, runtime: Runtime, *, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """Returns an image as a model takes it, of the content of an image file.

    Raises:
      TooLarge: more pixels than are accepted, by the file's header: nothing is decoded.
      Invalid: no image, a damaged one, or one in which no digit is found.
    """
    with opened(content, most_pixels) as image:
        return _decoded(image, runtime)


def _decoded(image: ImageFile.ImageFile, runtime: Runtime) -> np.ndarray:
    from cnnjax.data import read_image

    try:
        return runtime.prepare(read_image(image))
    except UserError as error:
        raise Invalid(str(error)) from None


def opened(content: bytes, most_pixels: int) -> ImageFile.ImageFile:
    """Returns an opened image, of which the header is read and nothing is decoded.

    Raises:
      TooLarge, Invalid: as `decode`.
    """
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLarge(f"the image has more than the {most_pixels} pixels accepted.") from None
    except Exception:  # Of many types, by the format; none of them documented.
        raise Invalid(f"what was sent is not an image: send {', '.join(FORMATS)}.") from None
    if image.width * image.height > most_pixels:
        image.close()
        raise TooLarge(
            f"the image has {image.width} x {image.height} pixels, more than the {most_pixels} "
            "accepted."
        )
    return image


async def decode_all(
    contents: Sequence[bytes], runtime: Runtime, *, most_pixels: int = MOST_PIXELS
) -> np.ndarray:
    """Returns `[images, height, width, channels]` of image files; large ones are left to a thread.

    Raises:
      TooLarge, Invalid: as `decode`, with the place of the file where there are several.
    """

    def decoded() -> np.ndarray:
        images = []
        for place, content in enumerate(contents):
            try:
                images.append(decode(content, runtime, most_pixels=most_pixels))
            except (Invalid, TooLarge) as error:
                where = f"image {place}: " if len(contents) > 1 else ""
                raise type(error)(f"{where}{error.text}") from None
        return np.stack(images)

    if len(contents) == 1 and len(contents[0]) <= FEW_BYTES:
        with opened(contents[0], most_pixels) as image:
            if image.width * image.height <= FEW_PIXELS:
                return _decoded(image, runtime)[None]
    return await asyncio.to_thread(decoded)
