"""Which examples are held out of training: drawn by class, and compared with those trained on."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

# A dataset without a test split is tested on this fraction of its training images.
TEST_SHARE = 0.1
_MAX_NAMED = 3


class Files(NamedTuple):
    """The files of a dataset's examples, in the order of its splits.

    Attributes:
      names: for people.
      content: int64 `[examples]`; files of the same bytes have the same number.
    """

    names: Sequence[str]
    content: np.ndarray


class Divided(NamedTuple):
    """Which examples are trained, validated and tested on.

    Attributes:
      numbers: `train`, `validation` and `test` -> int64 `[examples]`, ascending, counted through
        the stored splits in their order.
      labels: int32 `[all examples]`: the new labels, -1 for those that are left out.
      notes: what a person should know, a line each.
    """

    numbers: dict[str, np.ndarray]
    labels: np.ndarray
    notes: tuple[str, ...]


def divide(
    name: str,
    class_names: Sequence[str],
    stored: Mapping[str, np.ndarray],
    *,
    relabel: np.ndarray | None = None,
    validation: float = 0.1,
    fold: str = "",
    seed: int = 0,
    is_stratified: bool = False,
    files: Files | None = None,
    drop_duplicates: bool = False,
) -> Divided:
    """Makes three splits of one to three stored ones: see `cnnjax.data.dataset.make_dataset`.

    Args:
      name, class_names, relabel, validation, fold, seed, is_stratified, files, drop_duplicates: as
        there.
      stored: the labels of `train`, and of `validation` and `test` where they are stored.

    Raises:
      UserError: for empty splits and impossible shares.
    """
    check_validation(validation)
    check_fold(fold)
    if fold and "validation" in stored and "test" in stored:
        raise UserError(f"fold {fold}: {name} has a validation split of its own; leave it out")
    labels = np.concatenate([np.asarray(label, np.int32) for label in stored.values()])
    if relabel is not None:
        labels = relabel[labels].astype(np.int32)
    numbers, start = {}, 0
    for split, label in stored.items():
        stop = start + len(label)
        numbers[split] = np.flatnonzero(labels[start:stop] >= 0) + start
        start = stop
    if "test" not in numbers and "validation" in numbers:
        numbers["test"] = numbers.pop("validation")
    for split, amount, own_seed in (("test", TEST_SHARE, 0), ("validation", validation, seed)):
        if split not in numbers:
            generator = numpy_generator(own_seed, f"{split} split")
            train = numbers["train"]
            if split == "validation" and fold:
                is_held = draw_fold(labels[train], fold, seed, is_stratified=is_stratified)
            else:
                is_held = draw(labels[train], amount, generator, is_stratified=is_stratified)
            numbers["train"], numbers[split] = train[~is_held], train[is_held]
    notes: list[str] = []
    if files is not None:
        held = {split: numbers[split] for split in ("validation", "test")}
        is_double, notes = duplicates(numbers["train"], held, files, are_dropped=drop_duplicates)
        if drop_duplicates and notes:
            if is_double.all():
                raise UserError(
                    f"drop_duplicates leaves no training image of {name}: all are held out too"
                )
            numbers["train"] = numbers["train"][~is_double]
    for split in ("train", "test"):
        if not len(numbers[split]):
            raise UserError(f"the {split} split of {name} is empty: choose other splits or classes")
    found = {split: labels[rows] for split, rows in sorted(numbers.items())}
    return Divided(numbers, labels, (*notes, *absent_classes(found, class_names)))


def check_validation(validation: float) -> None:
    """Raises UserError unless `validation` is a share below 1 or a whole number of images."""
    if not (0 <= validation < 1 or (validation >= 1 and float(validation).is_integer())):
        raise UserError(
            f"validation={validation}: give a fraction of the training images below 1, such as 0.1,"
            " or a whole number of images, such as 5000"
        )


def content(files: Sequence[Path]) -> np.ndarray:
    """A number for each file, the same for files of the same bytes.

    Only files of the same length are read. Raises UserError for one that cannot be.
    """
    try:
        sizes = [os.path.getsize(file) for file in files]
        is_shared = Counter(sizes)
        numbers: dict[object, int] = {}
        found = []
        for file, size in zip(files, sizes, strict=True):
            key: object = file
            if is_shared[size] > 1:
                with file.open("rb") as opened:
                    key = hashlib.file_digest(opened, "sha256").digest()
            found.append(numbers.setdefault(key, len(numbers)))
    except OSError as error:
        raise UserError(f"cannot read image {error.filename!r}: {error.strerror}") from None
    return np.array(found, np.int64)


def check_fold(fold: str) -> tuple[int, int]:
    """Returns (number, count) of a fold such as `2/5`, the second of five; (0, 0) of none.

    Raises:
      UserError: it is no such thing.
    """
    if not fold:
        return 0, 0
    number, slash, count = fold.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"fold {fold!r}: write it as 2/5, the second of five")
    if int(count) < 2:
        raise UserError(f"fold {fold!r}: of two folds or more")
    return int(number), int(count)


def draw_fold(labels: np.ndarray, fold: str, seed: int, *, is_stratified: bool) -> np.ndarray:
    """Returns which examples are in a fold, bool `[examples]`.

    Each example is in one of them; their sizes differ by one at most, and so do those of a class
    where they are stratified.

    Args:
      labels: integers `[examples]`.
      fold: such as `2/5`, the second of five.
      seed: draws the folds: those of one seed belong together.
      is_stratified: whether each class is divided evenly.

    Raises:
      UserError: there are fewer examples than folds.
    """
    number, count = check_fold(fold)
    if len(labels) < count:
        raise UserError(f"fold {fold!r}: there are {len(labels)} training images only")
    order = numpy_generator(seed, "folds").permutation(len(labels))
    if is_stratified:
        # One class behind the other, dealt out in turn.
        order = order[np.argsort(labels[order], kind="stable")]
    is_held = np.zeros(len(labels), bool)
    is_held[order[number - 1 :: count]] = True
    return is_held


def held_count(count: int, amount: float) -> int:
    """How many of `count` examples `amount` means: a share below 1, or their number."""
    held = round(amount * count) if amount < 1 else int(amount)
    if held >= count or (amount > 0 and held == 0):
        raise UserError(
            f"cannot hold out {amount:g} of {count} training images: that leaves one side empty"
        )
    return held


def draw(
    labels: np.ndarray, amount: float, generator: np.random.Generator, *, is_stratified: bool
) -> np.ndarray:
    """Draws the examples to hold out, bool `[examples]`: a share below 1, or their number.

    Args:
      labels: integers `[examples]`.
      amount: see `held_count`.
      generator: what they are drawn by.
      is_stratified: whether each class has its share of them, see `held_per_class`; else all
        examples are drawn alike.
    """
    count = len(labels)
    held = held_count(count, amount)
    is_held = np.zeros(count, bool)
    if not held:
        return is_held
    if not is_stratified:
        is_held[generator.permutation(count)[:held]] = True
        return is_held
    counts = np.bincount(labels)
    for label, number in enumerate(held_per_class(counts, held, generator)):
        is_held[generator.permutation(np.flatnonzero(labels == label))[:number]] = True
    return is_held


def held_per_class(counts: np.ndarray, held: int, generator: np.random.Generator) -> np.ndarray:
    """Divides `held` examples among classes in proportion to their sizes, int64 `[classes]`.

    By largest remainders, equal ones in a drawn order. A class of two examples or more has one held
    out as long as there are enough, and no class is held out whole unless it must.

    Args:
      counts: examples of each class, `[classes]`.
      held: how many to hold out, fewer than there are.
      generator: what the order is drawn by.
    """
    quota = counts * (held / counts.sum())
    most = np.maximum(counts - 1, 0)
    if held > most.sum():
        most = counts
    least = np.minimum(most, 1)
    taken = np.clip(np.floor(quota).astype(np.int64), least, most)
    order = generator.permutation(len(counts))

    def best(score: np.ndarray, is_allowed: np.ndarray) -> int:
        return order[np.argmax(np.where(is_allowed, score, -np.inf)[order])]

    while taken.sum() < held:
        taken[best(quota - taken, taken < most)] += 1
    while taken.sum() > held:
        has_room = taken > least if (taken > least).any() else taken > 0
        taken[best(taken - quota, has_room)] -= 1
    return taken


def absent_classes(labels: Mapping[str, np.ndarray], class_names: Sequence[str]) -> list[str]:
    """Returns a line for each split, of those with any example, in which classes have none."""
    notes = []
    for split, found in labels.items():
        counts = np.bincount(found, minlength=len(class_names))
        absent = [class_names[label] for label in np.flatnonzero(counts == 0).tolist()]
        if not absent or not len(found):
            continue
        them = "it" if len(absent) == 1 else "them"
        what, end = (
            ("training", f"the network cannot learn {them}")
            if split == "train"
            else (split, f"the {split} scores say nothing about {them}")
        )
        notes.append(f"no {what} images of {_named(absent)}: {end}")
    return notes


def duplicates(
    train: np.ndarray, held: Mapping[str, np.ndarray], files: Files, *, are_dropped: bool
) -> tuple[np.ndarray, list[str]]:
    """Compares the files of training with those held out.

    Args:
      train: which of the files are trained on, int64 `[examples]`.
      held: likewise of each other split.
      files: all of them.
      are_dropped: whether those that are held out too will be left out of training.

    Returns:
      (bool `[examples]`: which training examples are held out too; a line that says so, if any
      are).
    """
    kept_out = np.concatenate(list(held.values()))
    is_double = np.isin(files.content[train], files.content[kept_out])
    if not is_double.any():
        return is_double, []
    twin = {files.content[index]: files.names[index] for index in kept_out[::-1]}
    pairs = [
        f"{files.names[index]!r} (held out as {twin[files.content[index]]!r})"
        for index in train[is_double][:_MAX_NAMED]
    ]
    number = int(is_double.sum())
    more = f" and {number - len(pairs):,} more" if number > len(pairs) else ""
    what = "training image is" if number == 1 else "training images are"
    end = (
        "left out of training (--drop-duplicates)"
        if are_dropped
        else "held-out scores are too good; --drop-duplicates trains without them"
    )
    return is_double, [
        f"{number:,} {what} held out too, byte for byte: {', '.join(pairs)}{more}: {end}"
    ]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED:,} more classes" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(repr, names[:_MAX_NAMED])) + more
