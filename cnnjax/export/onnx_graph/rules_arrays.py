"""Rules of primitives that move, join, cut and sum arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnnjax.export.onnx_graph.graph import target_sizes
from cnnjax.export.onnx_graph.lowering import Context, rule
from cnnjax.export.onnx_graph.values import (
    Axes,
    Constant,
    Tensor,
    Value,
    completed,
    is_one,
    is_symbolic,
    numbers,
)

REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}
# ONNX's last index, which Slice cuts to what there is.
END = 2**62


def _renamed(axes: Axes, new: Sequence[int | None]) -> Axes:
    """Returns the axes with axis `a` called `new[a]`."""
    return tuple(None if axis is None else new[axis] for axis in axes)


# Shapes.


@rule("broadcast_in_dim")
def _broadcast(context: Context, value: Value, *lengths: Value) -> Value:
    shape, places = context.shape, context.params["broadcast_dimensions"]
    sizes: list[Any] = [1] * len(shape)
    for axis, place in enumerate(places):
        sizes[place] = value.sizes[axis]
    if isinstance(value, Constant):
        return Constant(value.array.reshape(sizes), shape)
    return Tensor(value.name, _renamed(value.axes, places), shape, tuple(sizes), value.dtype)


@rule("transpose")
def _transpose(context: Context, value: Value) -> Value:
    order = context.params["permutation"]
    if isinstance(value, Constant):
        return Constant(value.array.transpose(order), context.shape)
    axes = _renamed(value.axes, [order.index(axis) for axis in range(len(order))])
    sizes = tuple(value.sizes[axis] for axis in order)
    return Tensor(value.name, axes, context.shape, sizes, value.dtype)


@rule("squeeze")
def _squeeze(context: Context, value: Value) -> Value:
    gone = {axis % len(value.shape) for axis in context.params["dimensions"]}
    kept = [axis for axis in range(len(value.shape)) if axis not in gone]
    sizes = tuple(value.sizes[axis] for axis in kept)
    if isinstance(value, Constant):
        return Constant(value.array.reshape(sizes), context.shape)
    new = [kept.index(axis) if axis in kept else None for axis in range(len(value.shape))]
    return Tensor(value.name, _renamed(value.axes, new), context.shape, sizes, value.dtype)


@rule("reshape")
def _reshape(context: Context, value: Value, *lengths: Value) -> Value:
    if context.params.get("dimensions") is not None:
        raise context.unsupported("in another order of axes")
    if isinstance(value, Constant):
        if all(map(is_one, value.sizes)):
            return Constant(value.array.reshape((1,) * len(context.shape)), context.shape)
        if not any(map(is_symbolic, context.shape)):
            return Constant(value.whole().reshape(context.shape), context.shape)
    return reshaped(context, context.graph.whole(value), context.shape)


def reshaped(context: Context, value: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Returns a whole tensor in another shape; axes that are neither cut nor joined do not move."""
    before = [axis for axis, dim in enumerate(value.shape) if not is_one(dim)]
    after = [axis for axis, dim in enumerate(shape) if not is_one(dim)]
    groups = _groups(
        numbers([value.shape[axis] for axis in before]), numbers([shape[axis] for axis in after])
    )
    groups = [([before[i] for i in old], [after[i] for i in new]) for old, new in groups]
    if all(len(old) == len(new) == 1 for old, new in groups):
        new_name = {old[0]: new[0] for old, new in groups}
        axes = tuple(new_name.get(axis) if axis is not None else None for axis in value.axes)
        return Tensor(value.name, axes, shape, shape, value.dtype)
    real = [axis for axis in value.axes if axis is not None and axis in before]
    order = _order_of_groups(real, groups)
    if order is None:
        real, order = before, list(range(len(groups)))
    name = context.graph.arranged(value, tuple(real))
    after = [axis for group in order for axis in groups[group][1]]
    sizes = [shape[axis] for axis in after]
    name = context.graph.reshape(name, sizes, [value.shape[axis] for axis in real])
    return Tensor(name, tuple(after), shape, shape, value.dtype)


