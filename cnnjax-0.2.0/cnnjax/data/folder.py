"""Image classification from a directory with one sub-directory of image files per class."""

from __future__ import annotations

import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cnnjax.data.dataset import Arrays, Source
from cnnjax.data.directories import IMAGE_SUFFIXES, files_below, images, subdirectories
from cnnjax.data.held_out import Files, content
from cnnjax.data.image_files import (
    fit_image,
    image_to_shape,
    is_gray,
    open_image,
    read_image,
    upright_size,
    white_level,
)
from cnnjax.errors import UserError
from cnnjax.paths import check_shown, expand

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "validate", "dev", "devel", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words}
# What may follow such a word: train_set, Test Images, val-data.
_OF_A_SPLIT = re.compile(r"(sets?|splits?|data|images?|imgs?|examples|samples)$")
_MAX_NAMED = 5


class Found(NamedTuple):
    """The image files of a directory.

    Attributes:
      root: the directory.
      class_names: sorted; a label is the index into it.
      splits: `train`, and `validation` and `test` where there are such -> (file, label) of each.
    """

    root: pathlib.Path
    class_names: tuple[str, ...]
    splits: dict[str, list[tuple[pathlib.Path, int]]]

    @property
    def flat(self) -> list[pathlib.Path]:
        """The files of all splits, in their order."""
        return [file for split in self.splits.values() for file, _ in split]

    def compared(self) -> Files:
        """Their names below the directory, and which are the same byte for byte."""
        return Files([str(file.relative_to(self.root)) for file in self.flat], content(self.flat))


def find_files(path: str | os.PathLike) -> Found:
    """Finds the classes and images below `path` and opens none: see `open_folder`.

    Raises:
      UserError: for layouts other than those.
    """
    root = pathlib.Path(expand(path))
    if not root.is_dir():
        raise UserError(
            f"no directory {str(root)!r}: give folder:PATH of a directory of classes; for a run "
            "whose folder has moved, --dataset folder:NEW"
        )
    check_shown(str(root), "directory")
    splits = _split_directories(root)
    classes = {split: _class_directories(where) for split, where in splits.items()}
    class_names = tuple(sorted(classes["train"]))
    _check_classes(splits, classes)
    files: dict[str, list[tuple[pathlib.Path, int]]] = {
        split: [
            (file, label)
            for label, name in enumerate(class_names)
            if name in found
            for file in files_below(found[name])
        ]
        for split, found in classes.items()
    }
    for split, found in classes.items():
        _check_images(splits[split], found, files[split], class_names, needs_all=split == "train")
    return Found(root, class_names, files)


def open_folder(
    path: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
    fit: str = "pad",
    max_bytes: int,
) -> Source:
    """Finds the classes and images below `path` and reads every header, but no pixels yet.

    The layout is `path/CLASS/FILE`, or `path/train/CLASS/FILE` with `validation` and `test` next to
    `train`, by their usual names in any case (`Training`, `val`, `dev`, `test_set`). Classes are
    numbered in the order of their sorted names; files come in the order of theirs. A class that
    `validation` or `test` lacks has no images there.

    All image files at any depth of a class count. Links are followed, each directory once per
    class. Hidden files and directories, those that systems leave (`__MACOSX`, `@eaDir`), and files
    of other suffixes are passed over.

    Args:
      path: the directory; `~` is the home directory.
      image_size: (height, width) of all images; None where all files have one size.
      fit: how files get that size: see `cnnjax.data.image_files.fit_image`.
      max_bytes: the size in memory above which the dataset is refused.

    Raises:
      UserError: for unreadable files (named), mixed sizes without `image_size`, and layouts other
        than these.
    """
    found = find_files(path)
    flat = found.flat
    shape = _common_shape(flat, image_size)
    if len(flat) * np.prod(shape) > max_bytes:
        raise UserError(
            f"{len(flat)} images of {list(shape)} below {str(found.root)!r} take more than "
            f"{max_bytes / 2**30:g} GiB of memory: stream them (pipeline 'stream'), or give a "
            "smaller image_size"
        )
    return Source(
        found.class_names,
        {name: len(split) for name, split in found.splits.items()},
        read=lambda: {
            name: _read(split, shape, fit, is_measured=image_size is None)
            for name, split in found.splits.items()
        },
        files=found.compared,
        is_stratified=True,
    )


def labeled_files(
    path: str | os.PathLike, split: str
) -> tuple[list[str], list[pathlib.Path], np.ndarray]:
    """Returns the classes, files and labels of one split; no file is opened.

    `split` is that of `open_folder`; a folder without splits is all one, and `test` is the
    validation split where there is no other.

    Raises:
      UserError: there is no such directory or split, or it has no images.
    """
    root = pathlib.Path(expand(path))
    if not root.is_dir():
        raise UserError(f"no directory {str(root)!r}: give folder:PATH of a directory of classes")
    splits = {"test": root}
    inner = subdirectories(root)
    if any(_split_of(child.name) and subdirectories(child) for child in inner):
        splits = {word: child for child in inner if (word := _split_of(child.name))}
    where = splits.get(split) or (splits.get("validation") if split == "test" else None)
    if where is None:
        raise UserError(f"{str(root)!r} has no {split} split, but {', '.join(sorted(splits))}")
    found = {name: files_below(each) for name, each in _class_directories(where).items()}
    if not any(found.values()):
        raise UserError(f"no image files in the class directories of {str(where)!r}")
    labels = [label for label, name in enumerate(sorted(found)) for _ in found[name]]
    names = [file for name in sorted(found) for file in found[name]]
    return sorted(found), names, np.array(labels, np.int32)


