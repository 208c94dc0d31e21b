"""Rules of convolutions, matrix products and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from cnnjax.export.onnx_graph.graph import arranged_array
from cnnjax.export.onnx_graph.lowering import Context, rule
from cnnjax.export.onnx_graph.rules_arrays import _cut, reshaped
from cnnjax.export.onnx_graph.rules_elementwise import elementwise
from cnnjax.export.onnx_graph.values import (
    Axes,
    Constant,
    Tensor,
    Value,
    Weights,
    is_one,
)

Pads = Sequence[tuple[int, int]]


@rule("conv_general_dilated")
def _convolution(context: Context, image: Value, kernel: Value) -> Value:
    params, specs = context.params, context.params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise context.unsupported("of groups of images")
    graph, groups = context.graph, params["feature_group_count"]
    lhs = graph.whole(image)
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    pads = params["padding"]
    if any(between != 1 for between in params["lhs_dilation"]):
        return _transposed(context, lhs, kernel)
    if min(side for pair in pads for side in pair) < 0:
        lhs, pads = _without_negative(context, lhs, specs.lhs_spec[2:], pads)
    attributes = {
        "group": groups if groups > 1 else None,
        "strides": strides,
        "dilations": dilations if set(dilations) != {1} else None,
        "pads": _ends(pads),
    }
    order = tuple(specs.rhs_spec)
    if isinstance(kernel, Constant):
        weights = graph.constant(arranged_array(kernel.whole(), order, whole=True), "kernel")
    else:
        weights = graph.arranged(graph.whole(kernel), order)
    name = graph.node("Conv", [graph.arranged(lhs, tuple(specs.lhs_spec)), weights], **attributes)
    if isinstance(kernel, Weights) and order[0] == len(order) - 1:
        graph.nodes[-1].kernel_scale = kernel.scale
    return _result(context, name, tuple(specs.out_spec))


def _transposed(context: Context, lhs: Tensor, kernel: Value) -> Tensor:
    """A convolution of an image with zeros between its pixels is ONNX's ConvTranspose."""
    params, specs = context.params, context.params["dimension_numbers"]
    dilations, groups = params["rhs_dilation"], params["feature_group_count"]
    if set(params["window_strides"]) != {1} or not isinstance(kernel, Constant):
        raise context.unsupported("with strides of image and window")
    weights = arranged_array(kernel.whole(), tuple(specs.rhs_spec), whole=True)
    out, within, *window = weights.shape
    weights = np.flip(weights, axis=tuple(range(2, weights.ndim)))
    weights = weights.reshape(groups, out // groups, within, *window).swapaxes(1, 2)
    weights = weights.reshape(groups * within, out // groups, *window)
    # What ConvTranspose takes away at the ends is what this one leaves out of the padding.
    reach = [(size - 1) * step for size, step in zip(window, dilations, strict=True)]
    cuts = [
        (far - low, far - high) for far, (low, high) in zip(reach, params["padding"], strict=True)
    ]
    graph = context.graph
    inputs = [graph.arranged(lhs, tuple(specs.lhs_spec)), graph.constant(weights, "kernel")]
    name = graph.node(
        "ConvTranspose",
        inputs,
        group=groups if groups > 1 else None,
        strides=params["lhs_dilation"],
        dilations=dilations if set(dilations) != {1} else None,
        pads=_ends([(max(low, 0), max(high, 0)) for low, high in cuts]),
    )
    margins = [(max(-low, 0), max(-high, 0)) for low, high in cuts]
    if any(side for pair in margins for side in pair):
        lows, highs = zip(*margins, strict=True)
        zero = graph.constant(np.zeros((), context.dtype))
        name = graph.node("Pad", [name, graph.constant([0, 0, *lows, 0, 0, *highs]), zero])
    return _result(context, name, tuple(specs.out_spec))


def _without_negative(
    context: Context, value: Tensor, axes: Sequence[int], pads: Pads
) -> tuple[Tensor, Pads]:
    """Cuts off what negative padding takes away; returns the padding that is left."""
    shape, cuts = list(value.shape), []
    for axis, (low, high) in zip(axes, pads, strict=True):
        start, stop = max(-low, 0), value.shape[axis] - max(-high, 0)
        if start or stop != value.shape[axis]:
            cuts.append((axis, start, stop, 1))
            shape[axis] = stop - start
    left = [(max(low, 0), max(high, 0)) for low, high in pads]
    return _cut(context, value, cuts, tuple(shape)), left


def _ends(pads: Pads) -> list[int] | None:
    """Returns all starts, then all ends; None where all are 0."""
    ends = [low for low, _ in pads] + [high for _, high in pads]
    return ends if any(ends) else None


def _result(context: Context, name: str, axes: Axes) -> Tensor:
    return Tensor(name, axes, context.shape, context.shape, context.dtype)


# Matrix products.


@rule("dot_general")
def _product(context: Context, lhs: Value, rhs: Value) -> Value:
    (left, right), (left_batch, right_batch) = context.params["dimension_numbers"]
    graph = context.graph
    lhs, rhs = _full(context, lhs), _full(context, rhs)
    left_free = _rest(lhs, (*left, *left_batch))
    right_free = _rest(rhs, (*right, *right_batch))
    if not left_batch and isinstance(rhs, Constant):
        return _by_constant(context, lhs, rhs, left_free, right_free)  # type: ignore[arg-type]
    one = _matrices(context, lhs, (*left_batch,), left_free, tuple(left))
    other = _matrices(context, rhs, (*right_batch,), tuple(right), right_free)
    name = graph.node("MatMul", [one, other])
    batch = [lhs.shape[axis] for axis in left_batch]
    rows = [lhs.shape[axis] for axis in left_free]
    columns = [rhs.shape[axis] for axis in right_free]
    flat = (*batch, _times(rows), _times(columns))
    product = Tensor(name, tuple(range(len(flat))), flat, flat, context.dtype)
    return reshaped(context, product, context.shape)


def _by_constant(
    context: Context,
    lhs: Tensor,
    rhs: Constant,
    left_free: tuple[int, ...],
    right_free: tuple[int, ...],
) -> Tensor:
    """A dense layer: the free axes of the image stay in whatever order they lie."""
    (left, right), _ = context.params["dimension_numbers"]
    graph, kernel = context.graph, rhs.whole().transpose(*right, *right_free)
    inputs = math.prod(kernel.shape[: len(right)])
    weights = graph.constant(kernel.reshape(inputs, -1), "kernel")
    lying = [a for a in lhs.axes if a in left_free and not is_one(lhs.shape[a])] or list(
        left_free[:1]
    )
    lengths = [lhs.shape[axis] for axis in lying]
    name = graph.arranged(lhs, (*lying, *left))
    name = graph.reshape(name, [*lengths, inputs], [*lengths, *(lhs.shape[a] for a in left)])
    op = "Gemm" if len(lying) == 1 else "MatMul"
    name = graph.node(op, [name, weights])
    if isinstance(rhs, Weights) and right_free == (len(rhs.shape) - 1,):
        graph.nodes[-1].kernel_scale = rhs.scale
    outputs = kernel.reshape(inputs, -1).shape[1]
    columns = [rhs.shape[axis] for axis in right_free]
    name = graph.reshape(name, [*lengths, *columns], [*lengths, outputs])
    after = len(left_free)
    axes = (*(left_free.index(axis) for axis in lying), *range(after, after + len(columns)))
    return _result(context, name, axes)


def _full(context: Context, value: Value) -> Value:
    return value if isinstance(value, Constant) else context.graph.whole(value)


def _rest(value: Value, used: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(value.shape)) if axis not in used)


def _times(lengths: Sequence[Any]) -> Any:
    return math.prod(lengths) if lengths else 1


def _matrices(
    context: Context,
    value: Value,
    batch: tuple[int, ...],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
) -> str:
    """Returns the name of `[*batch, rows, columns]`, each of the two joined to one axis."""
    graph = context.graph
    order = (*batch, *rows, *columns)
    shape = [
        *(value.shape[axis] for axis in batch),
        _times([value.shape[axis] for axis in rows]),
        _times([value.shape[axis] for axis in columns]),
    ]
    if isinstance(value, Constant):
        return graph.constant(value.whole().transpose(order).reshape(shape))
    name = graph.arranged(value, order)
    return graph.reshape(name, shape, [value.shape[axis] for axis in order])


# Pools.


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum", "reduce_window")
def _pool(context: Context, *values: Value) -> Value:
    kind, image = _kind(context, values), values[0]
    params, rank = context.params, len(context.shape)
    window, strides = params["window_dimensions"], params["window_strides"]
    pads, dilations = params["padding"], params["window_dilation"]
    moved = [
        axis
        for axis in range(rank)
        if not (window[axis] == strides[axis] == 1 and tuple(pads[axis]) == (0, 0))
    ]
    if set(params["base_dilation"]) != {1} or context.dtype != np.float32 or len(moved) > rank - 2:
        raise context.unsupported(f"of {context.dtype}, dilation {params['base_dilation']}")
    if kind == "sum" and set(dilations) != {1}:
        raise context.unsupported("a sum of pixels that do not lie side by side")
    tensor = context.graph.whole(image)
    if not moved:
        return tensor
    # An image has two axes, also where a window moves along one of them.
    for axis in (*range(rank - 2, 0, -1), rank - 1):
        if len(moved) < 2 <= rank - 2 and axis not in moved:
            moved.append(axis)
    moved.sort()
    if [axis for axis in tensor.axes if axis in moved] != moved and set(moved) <= set(tensor.axes):
        moved.sort(key=tensor.axes.index)
    order = (*(axis for axis in range(rank) if axis not in moved), *moved)
    name = context.graph.arranged(tensor, order)
    attributes: dict[str, Any] = {
        "kernel_shape": [window[axis] for axis in moved],
        "strides": [strides[axis] for axis in moved],
        "pads": _ends([tuple(pads[axis]) for axis in moved]),
    }
    if kind == "max":
        dilated = [dilations[axis] for axis in moved]
        attributes["dilations"] = dilated if set(dilated) != {1} else None
        return _result(context, context.graph.node("MaxPool", [name], **attributes), order)
    name = context.graph.node("AveragePool", [name], count_include_pad=1, **attributes)
    context.graph.nodes[-1].image = tuple(tensor.shape[axis] for axis in moved)
    mean = _result(context, name, order)
    size = np.full((1,) * rank, math.prod(window), np.float32)
    return elementwise(context, "Mul", mean, Constant(size, size.shape))


def _kind(context: Context, values: Sequence[Value]) -> str:
    """Returns "max" or "sum"."""
    name = context.primitive.removeprefix("reduce_window").strip("_")
    if context.primitive == "reduce_window":
        # The function of two numbers, tried.
        combine = context.params["jaxpr"]
        constants = context.params.get("consts", ())
        jaxpr = combine.jaxpr if hasattr(combine, "jaxpr") else combine
        of_two = jax.core.eval_jaxpr(jaxpr, constants, np.float32(2), np.float32(3))
        name = {3.0: "max", 5.0: "sum"}.get(float(of_two[0]), "")
        start = values[1]
        fits = isinstance(start, Constant) and start.scalar() == (0.0 if name == "sum" else -np.inf)
        name = name if fits else ""
    if name not in ("max", "sum"):
        raise context.unsupported("that is neither a maximum nor a sum")
    return name