def _groups(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Returns which positions become which: the smallest groups of equal products, in order."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = [i], [j]
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                old.append(i)
                left, i = left * before[i], i + 1
            else:
                new.append(j)
                right, j = right * after[j], j + 1
        groups.append((old, new))
    return groups


def _order_of_groups(
    real: list[int], groups: Sequence[tuple[list[int], list[int]]]
) -> list[int] | None:
    """Returns the groups as they lie in memory; None where the axes of one do not lie together."""
    order, rest = [], list(real)
    while rest:
        number = next(n for n, (old, _) in enumerate(groups) if rest[0] in old)
        old = groups[number][0]
        if rest[: len(old)] != old:
            return None
        order.append(number)
        rest = rest[len(old) :]
    return order


# Parts.


def _cut(
    context: Context,
    value: Tensor,
    cuts: Sequence[tuple[int, Any, Any, int]],
    shape: tuple[Any, ...],
) -> Tensor:
    """Returns a part; `cuts` are (axis, start, stop, step)."""
    sizes = tuple(1 if is_one(size) else dim for size, dim in zip(value.sizes, shape, strict=True))
    cuts = [cut for cut in cuts if not is_one(value.sizes[cut[0]])]
    if not cuts:
        return Tensor(value.name, value.axes, shape, sizes, value.dtype)
    graph = context.graph
    columns = [
        [value.axes.index(cut[0]) if which == 0 else cut[which] for cut in cuts]
        for which in (1, 2, 0, 3)
    ]
    starts, stops, axes, steps = columns
    inputs = [graph.shape_of(starts), graph.shape_of(stops)]
    inputs += [graph.constant(axes), graph.constant(steps)]
    name = graph.node("Slice", [value.name, *inputs])
    return Tensor(name, value.axes, shape, sizes, value.dtype)


def _tensor(context: Context, value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else context.graph.whole(value)


@rule("slice")
def _slice(context: Context, value: Value) -> Value:
    params = context.params
    starts, stops = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    cuts = [
        (axis, start, stop, step)
        for axis, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True))
        if not (start == 0 and stop == value.shape[axis] and step == 1)
    ]
    return _cut(context, _tensor(context, value), cuts, context.shape)


@rule("dynamic_slice")
def _dynamic_slice(context: Context, value: Value, *starts: Value) -> Value:
    value, cuts = _tensor(context, value), []
    for axis, (start, size) in enumerate(zip(starts, context.params["slice_sizes"], strict=True)):
        if size == value.shape[axis]:
            continue
        if not isinstance(start, Constant) or is_symbolic(value.shape[axis]):
            raise context.unsupported("from a place that depends on the images")
        first = min(max(int(start.array), 0), value.shape[axis] - size)
        cuts.append((axis, first, first + size, 1))
    return _cut(context, value, cuts, context.shape)


@rule("split")
def _split(context: Context, value: Value) -> list[Value]:
    axis, sizes = context.params["axis"], context.params["sizes"]
    value, parts, start = _tensor(context, value), [], 0
    for size in sizes:
        shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
        parts.append(_cut(context, value, [(axis, start, start + size, 1)], shape))
        start += size
    return list(parts)


@rule("rev")
def _rev(context: Context, value: Value) -> Value:
    cuts = [(axis, -1, -END, -1) for axis in context.params["dimensions"]]
    return _cut(context, _tensor(context, value), cuts, context.shape)


