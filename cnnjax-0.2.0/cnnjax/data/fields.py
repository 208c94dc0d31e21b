"""Fields of a batch: how each key is checked, padded and augmented.

A dataset is a dict of arrays whose first axis is the examples, with one field a key. A batch is a
dict of the same keys, and `mask [batch]` bool (False: padding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from cnnjax.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True)
class Field:
    """A key of a batch.

    Attributes:
      is_input: what the model gets, rather than what it is to find. Evaluation keeps all of an
        example but its inputs, of which it keeps those of the first examples.
      moves: how geometric augmentation changes it: "image" (interpolated), "class_map" (nearest
        neighbor, what comes from outside gets `padding`), "boxes", or "" (it does not).
      padding: the value of examples (and of places within an example) that are not there.
    """

    is_input: ClassVar[bool] = False
    moves: ClassVar[str] = ""

    @property
    def padding(self) -> float:
        return 0

    def check(self, name: str, array: np.ndarray) -> None:
        """Raises a UserError unless the array `[examples, ...]` is what the field says."""


@dataclasses.dataclass(frozen=True)
class Image(Field):
    """Images `[examples, height, width, channels]`: uint8, or float in [0, 1]."""

    is_input: ClassVar[bool] = True
    moves: ClassVar[str] = "image"

    def check(self, name: str, array: np.ndarray) -> None:
        if array.ndim != 4 or not (array.dtype == np.uint8 or array.dtype == np.float32):
            raise wrong(name, array, "uint8, or float32 in [0, 1], [n, height, width, channels]")
        if array.dtype == np.float32 and array.size and not 0 <= array.min() <= array.max() <= 1:
            raise UserError(
                f"{name} has values from {array.min():g} to {array.max():g}: give float32 in "
                "[0, 1], or uint8."
            )


@dataclasses.dataclass(frozen=True)
class Label(Field):
    """One class an example: int32 `[examples]` in `[0, num_classes)`."""

    num_classes: int

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.int32 or array.ndim != 1:
            raise wrong(name, array, "int32 [n]")
        check_range(name, array, self.num_classes)


@dataclasses.dataclass(frozen=True)
class ClassMap(Field):
    """One class a pixel: uint8 `[examples, height, width]`; `ignore` marks pixels without one."""

    num_classes: int
    ignore: int = 255
    moves: ClassVar[str] = "class_map"

    @property
    def padding(self) -> float:
        return self.ignore

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.uint8 or array.ndim != 3:
            raise wrong(name, array, "uint8 [n, height, width]")
        check_range(name, array[array != self.ignore], self.num_classes)


@dataclasses.dataclass(frozen=True)
class Boxes(Field):
    """At most `max` boxes an example: float32 `[examples, max, 4]`.

    A box is (top, left, bottom, right) in pixels; a row of which the bottom is not below the top is
    no box. Their classes are a key of their own, of `Tokens`.
    """

    max: int
    moves: ClassVar[str] = "boxes"

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.float32 or array.shape[1:] != (self.max, 4):
            raise wrong(name, array, f"float32 [n, {self.max}, 4]")


@dataclasses.dataclass(frozen=True)
class Tokens(Field):
    """Integers in `[0, size)`, `length` an example: int32 `[examples, length]`; 0 is padding."""

    size: int
    length: int
    is_input: ClassVar[bool] = True

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.int32 or array.shape[1:] != (self.length,):
            raise wrong(name, array, f"int32 [n, {self.length}]")
        check_range(name, array, self.size)


@dataclasses.dataclass(frozen=True)
class Waveform(Field):
    """Samples in [-1, 1]: float32 `[examples, length, channels]`."""

    is_input: ClassVar[bool] = True

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.float32 or array.ndim != 3:
            raise wrong(name, array, "float32 [n, length, channels]")


@dataclasses.dataclass(frozen=True)
class Scalar(Field):
    """One number an example: float32 `[examples]`."""

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.float32 or array.ndim != 1:
            raise wrong(name, array, "float32 [n]")


def check_examples(
    arrays: Mapping[str, np.ndarray], fields: Mapping[str, Field], split: str
) -> None:
    """Raises a UserError unless the arrays are what the fields say, and as many examples each."""
    for name in fields:
        if name not in arrays:
            raise unknown_name(f"key of {split}", name, list(arrays))
    lengths = {name: len(arrays[name]) for name in fields}
    if len(set(lengths.values())) > 1:
        raise UserError(
            f"the keys of {split} have different numbers of examples "
            f"({', '.join(f'{name} {length}' for name, length in lengths.items())}): give one of "
            "each for every example."
        )
    for name, field in fields.items():
        field.check(f"{name} of {split}", arrays[name])


def check_range(name: str, values: np.ndarray, size: int) -> None:
    """Raises a UserError unless all values are in `[0, size)`."""
    if values.size and not 0 <= values.min() <= values.max() < size:
        raise UserError(
            f"{name} runs from {values.min()} to {values.max()}: it must lie in 0..{size - 1}."
        )


def wrong(name: str, array: Any, expected: str) -> UserError:
    """Returns the error for an array of another dtype or shape than its field says."""
    return UserError(f"{name} is {array.dtype} {list(array.shape)}: give {expected}.")
