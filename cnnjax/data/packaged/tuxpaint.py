"""The pictures of Tux Paint as an ordinary folder of classes with fixed splits.

The classes are the package's top folders that have enough pictures. A picture is laid over white
where it is transparent, and set into the middle of a white square whose inner 0.875 it fills: that
is the part that networks with ImageNet's usual transform look at. Pictures that are alike, mirrored
or not, and those of one name but for a number, are in one split.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from cnnjax.data.image_files import over_background, read_image
from cnnjax.data.packaged import pictures
from cnnjax.data.packaged.archives import deb_files
from cnnjax.errors import UserError

CLASSES = ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")
STAMPS = "usr/share/tuxpaint/stamps/"
COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
SIDE, SHARE = 256, 0.875
# Thumbnails whose gray levels correlate so are of one picture.
ALIKE = 0.95


def is_picture(name: str) -> bool:
    """Whether a file of the package is a picture of one of the classes."""
    inner = name.removeprefix(STAMPS)
    return inner != name and name.endswith(".png") and inner.partition("/")[0] in CLASSES


def prepare(deb: Path, out: Path) -> dict[str, dict[str, int]]:
    """Makes the folder of a verified package; returns split -> class -> number of pictures.

    Raises:
      UserError: the package cannot be unpacked, or has not enough pictures, or `out` exists.
    """
    pictures.check_new(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".unpacking-") as place:
        found, terms = _unpacked(deb, Path(place) / "files")
    return pictures.make_folder(
        out,
        split(found),
        lambda name: f"{class_of(name)}/{flat_name(name)}",
        lambda name, path: _save(found[name], path),
        {"COPYRIGHT.txt": terms},
    )


def split(found: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Returns split -> names of pictures; those of a group of `groups` are in one.

    Args:
      found: name below the package's `stamps` -> RGB `[height, width, 3]`.

    Raises:
      UserError: a class has too few.
    """
    return pictures.split(groups(found), CLASSES, class_of, "tuxpaint")


def groups(found: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Returns the names in groups: of pictures alike, or of one name but for a number."""
    return pictures.groups(found, _stem, ALIKE)


def on_white(path: Path) -> np.ndarray:
    """Returns an image file as RGB, what is transparent laid over white."""
    image = read_image(path)
    if image.shape[-1] == 4:
        return np.round(over_background(image, 255.0)).astype(np.uint8)
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def squared(picture: np.ndarray) -> np.ndarray:
    """Returns a picture in the middle of a white square; of at most 256 pixels, see the module."""
    from PIL import Image

    height, width = picture.shape[:2]
    scale = min(1.0, SIDE * SHARE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    inner = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    side = max(round(max(size) / SHARE), *size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(inner, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)


def class_of(name: str) -> str:
    """Returns the class of a picture: the top folder in its name."""
    return name.partition("/")[0]


def flat_name(name: str) -> str:
    """Returns a picture's name within its class: folders are joined by `-`."""
    return name.partition("/")[2].replace("/", "-")


def _unpacked(deb: Path, place: Path) -> tuple[dict[str, np.ndarray], bytes]:
    found: dict[str, np.ndarray] = {}
    terms = b""
    place.mkdir()
    for name, content in deb_files(deb, lambda name: is_picture(name) or name == COPYRIGHT):
        if name == COPYRIGHT:
            terms = content
            continue
        file = place / "picture.png"
        file.write_bytes(content)
        found[name.removeprefix(STAMPS)] = on_white(file)
    shutil.rmtree(place)
    if not found or not terms:
        raise UserError(f"{str(deb)!r} has no pictures of Tux Paint, or no file of its license")
    return found, terms


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(squared(picture)).save(path, format="PNG")


def _stem(name: str) -> str:
    """Returns the name without what numbers or mirrors it: `food/fruit/strawberry2.png`."""
    path = PurePosixPath(name)
    stem = re.sub(r"([-_ ]?(\d+|mirror|flip|left|right))+$", "", path.stem.lower())
    return f"{path.parent}/{stem or path.stem.lower()}"