@rule("gather")
def _gather(context: Context, value: Value, where: Value) -> Value:
    numbers_, sizes = context.params["dimension_numbers"], context.params["slice_sizes"]
    tensor, rank = context.graph.whole(value), len(value.shape)
    if not isinstance(where, Constant) or numbers_.operand_batching_dims:
        raise context.unsupported("at places that depend on the images")
    indices = np.asarray(where.whole(), np.int64)
    batch = [n for n in range(len(context.shape)) if n not in numbers_.offset_dims]
    offsets = iter(numbers_.offset_dims)
    new = [None if axis in numbers_.collapsed_slice_dims else next(offsets) for axis in range(rank)]
    taken: set[int] = set()
    for axis in range(rank):
        if axis in numbers_.start_index_map:
            places = indices[..., numbers_.start_index_map.index(axis)]
            along = [n for n in range(places.ndim) if (np.diff(places, axis=n) != 0).any()]
            if len(along) > 1 or taken & set(along) or (along and sizes[axis] != 1):
                raise context.unsupported("other than a grid of places")
            taken |= set(along)
            start = places.min() if along else int(places.reshape(-1)[0])
            vector = start + np.arange(sizes[axis])
            if along:
                vector = np.moveaxis(places, along[0], 0).reshape(places.shape[along[0]], -1)[:, 0]
                new[axis] = batch[along[0]]
            tensor = _taken(context, tensor, axis, vector)
        elif sizes[axis] != value.shape[axis]:
            tensor = _taken(context, tensor, axis, np.arange(sizes[axis]))
    if any(not is_one(context.shape[batch[n]]) and n not in taken for n in range(len(batch))):
        raise context.unsupported("of one place many times")
    sizes = context.shape
    return Tensor(tensor.name, _renamed(tensor.axes, new), sizes, sizes, value.dtype)


def _taken(context: Context, value: Tensor, axis: int, places: np.ndarray) -> Tensor:
    """Returns the places along one axis; as a Slice where they are evenly spaced."""
    if is_symbolic(value.shape[axis]):
        raise context.unsupported("of images")
    length = value.shape[axis]
    places = np.clip(places, 0, length - 1)
    if np.array_equal(places, np.arange(length)):
        return value
    shape = (*value.shape[:axis], len(places), *value.shape[axis + 1 :])
    if is_one(length) and len(places) == 1:
        return value
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    if step > 0 and (np.diff(places) == step).all():
        cut = (axis, int(places[0]), int(places[-1]) + 1, step)
        return _cut(context, value, [cut], shape)
    order = completed(value, len(shape), [a == axis or a in value.axes for a in range(len(shape))])
    name = context.graph.arranged(value, order)
    inputs = [name, context.graph.constant(places)]
    name = context.graph.node("Gather", inputs, axis=order.index(axis))
    return Tensor(name, order, shape, shape, value.dtype)


# Joins.


@rule("concatenate")
def _concatenate(context: Context, *values: Value) -> Value:
    graph, along = context.graph, context.params["dimension"]
    values = tuple(v for v in values if is_symbolic(v.shape[along]) or v.shape[along] != 0)
    if len(values) == 1:
        return values[0]
    tensors = [graph.whole(value) for value in values]
    lead = max(
        (whole for whole, value in zip(tensors, values, strict=True) if isinstance(value, Tensor)),
        key=lambda tensor: math.prod(numbers(tensor.shape)),
    )
    rank = len(context.shape)
    needed = [axis == along or not is_one(dim) for axis, dim in enumerate(context.shape)]
    order = completed(lead, rank, needed)
    names = [graph.arranged(tensor, order) for tensor in tensors]
    name = graph.node("Concat", names, axis=order.index(along))
    return Tensor(name, order, context.shape, context.shape, context.dtype)


