"""An ONNX graph while it is written: nodes and constants by name, and layouts of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.export.onnx_graph.values import (
    Axes,
    Constant,
    Dim,
    Tensor,
    Value,
    batches,
    completed,
    is_one,
    is_symbolic,
)


@dataclasses.dataclass
class Node:
    """One operator.

    Attributes:
      op: of ONNX.
      inputs: names of outputs and constants; "" for one that is left out.
      output: its name.
      attributes: of the operator.
      path: of the layer that it came from.
      lengths: of the output, as it lies in memory; () where no rewrite asks.
      count: how many elements each of the output is a sum of.
      image: of a pool, the lengths of its input.
      kernel_scale: of a layer whose weights are whole numbers times it, `[features]`; else None.
    """

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any]
    path: str = ""
    lengths: tuple[Dim, ...] = ()
    count: int = 1
    image: tuple[Dim, ...] = ()
    kernel_scale: np.ndarray | None = None


@dataclasses.dataclass
class Graph:
    """Nodes in the order of computation.

    Attributes:
      nodes: each with one output.
      constants: by name.
      path: of the layer whose nodes are being written.
      batch: the name of the input, whose first axis in memory is the number of images.
    """

    nodes: list[Node] = dataclasses.field(default_factory=list)
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    path: str = ""
    batch: str = ""
    _names: dict[str, int] = dataclasses.field(default_factory=dict)
    _arranged: dict[tuple[str, Axes, Axes], str] = dataclasses.field(default_factory=dict)
    _known: dict[Any, str] = dataclasses.field(default_factory=dict)

    def name(self, kind: str) -> str:
        """Returns a new name, such as `stage1/conv1/Conv`."""
        base = f"{self.path}/{kind}" if self.path else kind
        number = self._names.get(base, 0)
        self._names[base] = number + 1
        return f"{base}_{number}" if number else base

    def node(
        self, op: str, inputs: Sequence[str], lengths: Sequence[Dim] = (), **attributes: Any
    ) -> str:
        """Adds an operator and returns its output; attributes that are None are left out."""
        output = self.name(op)
        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(Node(op, list(inputs), output, given, self.path, tuple(lengths)))
        return output

    def constant(
        self,
        array: np.ndarray | np.generic | Sequence[int],
        kind: str = "constant",
        *,
        shared: bool = True,
    ) -> str:
        """Adds a constant and returns its name; small ones are kept once where they are shared."""
        if not isinstance(array, np.ndarray | np.generic):
            array = np.asarray(array, np.int64)
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        is_kept = shared and array.size <= 4096
        key = (str(array.dtype), array.shape, array.tobytes()) if is_kept else None
        if key in self._known and key is not None:
            return self._known[key]
        name = self.name(kind)
        self.constants[name] = array
        if key is not None:
            self._known[key] = name
        return name

    def forget(self) -> None:
        """Forgets what was written before, so that nothing which was dropped is used again."""
        self._known.clear()
        self._arranged.clear()

    # Layouts.

    def arranged(self, value: Value, order: Axes) -> str:
        """Returns the name of a value whose axes lie in this order; lengths of 1 stay so."""
        if isinstance(value, Constant):
            return self.constant(arranged_array(value.array, order))
        key = (value.name, value.axes, order)
        if key not in self._arranged:
            self._arranged[key] = self._move(value, order)
        return self._arranged[key]

    def _move(self, value: Tensor, order: Axes) -> str:
        real = [a for a in value.axes if a is not None and not is_one(value.sizes[a])]
        wanted = [a for a in order if a in real]
        name, axes = value.name, value.axes
        if real != wanted:
            if len(axes) == len(order):
                # Axes of length 1 are interchangeable.
                units = [p for p, a in enumerate(axes) if a not in real]
                places = [axes.index(a) if a in real else units.pop(0) for a in order]
                lengths = value.lengths()
                return self.node(
                    "Transpose", [name], perm=places, lengths=[lengths[p] for p in places]
                )
            name = self._lengths(name, value, tuple(real), axes)
            lengths = tuple(value.sizes[axis] for axis in wanted)
            places = [real.index(axis) for axis in wanted]
            name = self.node("Transpose", [name], perm=places, lengths=lengths)
            axes = tuple(wanted)
        there = tuple(a if a in real else None for a in axes)
        if there == tuple(a if a in real else None for a in order):
            return name
        return self._lengths(name, value, order, axes)

    def _lengths(self, name: str, value: Tensor, order: Axes, axes: Axes) -> str:
        """Changes which axes of length 1 there are."""
        sizes = [1 if a is None else value.sizes[a] for a in order]
        return self.reshape(name, sizes, [1 if a is None else value.sizes[a] for a in axes])

    def reshape(self, name: str, sizes: Sequence[Dim], before: Sequence[Dim]) -> str:
        """Adds a Reshape to sizes of which at most one is symbolic."""
        if list(sizes) == list(before):
            return name
        return self.node("Reshape", [name, self.constant(target_sizes(sizes))])

    def shape_of(self, sizes: Sequence[Dim]) -> str:
        """Returns the name of a vector of lengths, symbolic ones computed from the input."""
        if not any(map(is_symbolic, sizes)):
            return self.constant([int(dim) for dim in sizes])
        parts = [self.length(dim) if is_symbolic(dim) else self.constant([dim]) for dim in sizes]
        return parts[0] if len(parts) == 1 else self.node("Concat", parts, axis=0)

    def length(self, dim: Dim) -> str:
        """Returns the name of a vector of one symbolic length."""
        factor, offset = batches(dim)
        key = ("length", factor, offset)
        if key not in self._known:
            if ("length", 1, 0) not in self._known:
                whole = self.node("Shape", [self.batch])
                one = self.node("Slice", [whole, self.constant([0]), self.constant([1])])
                self._known["length", 1, 0] = one
            name = self._known["length", 1, 0]
            if factor != 1:
                name = self.node("Mul", [name, self.constant([factor])])
            if offset:
                name = self.node("Add", [name, self.constant([offset])])
            self._known[key] = name
        return self._known[key]

    def whole(self, value: Value) -> Tensor:
        """Returns the value as a tensor in which no axis is shorter than JAX sees it."""
        if isinstance(value, Constant):
            rank = len(value.shape)
            value = Tensor(
                self.constant(value.array),
                tuple(range(rank)),
                value.shape,
                value.sizes,
                value.dtype,
            )
        short = [
            axis
            for axis, (size, dim) in enumerate(zip(value.sizes, value.shape, strict=True))
            if is_one(size) and not is_one(dim)
        ]
        if not short:
            return value
        order = completed_for(value, short)
        name = self.arranged(value, order)
        sizes = [1 if axis is None else value.shape[axis] for axis in order]
        name = self.node("Expand", [name, self.shape_of(sizes)])
        return Tensor(name, order, value.shape, value.shape, value.dtype)


def completed_for(value: Tensor, short: Sequence[int]) -> Axes:
    """Returns the order of a tensor with the axes `short` among it."""
    needed = [axis in short or axis in value.axes for axis in range(len(value.shape))]
    return completed(value, len(value.shape), needed)


def arranged_array(array: np.ndarray, order: Axes, *, whole: bool = False) -> np.ndarray:
    """Returns a constant with its axes in this order; `whole` keeps leading axes of length 1."""
    present = [axis for axis in order if axis is not None]
    absent = [axis for axis in range(array.ndim) if axis not in present]
    array = array.transpose(*absent, *present)
    array = array.reshape(array.shape[len(absent) :])
    shape = iter(array.shape)
    array = array.reshape([1 if axis is None else next(shape) for axis in order])
    while not whole and array.ndim and array.shape[0] == 1:
        array = array[0]
    return array


def target_sizes(sizes: Sequence[Dim]) -> list[int]:
    """Returns the sizes for a Reshape: -1 for the symbolic one.

    Raises:
      UserError: more than one is symbolic.
    """
    if sum(map(is_symbolic, sizes)) > 1:
        raise UserError(f"a reshape to {tuple(sizes)}: fix the number of images by --batch.")
    return [-1 if is_symbolic(dim) else int(dim) for dim in sizes]
