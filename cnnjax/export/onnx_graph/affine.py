"""Constants that scale and shift channels, folded into the weights before them.

BatchNorm in evaluation is one: Jacob et al. 2018, "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference" (arXiv 1712.05877), section 3.2.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from cnnjax.export.onnx_graph.graph import Graph, Node

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def fold(graph: Graph, output: str) -> None:
    """Folds scales and shifts into weights and biases, and into each other."""
    # The constant of a merged pair may fold into what comes before it.
    while _pass(graph, output):
        pass


def _pass(graph: Graph, output: str) -> bool:
    readers = Counter([name for node in graph.nodes for name in node.inputs] + [output])
    found = {node.output: node for node in graph.nodes}
    same: dict[str, str] = {}
    changed = False

    def drop(gone: str, kept: str) -> bool:
        same[gone] = kept
        readers[kept] += readers[gone] - 1
        return True

    for node in graph.nodes:
        node.inputs = [same.get(name, name) for name in node.inputs]
        if node.op not in ("Add", "Sub", "Mul") or node.output == output:
            continue
        tensor = [name for name in node.inputs if name not in graph.constants]
        constant = [name for name in node.inputs if name in graph.constants]
        if len(tensor) != 1 or len(constant) != 1 or "" in node.inputs:
            continue
        before, array = found.get(tensor[0]), graph.constants[constant[0]]
        if array.dtype != np.float32:
            continue
        if node.op == "Mul" and np.all(np.abs(array - 1) <= 1e-6) and array.size == 1:
            changed = drop(node.output, tensor[0])
        elif before is None or readers[before.output] != 1:
            continue
        elif before.op == "AveragePool" and node.op == "Mul" and _is_partial(before, array):
            before.attributes["count_include_pad"] = 0
            changed = drop(node.output, before.output)
        elif before.op in WEIGHTED and _into_weights(graph, before, node, array):
            changed = drop(node.output, before.output)
        elif before.op in ("Add", "Sub") and node.op == "Mul":
            changed |= _scale_first(graph, before, node, array)
        elif before.op in ("Add", "Sub", "Mul") and _merge(graph, before, node, array):
            same[before.output] = before.inputs[0]
            changed = True
    for node in graph.nodes:
        node.inputs = [_last(same, name) for name in node.inputs]
    # What is folded away is read by nobody.
    graph.nodes[:] = [node for node in graph.nodes if node.output not in same]
    return changed


def _last(same: dict[str, str], name: str) -> str:
    while name in same:
        name = same[name]
    return name


def _is_partial(pool: Node, array: np.ndarray) -> bool:
    """Whether the factors turn means over windows into means over the pixels within the image."""
    window, strides = pool.attributes["kernel_shape"], pool.attributes["strides"]
    pads = pool.attributes.get("pads", [0] * (2 * len(window)))
    counts = []
    for axis, (size, stride, length) in enumerate(zip(window, strides, pool.image, strict=True)):
        low, high = pads[axis], pads[len(window) + axis]
        inside = np.r_[np.zeros(low), np.ones(length), np.zeros(high)]
        starts = range(0, len(inside) - size + 1, stride)
        counts.append(np.array([inside[start : start + size].sum() for start in starts]))
    within = np.prod(np.meshgrid(*counts, indexing="ij"), axis=0)
    return array.shape == within.shape and np.allclose(array * within, math.prod(window), rtol=1e-5)


def _per_channel(before: Node, weights: np.ndarray, array: np.ndarray) -> np.ndarray | None:
    """Returns one number a channel of the output; None where the constant is no such thing."""
    groups = before.attributes.get("group", 1)
    if before.op == "Conv":
        channels, trailing = weights.shape[0], weights.ndim - 2
    elif before.op == "ConvTranspose":
        channels, trailing = weights.shape[1] * groups, weights.ndim - 2
    else:
        channels, trailing = weights.shape[-1], 0
    if array.size == 1:
        return np.full(channels, array.reshape(-1)[0], np.float64)
    if array.shape != (channels,) + (1,) * trailing:
        return None
    return array.reshape(-1).astype(np.float64)


def _into_weights(graph: Graph, before: Node, node: Node, array: np.ndarray) -> bool:
    weights = graph.constants.get(before.inputs[1])
    if weights is None:
        return False
    numbers = _per_channel(before, weights, array)
    if numbers is None or (node.op != "Mul" and before.op == "MatMul"):
        return False
    bias = np.zeros(len(numbers))
    if len(before.inputs) > 2:
        bias = graph.constants[before.inputs[2]].astype(np.float64)
    factor = np.ones(len(numbers))
    if node.op == "Mul":
        factor = numbers
    elif node.op == "Add":
        bias = bias + numbers
    elif node.inputs[0] == before.output:
        bias = bias - numbers
    else:
        factor, bias = -factor, bias - numbers
    graph.path = before.path
    if node.op == "Mul" or factor[0] < 0:
        scaled = _scaled(before, weights.astype(np.float64), factor)
        before.inputs[1] = graph.constant(scaled.astype(np.float32), "kernel")
        bias = bias * factor
    if before.op != "MatMul" and (len(before.inputs) > 2 or node.op != "Mul"):
        before.inputs = [*before.inputs[:2], graph.constant(bias.astype(np.float32), "bias")]
    return True


def _scaled(before: Node, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
    if before.op == "Conv":
        return weights * factor.reshape(-1, *(1,) * (weights.ndim - 1))
    if before.op == "ConvTranspose":
        groups = before.attributes.get("group", 1)
        parts = weights.reshape(groups, -1, *weights.shape[1:])
        factor = factor.reshape(groups, 1, -1, *(1,) * (weights.ndim - 2))
        return (parts * factor).reshape(weights.shape)
    return weights * factor


def _constant_second(graph: Graph, node: Node) -> np.ndarray | None:
    """Returns the constant of an operator of a tensor and a constant, which it then has second."""
    if node.inputs[1] not in graph.constants:
        if node.inputs[0] not in graph.constants or node.op == "Sub":
            return None
        node.inputs.reverse()
    array = graph.constants[node.inputs[1]]
    return array if array.dtype == np.float32 else None


def _scale_first(graph: Graph, before: Node, node: Node, array: np.ndarray) -> bool:
    """`(x - a) * b` is `x * b - a * b`: the scale may then go into weights."""
    shift = _constant_second(graph, before)
    if shift is None:
        return False
    graph.path = node.path
    product = shift.astype(np.float64) * array.astype(np.float64)
    moved = graph.constant(product.astype(np.float32))
    scale = next(name for name in node.inputs if name in graph.constants)
    node.op, node.inputs, before.op = before.op, [before.output, moved], "Mul"
    before.inputs, before.lengths = [before.inputs[0], scale], node.lengths
    return True


def _merge(graph: Graph, before: Node, node: Node, array: np.ndarray) -> bool:
    """Makes one node of two; `before` then has its tensor as first input."""
    first = _constant_second(graph, before)
    if first is None:
        return False
    sign = -1.0 if before.op == "Sub" else 1.0
    minus = node.op == "Sub" and node.inputs[0] == before.output
    graph.path = node.path
    one, two = sign * first.astype(np.float64), array.astype(np.float64)
    if before.op == "Mul" and node.op == "Mul":
        merged = first.astype(np.float64) * two
    elif before.op != "Mul" and (node.op == "Add" or minus):
        node.op, merged = "Add", one + (-two if minus else two)
    else:
        return False
    node.inputs = [before.inputs[0], graph.constant(merged.astype(np.float32))]
    return True


def batch_norms(graph: Graph, output: str) -> None:
    """A scale and a shift of an image's channels, one after the other, are one operator."""
    readers = Counter([name for node in graph.nodes for name in node.inputs] + [output])
    found = {node.output: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op not in ("Add", "Sub") or len(node.lengths) != 4:
            continue
        shift, scale = graph.constants.get(node.inputs[1]), found.get(node.inputs[0])
        if shift is None or scale is None or scale.op != "Mul" or readers[scale.output] != 1:
            continue
        names = [name for name in scale.inputs if name in graph.constants]
        channels = (node.lengths[1], 1, 1)
        if len(names) != 1 or shift.shape != channels or len(scale.lengths) != 4:
            continue
        factor = graph.constants[names[0]]
        if factor.shape != channels or shift.dtype != np.float32 or scale.lengths != node.lengths:
            continue
        (x,) = set(scale.inputs) - set(names)
        graph.path = node.path
        sign = -1 if node.op == "Sub" else 1
        zeros, ones = np.zeros(channels[0], np.float32), np.ones(channels[0], np.float32)
        values = (factor.reshape(-1), sign * shift.reshape(-1), zeros, ones)
        node.inputs = [x, *(graph.constant(value) for value in values)]
        node.op, node.attributes = "BatchNormalization", {"epsilon": 0.0}
