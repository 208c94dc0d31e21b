"""Quantized layers as ONNX writes them: integers, and what they stand for, before each operator.

    codes = QuantizeLinear(x, scale, zero)              int8, rounded half to even
    DequantizeLinear(codes), DequantizeLinear(kernel codes, scale a channel), DequantizeLinear(bias)
      -> Conv or Gemm

That is the form in which ONNX Runtime, TensorRT and OpenVINO find layers that they compute with
integers; a runtime without such kernels computes the same in float32. While the graph is rewritten
kernels are float32 and their nodes remember the scales, so that every rewrite of weights holds for
them too; `write_codes` makes integers of them at the end.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cnnjax.export.onnx_graph.graph import Graph, Node
from cnnjax.export.onnx_graph.lowering import Context, function_rule
from cnnjax.export.onnx_graph.values import Constant, Tensor, Value, Weights

LOW, HIGH = -128, 127
# A weight over its scale is a whole number but for float32's rounding.
WHOLE = 1e-3
# What int32 holds.
MOST = 2**31 - 1


@function_rule("dequantize_weight")
def _weights(context: Context, codes: Value, scale: Value) -> Value:
    if not isinstance(codes, Constant) or not isinstance(scale, Constant):
        raise context.unsupported("of codes that depend on the images")
    scales = scale.whole().astype(np.float32)
    array = codes.whole().astype(np.float32) * scales
    return Weights(array, context.shape, scales)


@function_rule("round_to_codes")
def _activations(
    context: Context, x: Value, scale: Value, zero: Value, low: Value, high: Value
) -> Value:
    settings = [part.scalar() for part in (scale, zero, low, high) if isinstance(part, Constant)]
    if len(settings) != 4 or None in settings:
        raise context.unsupported("with a scale that depends on the images")
    numbers, bounds = settings[:2], settings[2:]
    if isinstance(x, Constant):
        codes = np.clip(np.round(x.array / numbers[0]) + numbers[1], *bounds)
        return Constant(((codes - numbers[1]) * numbers[0]).astype(np.float32), x.shape)
    graph, name, lengths = context.graph, x.name, x.lengths()
    if bounds != [LOW, HIGH]:
        ends = [np.float32((code - numbers[1]) * numbers[0]) for code in bounds]
        name = graph.node("Clip", [name, *(graph.constant(end) for end in ends)], lengths)
    scale_zero = [graph.constant(np.float32(numbers[0])), graph.constant(np.int8(numbers[1]))]
    codes_name = graph.node("QuantizeLinear", [name, *scale_zero], lengths)
    name = graph.node("DequantizeLinear", [codes_name, *scale_zero], lengths)
    return Tensor(name, x.axes, x.shape, x.sizes, x.dtype)


def quantize_before_moves(graph: Graph, output: str) -> None:
    """Rounds before a Reshape or a Transpose what would be rounded behind it.

    So the flattening in front of a dense layer is found as in float32 (`rewrites`).
    """
    while _lifted(graph, output):
        pass


def _lifted(graph: Graph, output: str) -> bool:
    found = {node.output: node for node in graph.nodes}
    readers: dict[str, int] = {output: 1}
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    for place, last in enumerate(graph.nodes):
        pair = found.get(last.inputs[0]) if last.op == "DequantizeLinear" else None
        move = found.get(pair.inputs[0]) if pair is not None else None
        if pair is None or move is None or move.op not in ("Reshape", "Transpose"):
            continue
        if readers[pair.output] != 1 or readers[move.output] != 1:
            continue
        # The move gets the last name, which what follows reads.
        before = found.get(move.inputs[0])
        lengths = before.lengths if before is not None else ()
        first = Node(
            "QuantizeLinear",
            [move.inputs[0], *pair.inputs[1:]],
            pair.output,
            {},
            path=last.path,
            lengths=lengths,
        )
        second = dataclasses.replace(
            first, op="DequantizeLinear", inputs=[pair.output, *last.inputs[1:]], output=move.output
        )
        moved = dataclasses.replace(
            move, inputs=[move.output, *move.inputs[1:]], output=last.output
        )
        nodes = [node for node in graph.nodes[:place] if node is not move and node is not pair]
        graph.nodes[:] = [*nodes, first, second, moved, *graph.nodes[place + 1 :]]
        return True
    return False


def write_codes(graph: Graph) -> None:
    """Makes int8 of the kernels whose scales are known, and int32 of the biases beside them."""
    found = {node.output: node for node in graph.nodes}
    nodes: list[Node] = []
    for node in graph.nodes:
        scale = node.kernel_scale
        if scale is not None:
            start = len(graph.nodes)
            _codes(graph, found, node, scale)
            nodes += graph.nodes[start:]
            del graph.nodes[start:]
        nodes.append(node)
    graph.nodes[:] = nodes


def _codes(graph: Graph, found: dict[str, Node], node: Node, scale: np.ndarray) -> None:
    """Writes a layer's integers, behind all nodes; those that are none stay as they are."""
    weights = graph.constants[node.inputs[1]]
    axis = 0 if node.op == "Conv" else weights.ndim - 1
    shape = [1] * weights.ndim
    shape[axis] = len(scale)
    exact = weights.astype(np.float64) / scale.reshape(shape)
    codes = np.round(exact)
    if np.abs(exact - codes).max(initial=0) > WHOLE or np.abs(codes).max(initial=0) > HIGH:
        return
    graph.path = node.path
    name = graph.constant(codes.astype(np.int8), "codes")
    # ONNX Runtime's exact mode (see `cnnjax.export.runtimes`) replaces it, kernel by kernel.
    zeros = graph.constant(np.zeros(len(scale), np.int8), "zero", shared=False)
    node.inputs[1] = graph.node(
        "DequantizeLinear", [name, graph.constant(scale, "scale"), zeros], axis=axis
    )
    source = _rounded(found, node.inputs[0])
    if source is None or len(node.inputs) < 3:
        return
    steps = float(graph.constants[source.inputs[1]]) * scale.astype(np.float64)
    bias = np.round(graph.constants[node.inputs[2]] / steps)
    if np.abs(bias).max(initial=0) <= MOST:
        name = graph.constant(bias.astype(np.int32), "bias_codes")
        zeros = graph.constant(np.zeros(len(scale), np.int32), "zero")
        scales = graph.constant(steps.astype(np.float32), "scale")
        node.inputs[2] = graph.node("DequantizeLinear", [name, scales, zeros], axis=0)


def _rounded(found: dict[str, Node], name: str) -> Node | None:
    """Returns the node whose codes a layer's input is, moved or not."""
    node = found.get(name)
    while node is not None and node.op in ("Reshape", "Transpose"):
        node = found.get(node.inputs[0])
    return node if node is not None and node.op == "DequantizeLinear" else None
