"""Which part of a tfds dataset is used for training, validation and testing."""

from __future__ import annotations

from typing import Any, NamedTuple

from cnnjax.errors import UserError

SPLITS = ("train", "validation", "test")


class TfdsSpec(NamedTuple):
    """What stands after `tfds:`.

    Attributes:
      name: as tfds writes it: `mnist`, `mnist:3.0.1`, `imagenette/160px-v2:1.0.0`.
      splits: `train`, `validation`, `test` -> a tfds split with slices; only those that were given.
    """

    name: str
    splits: dict[str, str]


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
    return sum(stop - start for _, start, stop in _ranges(builder, split))


def _ranges(builder: Any, split: str) -> list[tuple[str, int, int]]:
    """(split, first, end) of each part of a tfds split with slices."""
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
    return [
        (part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
        for part in instructions
    ]


def _overlap(builder: Any, first: str, second: str) -> bool:
    return any(
        name == other and max(start, begin) < min(stop, end)
        for name, start, stop in _ranges(builder, first)
        for other, begin, end in _ranges(builder, second)
    )