@rule("pad")
def _pad(context: Context, value: Value, fill: Value) -> Value:
    graph, config = context.graph, context.params["padding_config"]
    if not isinstance(fill, Constant) or any(between for _, _, between in config):
        raise context.unsupported("between elements, or by what depends on the images")
    tensor = graph.whole(value)
    shape = tuple(
        dim + min(low, 0) + min(high, 0)
        for dim, (low, high, _) in zip(tensor.shape, config, strict=True)
    )
    cuts = [
        (axis, max(-low, 0), tensor.shape[axis] + min(high, 0), 1)
        for axis, (low, high, _) in enumerate(config)
        if low < 0 or high < 0
    ]
    tensor = _cut(context, tensor, cuts, shape)
    padded = [low > 0 or high > 0 for low, high, _ in config]
    if not any(padded):
        return tensor
    rank = len(shape)
    needed = [padded[axis] or axis in tensor.axes for axis in range(rank)]
    order = completed(tensor, rank, needed)
    lows = [0 if axis is None else max(config[axis][0], 0) for axis in order]
    highs = [0 if axis is None else max(config[axis][1], 0) for axis in order]
    number = graph.constant(np.asarray(fill.scalar(), value.dtype))
    name = graph.arranged(tensor, order)
    name = graph.node("Pad", [name, graph.constant([*lows, *highs]), number])
    return Tensor(name, order, context.shape, context.shape, value.dtype)


# Sums over axes.


@rule(*REDUCTIONS)
def _reduce(context: Context, value: Value) -> Value:
    return reduced(context, REDUCTIONS[context.primitive], value, context.params["axes"])


def reduced(
    context: Context, op: str, value: Value, axes: Sequence[int], **attributes: Any
) -> Tensor:
    """Writes a reduction over axes; they stay in memory with length 1."""
    tensor = context.graph.whole(value)
    gone = sorted({axis % len(tensor.shape) for axis in axes})
    kept = [axis for axis in range(len(tensor.shape)) if axis not in gone]
    places = [tensor.axes.index(axis) for axis in gone if not is_one(tensor.shape[axis])]
    places.sort()
    name = tensor.name
    if places or op.startswith("Arg"):
        if op.startswith("Arg"):
            order = completed(
                tensor,
                len(tensor.shape),
                [axis in tensor.axes or axis in gone for axis in range(len(tensor.shape))],
            )
            name, tensor = context.graph.arranged(tensor, order), _in(tensor, order)
            name = context.graph.node(op, [name], axis=order.index(gone[0]), keepdims=1)
        elif op == "ReduceSum":
            lengths = list(tensor.lengths())
            count = math.prod(lengths[place] for place in places if not is_symbolic(lengths[place]))
            for place in places:
                lengths[place] = 1
            inputs = [name, context.graph.constant(places)]
            name = context.graph.node(op, inputs, lengths, keepdims=1)
            context.graph.nodes[-1].count = count
        else:
            name = context.graph.node(op, [name], axes=places, keepdims=1)
    new = [kept.index(axis) if axis in kept else None for axis in range(len(tensor.shape))]
    shape = tuple(tensor.shape[axis] for axis in kept)
    return Tensor(name, _renamed(tensor.axes, new), shape, shape, context.dtype)


def _in(tensor: Tensor, order: Axes) -> Tensor:
    return Tensor(tensor.name, order, tensor.shape, tensor.sizes, tensor.dtype)


@rule("argmax", "argmin")
def _argmax(context: Context, value: Value) -> Value:
    from onnx import helper

    op = "ArgMax" if context.primitive == "argmax" else "ArgMin"
    result = reduced(context, op, value, context.params["axes"])
    to = helper.np_dtype_to_tensor_dtype(context.dtype)
    name = context.graph.node("Cast", [result.name], to=to)
    return Tensor(name, result.axes, result.shape, result.sizes, context.dtype)


@rule("cumsum")
def _cumsum(context: Context, value: Value) -> Value:
    axis, tensor = context.params["axis"], context.graph.whole(value)
    if is_one(tensor.shape[axis]):
        return tensor
    place = context.graph.constant(np.asarray(tensor.axes.index(axis), np.int64))
    reverse = int(context.params["reverse"])
    name = context.graph.node("CumSum", [tensor.name, place], reverse=reverse)
    return Tensor(name, tensor.axes, tensor.shape, tensor.shape, value.dtype)


@rule("iota")
def _iota(context: Context) -> Value:
    raise context.unsupported(f"of {target_sizes(context.shape)}")
