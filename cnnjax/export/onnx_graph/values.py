"""Arrays of a program while it is written as an ONNX graph: constants, and tensors in any layout.

JAX's networks have the channels last, ONNX's convolutions have them second. Instead of a Transpose
before and after each convolution, a tensor carries the order in which its axes lie: elementwise
functions, pools, concatenations and sums work on whatever order there is, `transpose` only renames
axes, and a Transpose is written only where an operator asks for another order than there is.

Broadcasting is as lazy: an axis along which all is the same keeps length 1 until an operator needs
it whole, as ONNX's elementwise operators broadcast by themselves.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# A length: an int, or a symbolic dimension of `jax.export`.
Dim = Any
# For each axis in memory: the axis of the array that it is, None for one of length 1 that is none.
Axes = tuple[int | None, ...]
# How `jax.export` writes a symbolic length: `batch`, `49*batch`, `batch + 1`.
_LINEAR = re.compile(r"(?:(?P<factor>\d+)\*)?[a-z]\w*(?P<offset> [+-] \d+)?")


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that does not depend on the images.

    Attributes:
      array: of as many axes as `shape`; along each it is as long as `shape`, or 1.
      shape: that JAX sees, perhaps with symbolic lengths.
    """

    array: np.ndarray
    shape: tuple[Dim, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def sizes(self) -> tuple[Dim, ...]:
        return self.array.shape

    def scalar(self) -> Any:
        """Returns the one value that all elements have; None where they differ."""
        flat = self.array.reshape(-1)
        return flat[0].item() if flat.size and (flat == flat[0]).all() else None

    def whole(self) -> np.ndarray:
        """Returns the array in full; TypeError where a length is symbolic."""
        return np.broadcast_to(self.array, [int(dim) for dim in self.shape])


@dataclasses.dataclass(frozen=True)
class Weights(Constant):
    """A kernel, float32, that is whole numbers times a scale for each output channel.

    Attributes:
      scale: float32 `[features]`, of the last axis.
    """

    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that depends on the images: an output of a node, or the input.

    Attributes:
      name: in the graph.
      axes: the order in memory; axes of length 1 may be absent.
      shape: that JAX sees.
      sizes: the lengths that there are, of each axis of `shape`: as in `shape`, or 1.
      dtype: of the elements.
    """

    name: str
    axes: Axes
    shape: tuple[Dim, ...]
    sizes: tuple[Dim, ...]
    dtype: np.dtype

    def lengths(self) -> tuple[Dim, ...]:
        """Returns the shape in memory."""
        return tuple(1 if axis is None else self.sizes[axis] for axis in self.axes)


Value = Constant | Tensor


def is_one(dim: Dim) -> bool:
    """Whether a length is 1; a symbolic one is not."""
    return isinstance(dim, int) and dim == 1


def is_symbolic(dim: Dim) -> bool:
    """Whether a length depends on the number of images."""
    return not isinstance(dim, int | np.integer)


def batches(dim: Dim) -> tuple[int, int]:
    """Returns (factor, offset) of a symbolic length `factor * batch + offset`.

    Raises:
      ValueError: a length of another kind.
    """
    found = _LINEAR.fullmatch(str(dim))
    if not found:
        raise ValueError(f"a length of {dim}")
    offset = (found["offset"] or "0").replace(" ", "")
    return int(found["factor"] or 1), int(offset)


def numbers(shape: Sequence[Dim], batch: int = 97) -> list[int]:
    """Returns the shape for a number of images that no network's sizes have by chance."""
    result = []
    for dim in shape:
        if is_symbolic(dim):
            factor, offset = batches(dim)
            dim = factor * batch + offset
        result.append(int(dim))
    return result


def completed(lead: Tensor, rank: int, needed: Sequence[bool]) -> Axes:
    """Returns an order of all the axes that are needed, as near to that of `lead` as there is.

    Args:
      lead: the tensor that should not be moved.
      rank: of the result.
      needed: whether an axis is longer than 1 in any operand.
    """
    missing = [axis for axis in range(rank) if needed[axis] and axis not in lead.axes]
    order: list[int | None] = list(lead.axes)
    for axis in missing:
        if None in order:
            order[order.index(None)] = axis
        else:
            # Before the first that comes after it, so that an unmoved order stays sorted.
            after = [p for p, other in enumerate(order) if other is not None and other > axis]
            order.insert(after[0] if after else len(order), axis)
    return tuple(order)