def _split_directories(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Split name -> its directory; `root` itself where there are no splits."""
    children = subdirectories(root)
    named = [child for child in children if _split_of(child.name)]
    others = [child for child in children if not _split_of(child.name)]
    # A directory without directories is a class, whatever its name.
    if not named or (others and not any(map(subdirectories, named))):
        return {"train": root}
    if others:
        raise UserError(
            f"{str(root)!r} has both {named[0].name!r}, which is named as a split, and "
            f"{others[0].name!r}: put every class below 'train' (and 'validation' and 'test'), or "
            "rename it"
        )
    found: dict[str, pathlib.Path] = {}
    for child in named:
        split = _split_of(child.name)
        if split in found:
            raise UserError(
                f"{str(root)!r} has two directories of the {split} split, {found[split].name!r} "
                f"and {child.name!r}: keep one of them"
            )
        found[split] = child
    if "train" not in found:
        raise UserError(
            f"{str(root)!r} has {' and '.join(repr(child.name) for child in named)}, which are "
            "named as splits, but no 'train': name the training images so, or rename the classes"
        )
    return found


def _split_of(name: str) -> str:
    """The split that a directory's name means, or ""."""
    word = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
    return _SPLIT_OF_WORD.get(word) or _SPLIT_OF_WORD.get(_OF_A_SPLIT.sub("", word), "")


def _class_directories(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Class name -> its directory.

    The name is the directory's in composed Unicode (NFC), which systems disagree about, without
    space around it.
    """
    found: dict[str, pathlib.Path] = {}
    for child in subdirectories(directory):
        check_shown(child.name, f"class directory of {str(directory)!r}")
        name = unicodedata.normalize("NFC", child.name).strip()
        if name in found:
            raise UserError(
                f"the class directories {found[name].name!a} and {child.name!a} of "
                f"{str(directory)!r} read the same: rename one or put their files together"
            )
        found[name] = child
    return found


def _check_classes(
    splits: Mapping[str, pathlib.Path], classes: Mapping[str, Mapping[str, pathlib.Path]]
) -> None:
    """Raises UserError unless the directories of training are classes, and the only ones."""
    train = classes["train"]
    if len(train) < 2:
        inner = [str(each) for each in train.values() if subdirectories(each)]
        raise UserError(
            f"{str(splits['train'])!r} has {len(train)} sub-directories: one per class is needed, "
            f"two at least{f'; is it {inner[0]!r} that you mean?' if inner else ''}"
        )
    for child in train.values():
        if _split_of(child.name) and subdirectories(child):
            raise UserError(
                f"{str(child)!r} is named as a split, but stands where classes are: move it up, or "
                "rename it"
            )
    inside = [
        frozenset(each.name.casefold() for each in subdirectories(child))
        for child in train.values()
    ]
    if len(inside[0]) > 1 and len(set(inside)) == 1 and not any(map(images, train.values())):
        first, second = sorted(train)[:2]
        raise UserError(
            f"{first!r} and {second!r} in {str(splits['train'])!r} hold the same sub-directories "
            f"({', '.join(sorted(inside[0])[:_MAX_NAMED])}) and no images, as splits do and "
            "classes do not: name the splits 'train', 'validation' and 'test', or put images "
            "into the classes"
        )
    for split, found in classes.items():
        if new := sorted(set(found) - set(train)):
            alike = [name for name in train if name.casefold() == new[0].casefold()]
            raise UserError(
                f"the classes of {str(splits[split])!r} are not those of training: new {new}"
                + (f", where training has {alike[0]!r}" if alike else "")
                + ": rename or remove them"
            )


def _check_images(
    directory: pathlib.Path,
    classes: Mapping[str, pathlib.Path],
    files: Sequence[tuple[pathlib.Path, int]],
    class_names: Sequence[str],
    *,
    needs_all: bool,
) -> None:
    """Raises UserError for a class without training images, or a split without any."""
    expected = f"expected {', '.join(IMAGE_SUFFIXES)}"
    present = {label for _, label in files}
    for label, name in enumerate(class_names):
        if needs_all and label not in present:
            raise UserError(f"no image files in {str(classes[name])!r}: {expected}")
    if not present:
        raise UserError(
            f"no image files in the class directories of {str(directory)!r}: {expected}, in one "
            "sub-directory per class; remove the directory if it is not used"
        )


def _common_shape(
    files: Iterable[pathlib.Path], image_size: tuple[int, int] | None
) -> tuple[int, int, int]:
    sizes: Counter[tuple[int, int]] = Counter()
    example_of_size: dict[tuple[int, int], pathlib.Path] = {}
    channels, problems = 1, []
    for file in files:
        try:
            with open_image(file) as image:
                white_level(image)
                size = upright_size(image)
                channels = max(channels, 1 if is_gray(image) else 3)
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


def _read(
    files: Sequence[tuple[pathlib.Path, int]],
    shape: tuple[int, int, int],
    fit: str,
    *,
    is_measured: bool,
) -> Arrays:
    """Decodes the files; where the size `is_measured`, each must have it as its header says."""
    images = np.empty((len(files), *shape), np.uint8)
    problems = []
    for index, (file, _) in enumerate(files):
        try:
            image = read_image(file)
        except UserError as error:
            problems.append(str(error))
            continue
        found = image.shape[:2]
        if is_measured and found != shape[:2]:
            problems.append(f"image {str(file)!r} is not of the size that its header says")
            continue
        images[index] = fit_image(image_to_shape(image, (*found, shape[2])), shape[:2], fit)
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
