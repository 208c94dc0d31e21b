"""The training, validation and test splits of a tfds dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cnnjax.data.held_out import TEST_SHARE, check_validation, held_count
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

SPLITS = ("train", "validation", "test")


class TfdsSpec(NamedTuple):
    """What stands after `tfds:`.

    Attributes:
      name: as tfds writes it: `mnist`, `mnist:3.0.1`, `imagenette/160px-v2:1.0.0`.
      splits: `train`, `validation`, `test` -> a tfds split with slices; only those that were given.
    """

    name: str
    splits: dict[str, str]


class Range(NamedTuple):
    """Consecutive examples of one of the dataset's own splits: `split[start:stop]`."""

    split: str
    start: int
    stop: int


def parse_spec(text: str) -> TfdsSpec:
    """Parses `NAME[/CONFIG][:VERSION][?train=SPLIT&validation=SPLIT&test=SPLIT]`.

    A split is written as tfds writes it, such as `train[:10%]` or `train[50000:]+extra`.
    """
    name, mark, query = text.partition("?")
    splits = {}
    for part in query.split("&") if mark else ():
        key, equals, split = part.partition("=")
        if key not in SPLITS or not equals or not split:
            raise UserError(
                f"cannot read {part!r} in 'tfds:{text}': after '?' give train=SPLIT, "
                "validation=SPLIT or test=SPLIT, separated by '&', such as "
                "'tfds:mnist?train=train[:10%]&test=test'"
            )
        splits[key] = split
    return TfdsSpec(name, splits)


def choose_splits(builder: Any, given: dict[str, str]) -> dict[str, str]:
    """Returns split name -> tfds split for what was `given`, completed from the dataset's own.

    Raises:
      UserError: for splits that the dataset does not have, empty ones, and ones that overlap.
    """
    own = list(builder.info.splits)
    chosen = {name: name for name in SPLITS if name in own} | given
    if "train" not in chosen:
        raise UserError(
            f"tfds dataset {builder.info.full_name!r} has no split 'train' but {', '.join(own)}: "
            f"choose by 'tfds:{builder.info.full_name}?train=...&test=...'"
        )
    # An own split that a given slice has taken from is not used a second time.
    for name in [name for name in chosen if name not in given]:
        others = [chosen[other] for other in given]
        if any(_overlap(builder, chosen[name], other) for other in others):
            if name == "train":
                raise UserError(
                    f"train=train overlaps with what was given for {builder.info.full_name!r} as "
                    f"{' and '.join(given)}: give train=SPLIT too"
                )
            del chosen[name]
    names = list(chosen)
    for index, name in enumerate(names):
        if not split_size(builder, chosen[name]):
            raise UserError(f"split {name}={chosen[name]} of {builder.info.full_name!r} is empty")
        for other in names[index + 1 :]:
            if _overlap(builder, chosen[name], chosen[other]):
                raise UserError(
                    f"splits {name}={chosen[name]} and {other}={chosen[other]} of "
                    f"{builder.info.full_name!r} share examples: choose disjoint ones"
                )
    return chosen


def split_size(builder: Any, split: str) -> int:
    """The number of examples of a tfds split with slices."""
    return count(ranges(builder, split))


def ranges(builder: Any, split: str) -> tuple[Range, ...]:
    """The parts of a tfds split with slices, in the order in which they are read."""
    import tensorflow_datasets as tfds

    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    try:
        instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(
            f"tfds dataset {builder.info.full_name!r} has no split {split!r}: its splits are "
            f"{', '.join(f'{name} ({size:,})' for name, size in sizes.items())}, sliced such as "
            "train[:10%] or train[1000:]"
        ) from error
    return tuple(
        Range(
            part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to
        )
        for part in instructions
    )


def count(parts: Sequence[Range]) -> int:
    """The number of examples of the parts together."""
    return sum(part.stop - part.start for part in parts)


def cut(parts: Sequence[Range], start: int, stop: int) -> tuple[Range, ...]:
    """The examples at the positions `start` to `stop` of the parts laid end to end.

    >>> cut([Range("train", 0, 10), Range("extra", 0, 5)], 8, 12)
    (Range(split='train', start=8, stop=10), Range(split='extra', start=0, stop=2))
    """
    found = []
    for part in parts:
        length = part.stop - part.start
        first, last = max(start, 0), min(stop, length)
        if first < last:
            found.append(Range(part.split, part.start + first, part.start + last))
        start, stop = start - length, stop - length
    return tuple(found)


def as_text(parts: Sequence[Range]) -> str:
    """The parts as tfds writes them, such as `train[0:90]+train[95:100]`."""
    return "+".join(f"{part.split}[{part.start}:{part.stop}]" for part in parts)


def _overlap(builder: Any, first: str, second: str) -> bool:
    return any(
        name == other and max(start, begin) < min(stop, end)
        for name, start, stop in ranges(builder, first)
        for other, begin, end in ranges(builder, second)
    )


def completed(
    name: str, builder: Any, splits: dict[str, tuple[Range, ...]], validation: float, seed: int
) -> dict[str, tuple[Range, ...]]:
    """Returns all three splits, as `make_dataset` completes them, but by slices.

    Raises:
      UserError: the dataset is stored in order, so that no slice of it is a fair sample.
    """
    check_validation(validation)
    splits = dict(splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    missing = {"test", *(["validation"] if validation else [])} - set(splits)
    if missing and builder.info.disable_shuffling:
        raise UserError(
            f"{name!r} is stored in order, so that no slice of it is a fair sample: name its "
            "splits, such as 'tfds:NAME?train=train&validation=test[:50%]&test=test[50%:]', or "
            "use the pipeline 'resident'"
        )
    if "test" not in splits:
        train = splits["train"]
        size = count(train)
        rest = size - held_count(size, TEST_SHARE)
        splits["train"] = cut(train, 0, rest)
        splits["test"] = cut(train, rest, size)
    if "validation" not in splits:
        train = splits["train"]
        size = count(train)
        held = held_count(size, validation)
        start = int(numpy_generator(seed, "validation split").integers(size - held + 1))
        before = cut(train, 0, start)
        splits["train"] = before + cut(train, start + held, size)
        splits["validation"] = cut(train, start, start + held)
    return splits
