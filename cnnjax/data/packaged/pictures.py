"""Pictures of packages as folders of classes with fixed splits, near duplicates in one split."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

# Of each class: at most so many for testing and validation, and so many kept for training.
TEST, VALIDATION, TRAIN = 30, 10, 20
THUMBNAIL = 16


def make_folder(
    out: Path,
    splits: Mapping[str, Sequence[str]],
    path_of: Callable[[str], str],
    save: Callable[[str, Path], None],
    terms: Mapping[str, bytes],
) -> dict[str, dict[str, int]]:
    """Writes a folder of classes, whole or not at all.

    Args:
      out: the folder.
      splits: split -> names of pictures, of `split`.
      path_of: name -> `CLASS/FILE`.
      save: (name, path) writes a picture.
      terms: file name -> what says under which license the pictures are.

    Returns:
      Split -> class -> number of pictures.
    """
    counts: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".preparing-") as place:
        made = Path(place) / "made"
        for part, names in splits.items():
            counts[part] = {}
            for name in names:
                path = made / part / path_of(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                save(name, path)
                counts[part][path.parent.name] = counts[part].get(path.parent.name, 0) + 1
        for name, text in terms.items():
            (made / name).write_bytes(text)
        made.rename(out)
    return counts


def check_new(out: Path) -> None:
    """Makes the parent of a folder that is to be written; UserError if the folder is there."""
    if out.exists():
        raise UserError(f"{str(out)!r} exists already: remove it, or choose another --data-dir")
    out.parent.mkdir(parents=True, exist_ok=True)


def split(
    groups: Sequence[Sequence[str]],
    classes: Sequence[str],
    class_of: Callable[[str], str],
    salt: str,
) -> dict[str, list[str]]:
    """Returns split -> names of pictures; those of a group are in one split.

    Args:
      groups: of names, such as those of `groups`.
      classes: in the order of the labels.
      class_of: name -> class; a group has the class of its first picture.
      salt: of the random numbers: the dataset's name.

    Raises:
      UserError: a class has too few for `TRAIN` training images and some for testing.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(classes):
        own = [group for group in groups if class_of(group[0]) == name]
        count = sum(map(len, own))
        wanted = {
            "test": min(TEST, round(0.3 * count)),
            "validation": min(VALIDATION, round(0.1 * count)),
        }
        filled = dict.fromkeys(wanted, 0)
        for index in numpy_generator(0, salt, label).permutation(len(own)):
            group = own[index]
            where = next((s for s in wanted if filled[s] + len(group) <= wanted[s]), "train")
            if where != "train":
                filled[where] += len(group)
            splits[where] += group
        left = count - sum(filled.values())
        if left < TRAIN or not filled["test"]:
            raise UserError(f"the class {name} has {count} pictures, too few to divide")
    return {name: sorted(part) for name, part in splits.items()}


def groups(
    pictures: Mapping[str, np.ndarray], stem: Callable[[str], str], alike: float
) -> list[list[str]]:
    """Returns the names in groups: of pictures alike, or of one stem.

    Alike are pictures whose thumbnails correlate by more than `alike`, as they are or one of them
    mirrored, and so are those that are alike to the same third.

    Args:
      pictures: name -> RGB `[height, width, 3]`.
      stem: name -> what names of one group have in common.
      alike: the correlation of gray levels of 16x16 pixels.
    """
    names = sorted(pictures)
    vectors = np.stack([thumbnail(pictures[name]) for name in names])
    mirrored = vectors.reshape(-1, THUMBNAIL, THUMBNAIL)[:, :, ::-1].reshape(len(names), -1)
    related = np.maximum(vectors @ vectors.T, vectors @ mirrored.T) > alike
    stems = np.unique([stem(name) for name in names], return_inverse=True)[1]
    related |= stems[:, None] == stems[None, :]
    group = np.arange(len(names))
    for i, j in np.argwhere(np.tril(related, -1)):
        if group[i] != group[j]:
            group[group == max(group[i], group[j])] = min(group[i], group[j])
    found: dict[int, list[str]] = {}
    for number, name in zip(group.tolist(), names, strict=True):
        found.setdefault(number, []).append(name)
    return list(found.values())


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """Returns the gray levels of a picture, made 16x16, of mean 0 and length 1."""
    from PIL import Image

    small = Image.fromarray(picture).convert("L").resize((THUMBNAIL, THUMBNAIL))
    levels = np.asarray(small, np.float64).ravel()
    levels = levels - levels.mean()
    return levels / max(float(np.linalg.norm(levels)), 1e-12)


def counts_text(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Returns a line for each split: how many pictures of which class."""
    return "\n".join(
        f"{name:<11} {sum(each.values()):>4}  "
        + ", ".join(f"{label} {count}" for label, count in each.items())
        for name, each in counts.items()
    )
