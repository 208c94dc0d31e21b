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
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from cnnjax.data.image_files import over_background, read_image
from cnnjax.data.packaged.archives import deb_files
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

CLASSES = ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")
STAMPS = "usr/share/tuxpaint/stamps/"
COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
SIDE, SHARE = 256, 0.875
# Of each class: at most so many for testing and validation, and so many kept for training.
TEST, VALIDATION, TRAIN = 30, 10, 20
# Thumbnails whose gray levels correlate so are of one picture.
ALIKE = 0.95
THUMBNAIL = 16


def is_picture(name: str) -> bool:
    """Whether a file of the package is a picture of one of the classes."""
    inner = name.removeprefix(STAMPS)
    return inner != name and name.endswith(".png") and inner.partition("/")[0] in CLASSES


def prepare(deb: Path, out: Path) -> dict[str, dict[str, int]]:
    """Makes the folder of a verified package; returns split -> class -> number of pictures.

    Raises:
      UserError: the package cannot be unpacked, or has not enough pictures, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{str(out)!r} exists already: remove it, or choose another --data-dir")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".preparing-") as place:
        pictures, terms = _unpacked(deb, Path(place) / "files")
        splits = split(pictures)
        made = Path(place) / "made"
        for name, part in splits.items():
            for picture in part:
                path = made / name / class_of(picture) / flat_name(picture)
                path.parent.mkdir(parents=True, exist_ok=True)
                _save(pictures[picture], path)
        (made / "COPYRIGHT.txt").write_bytes(terms)
        made.rename(out)
    return {
        name: {each: sum(class_of(picture) == each for picture in part) for each in CLASSES}
        for name, part in splits.items()
    }


def split(pictures: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Returns split -> names of pictures; those of a group of `groups` are in one.

    Args:
      pictures: name below the package's `stamps` -> RGB `[height, width, 3]`.

    Raises:
      UserError: a class has too few for `TRAIN` training images and some for testing.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    found = groups(pictures)
    for label, name in enumerate(CLASSES):
        own = [group for group in found if class_of(group[0]) == name]
        count = sum(map(len, own))
        wanted = {
            "test": min(TEST, round(0.3 * count)),
            "validation": min(VALIDATION, round(0.1 * count)),
        }
        filled = dict.fromkeys(wanted, 0)
        for index in numpy_generator(0, "tuxpaint", label).permutation(len(own)):
            group = own[index]
            where = next((s for s in wanted if filled[s] + len(group) <= wanted[s]), "train")
            if where != "train":
                filled[where] += len(group)
            splits[where] += group
        left = count - sum(filled.values())
        if left < TRAIN or not filled["test"]:
            raise UserError(f"the class {name} has {count} pictures, too few to divide")
    return {name: sorted(part) for name, part in splits.items()}


def groups(pictures: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Returns the names in groups: of pictures alike, or of one name but for a number.

    Alike are pictures whose thumbnails of 16x16 gray levels correlate by 0.95, as they are or one
    of them mirrored, and so are those that are alike to the same third.
    """
    names = sorted(pictures)
    vectors = np.stack([thumbnail(pictures[name]) for name in names])
    mirrored = vectors.reshape(-1, THUMBNAIL, THUMBNAIL)[:, :, ::-1].reshape(len(names), -1)
    alike = np.maximum(vectors @ vectors.T, vectors @ mirrored.T) > ALIKE
    stems = [_stem(name) for name in names]
    group = list(range(len(names)))
    for i in range(len(names)):
        for j in range(i):
            if (alike[i, j] or stems[i] == stems[j]) and group[i] != group[j]:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if number == old else number for number in group]
    found: dict[int, list[str]] = {}
    for number, name in zip(group, names, strict=True):
        found.setdefault(number, []).append(name)
    return list(found.values())


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """Returns the gray levels of a picture, made 16x16, of mean 0 and length 1."""
    from PIL import Image

    small = Image.fromarray(picture).convert("L").resize((THUMBNAIL, THUMBNAIL))
    levels = np.asarray(small, np.float64).ravel()
    levels = levels - levels.mean()
    return levels / max(float(np.linalg.norm(levels)), 1e-12)


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
    pictures: dict[str, np.ndarray] = {}
    terms = b""
    place.mkdir()
    for name, content in deb_files(deb, lambda name: is_picture(name) or name == COPYRIGHT):
        if name == COPYRIGHT:
            terms = content
            continue
        file = place / "picture.png"
        file.write_bytes(content)
        pictures[name.removeprefix(STAMPS)] = on_white(file)
    shutil.rmtree(place)
    if not pictures or not terms:
        raise UserError(f"{str(deb)!r} has no pictures of Tux Paint, or no file of its license")
    return pictures, terms


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(squared(picture)).save(path, format="PNG")


def _stem(name: str) -> str:
    """Returns the name without what numbers or mirrors it: `food/fruit/strawberry2.png`."""
    path = PurePosixPath(name)
    stem = re.sub(r"([-_ ]?(\d+|mirror|flip|left|right))+$", "", path.stem.lower())
    return f"{path.parent}/{stem or path.stem.lower()}"


def counts_text(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Returns a line for each split: how many pictures of which class."""
    lines: Sequence[str] = [
        f"{name:<11} {sum(each.values()):>4}  "
        + ", ".join(f"{label} {count}" for label, count in each.items())
        for name, each in counts.items()
    ]
    return "\n".join(lines)
