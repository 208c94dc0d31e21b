"""Image classification from a directory with one sub-directory of image files per class."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnnjax.data.dataset import Arrays, Source
from cnnjax.data.image_files import fit_image, image_to_shape, open_image, read_image
from cnnjax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png"),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
_SPLIT_OF_DIRECTORY = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}
_GRAY_MODES = ("1", "L", "I", "I;16", "F")
# EXIF orientations that turn the image by a quarter.
_TURNED = (5, 6, 7, 8)
_EXIF_ORIENTATION = 0x0112
_MAX_NAMED = 5


def open_folder(
    path: str | pathlib.Path,
    *,
    image_size: tuple[int, int] | None = None,
    fit: str = "pad",
    max_bytes: int,
) -> Source:
    """Finds the classes and images below `path` and reads every header, but no pixels yet.

    The layout is `path/CLASS/FILE`, or `path/train/CLASS/FILE` with `validation` (or `val`) and
    `test` next to `train`. Classes are numbered in the order of their sorted names; files come in
    the order of theirs. Hidden files and files of other suffixes are passed over.

    Args:
      path: the directory.
      image_size: (height, width) of all images; None where all files have one size.
      fit: how files get that size: see `cnnjax.data.image_files.fit_image`.
      max_bytes: the size in memory above which the dataset is refused.

    Raises:
      UserError: for unreadable files (named), mixed sizes without `image_size`, and layouts other
        than these.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"no directory {str(root)!r}: give folder:PATH of a directory of classes; for a run "
            "whose folder has moved, --dataset folder:NEW"
        )
    directories = _split_directories(root)
    class_names = tuple(sorted(child.name for child in _subdirectories(directories["train"])))
    if len(class_names) < 2:
        raise UserError(
            f"{str(directories['train'])!r} has {len(class_names)} sub-directories: one per class "
            "is needed, two at least"
        )
    files = {name: _labelled_files(where, class_names) for name, where in directories.items()}
    shape = _common_shape([file for split in files.values() for file, _ in split], image_size)
    count = sum(len(split) for split in files.values())
    if count * np.prod(shape) > max_bytes:
        raise UserError(
            f"{count} images of {list(shape)} below {str(root)!r} take more than "
            f"{max_bytes / 2**30:g} GiB of memory: give a smaller image_size"
        )
    return Source(
        class_names=class_names,
        num_examples={name: len(split) for name, split in files.items()},
        read=lambda: {name: _read(split, shape, fit) for name, split in files.items()},
    )


def _split_directories(root: pathlib.Path) -> dict[str, pathlib.Path]:
    if not (root / "train").is_dir():
        return {"train": root}
    children = _subdirectories(root)
    strange = [child.name for child in children if child.name not in _SPLIT_OF_DIRECTORY]
    if strange:
        raise UserError(
            f"{str(root)!r} has both a sub-directory 'train' and {strange[0]!r}: next to 'train' "
            "only 'validation' (or 'val') and 'test' are expected"
        )
    return {_SPLIT_OF_DIRECTORY[child.name]: child for child in children}


def _subdirectories(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        child for child in directory.iterdir() if child.is_dir() and not child.name.startswith(".")
    )


def _labelled_files(
    directory: pathlib.Path, class_names: Sequence[str]
) -> list[tuple[pathlib.Path, int]]:
    found = {child.name for child in _subdirectories(directory)}
    if found != set(class_names):
        raise UserError(
            f"the classes of {str(directory)!r} are not those of training: missing "
            f"{sorted(set(class_names) - found)}, new {sorted(found - set(class_names))}"
        )
    labelled = []
    for label, name in enumerate(class_names):
        files = sorted(
            file
            for file in (directory / name).rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        )
        if not files:
            raise UserError(
                f"no image files in {str(directory / name)!r}: expected {', '.join(IMAGE_SUFFIXES)}"
            )
        labelled += [(file, label) for file in files]
    return labelled


def _common_shape(
    files: Iterable[pathlib.Path], image_size: tuple[int, int] | None
) -> tuple[int, int, int]:
    sizes: Counter[tuple[int, int]] = Counter()
    example_of_size: dict[tuple[int, int], pathlib.Path] = {}
    channels, problems = 1, []
    for file in files:
        try:
            with open_image(file) as image:
                turned = _is_turned(image)
                size = (image.width, image.height) if turned else (image.height, image.width)
                channels = max(channels, 1 if image.mode in _GRAY_MODES else 3)
        except UserError as error:
            problems.append(str(error))
            continue
        sizes[size] += 1
        example_of_size.setdefault(size, file)
    _raise_unreadable(problems)
    if image_size is not None:
        return (*image_size, channels)
    if len(sizes) > 1:
        (first, _), (second, _) = sizes.most_common(2)
        raise UserError(
            f"images have {len(sizes)} different sizes (height x width), such as "
            f"{first[0]}x{first[1]} in {str(example_of_size[first])!r} and "
            f"{second[0]}x{second[1]} in {str(example_of_size[second])!r}: give image_size"
        )
    return (*next(iter(sizes)), channels)


def _is_turned(image: Image.Image) -> bool:
    """Whether the EXIF orientation turns the image by a quarter."""
    if image.format == "PNG":
        # Its EXIF may follow the pixels: all of them would be decoded, for what no camera writes.
        return False
    try:
        return image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    except (OSError, SyntaxError, ValueError):
        # Whatever is wrong with the file is told when it is decoded.
        return False


def _read(
    files: Sequence[tuple[pathlib.Path, int]], shape: tuple[int, int, int], fit: str
) -> Arrays:
    images = np.empty((len(files), *shape), np.uint8)
    problems = []
    for index, (file, _) in enumerate(files):
        try:
            image = read_image(file)
        except UserError as error:
            problems.append(str(error))
            continue
        same_size = (*image.shape[:2], shape[2])
        images[index] = fit_image(image_to_shape(image, same_size), shape[:2], fit)
    _raise_unreadable(problems)
    return Arrays(images, np.array([label for _, label in files], np.int32))


def _raise_unreadable(problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise UserError(
            f"{len(problems)} unreadable image files, remove or mend them: "
            + "; ".join(problems[:_MAX_NAMED])
            + more
        )
