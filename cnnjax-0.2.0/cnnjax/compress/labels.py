"""Which channels of an array are which: labels on axes, and the labels that are one and the same.

A channel has a number. An axis whose entries are channels has an array of these numbers; an axis of
positions or examples has none. A class of numbers is what can only be removed together. Number 0
stands for what cannot be removed, so whatever is joined with it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# axis -> the number of each of its entries.
Labels = Mapping[int, np.ndarray]
FIXED = 0


class Classes:
    """Numbers in classes: `new` makes numbers, `join` makes two classes one."""

    def __init__(self) -> None:
        self._parent: list[int] = [FIXED]

    def new(self, count: int) -> np.ndarray:
        """Returns `count` numbers, each a class of its own."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        """Returns the number that stands for a class: 0 for what cannot be removed."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the root of each number, in the same shape."""
        unique, inverse = np.unique(numbers, return_inverse=True)
        found = np.array([self.root(int(number)) for number in unique], dtype=np.int64)
        return found[inverse].reshape(numbers.shape)

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Makes one class of each pair of numbers; the arrays have the same shape."""
        for first, second in {*zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)}:
            low, high = sorted((self.root(first), self.root(second)))
            self._parent[high] = low

    def fix(self, numbers: np.ndarray) -> None:
        """Says that these cannot be removed."""
        self.join(numbers, np.zeros_like(numbers))


def fix_all(classes: Classes, values: Iterable[Labels]) -> None:
    """Fixes every channel of some arrays."""
    for labels in values:
        for numbers in labels.values():
            classes.fix(numbers)


def fixed(shape: Sequence[int]) -> Labels:
    """Returns the labels of an array none of whose entries can be removed."""
    return {axis: np.zeros(size, dtype=np.int64) for axis, size in enumerate(shape) if size > 1}


def merged(classes: Classes, values: Sequence[Labels]) -> Labels:
    """Returns the labels of what is computed entry by entry from arrays of one shape."""
    result: dict[int, np.ndarray] = {}
    for labels in values:
        for axis, numbers in labels.items():
            if axis in result:
                classes.join(result[axis], numbers)
            result.setdefault(axis, numbers)
    return result


def without(classes: Classes, labels: Labels, axes: Iterable[int]) -> Labels:
    """Fixes the channels along some axes, over which something is computed; the rest stays."""
    gone = set(axes)
    fix_all(classes, [{axis: numbers for axis, numbers in labels.items() if axis in gone}])
    return {axis: numbers for axis, numbers in labels.items() if axis not in gone}


def reduced(classes: Classes, labels: Labels, axes: Iterable[int]) -> Labels:
    """Returns the labels when these axes have been reduced away."""
    gone = set(axes)
    kept = without(classes, labels, gone)
    return {axis - sum(a < axis for a in gone): numbers for axis, numbers in kept.items()}


def part(classes: Classes, numbers: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns the labels of a slice of an axis.

    Of one of several equal pieces: those lose the same channels, so that they stay equal, as code
    that divides by a number of pieces expects. Other cuts fix the axis.
    """
    size = stop - start
    if size == len(numbers):
        return numbers
    if size and len(numbers) % size == 0 and start % size == 0:
        tie(classes, numbers, len(numbers) // size)
    else:
        classes.fix(numbers)
    return numbers[start:stop]


def tie(classes: Classes, numbers: np.ndarray, pieces: int) -> None:
    """Lets equal pieces of an axis lose the same channels only."""
    rows = numbers.reshape(pieces, -1)
    for row in rows[1:]:
        classes.join(rows[0], row)


def joined(classes: Classes, values: Sequence[Labels], sizes: Sequence[int], axis: int) -> Labels:
    """Returns the labels of arrays put one behind the other along an axis."""
    others = [{a: n for a, n in labels.items() if a != axis} for labels in values]
    result = dict(merged(classes, others))
    if any(axis in labels for labels in values):
        pieces = [
            labels.get(axis, np.zeros(size, dtype=np.int64))
            for labels, size in zip(values, sizes, strict=True)
        ]
        result[axis] = np.concatenate(pieces)
    return result


def reshaped(
    classes: Classes, labels: Labels, shape: Sequence[int], new_shape: Sequence[int]
) -> Labels:
    """Returns the labels of an array in another shape.

    Axes that become one keep their labels, each as often as it is there. An axis that becomes
    several, such as groups and the channels of each, loses the same channels in every group.
    """
    result: dict[int, np.ndarray] = {}
    for old, new in _matching_axes(shape, new_shape):
        inside = {axis: labels[axis] for axis in old if axis in labels}
        if not inside:
            continue
        if len(inside) > 1:
            # Each entry is of two channels at once.
            fix_all(classes, [inside])
            result |= {axis: np.zeros(new_shape[axis], np.int64) for axis in new}
            continue
        ((axis, numbers),) = inside.items()
        spread = [1] * len(old)
        spread[old.index(axis)] = shape[axis]
        whole = np.broadcast_to(numbers.reshape(spread), [shape[a] for a in old])
        whole = classes.roots(np.ascontiguousarray(whole)).reshape([new_shape[a] for a in new])
        along = _varying(whole)
        if len(along) > 1:
            last = along[-1]
            pieces = np.moveaxis(whole, last, -1).reshape(-1, whole.shape[last])
            for piece in pieces[1:]:
                classes.join(pieces[0], piece)
            along = [last]
        if not along:  # All of one class.
            along = [int(np.argmax(whole.shape))] if whole.size > 1 else []
        for place in along:
            result[new[place]] = np.moveaxis(whole, place, 0).reshape(whole.shape[place], -1)[:, 0]
    return result


def _varying(numbers: np.ndarray) -> list[int]:
    """Returns the axes along which an array is not the same everywhere."""
    return [
        axis
        for axis in range(numbers.ndim)
        if not np.array_equal(np.broadcast_to(numbers.take([0], axis), numbers.shape), numbers)
    ]


def _matching_axes(
    shape: Sequence[int], new_shape: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Returns groups of axes of the old and the new shape that hold the same entries.

    Axes of size 1 hold nothing, and are in no group.
    """
    old = [axis for axis, size in enumerate(shape) if size != 1]
    new = [axis for axis, size in enumerate(new_shape) if size != 1]
    groups = []
    while old or new:
        left, right = [old.pop(0)], [new.pop(0)]
        while True:
            before = math.prod(shape[axis] for axis in left)
            after = math.prod(new_shape[axis] for axis in right)
            if before == after:
                break
            if before < after:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        groups.append((left, right))
    return groups
