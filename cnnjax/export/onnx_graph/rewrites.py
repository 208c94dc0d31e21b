"""Rewrites of an ONNX graph that make it smaller and faster, and compute the same.

Each is a pass over all nodes. What is looked for is what JAX's networks consist of and what
runtimes have one kernel for: means, softmax, layer normalization, GELU, hard sigmoid, clipped ReLU,
and constants that scale and shift channels, as BatchNorm in evaluation does, which disappear in the
weights of the convolution before them.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from cnnjax.export.onnx_graph import affine, quantized
from cnnjax.export.onnx_graph.graph import Graph, Node

Found = dict[str, Node]


def simplify(graph: Graph, output: str) -> None:
    """Applies all rewrites; the output keeps its name."""
    prune(graph, output)
    for rewrite in (
        _multiply,
        _gelus,
        _clips,
        _hard_sigmoids,
        _leaky_relus,
        _softmaxes,
        _means,
        _layer_norms,
        affine.fold,
        affine.batch_norms,
        _pads,
        _moves,
        quantized.quantize_before_moves,
        _dense_after_flatten,
        _spell_gelus,
    ):
        rewrite(graph, output)
        prune(graph, output)
    quantized.write_codes(graph)
    prune(graph, output)


def prune(graph: Graph, output: str) -> None:
    """Drops nodes and constants that the output does not depend on."""
    used, kept = {output}, []
    for node in reversed(graph.nodes):
        if node.output in used:
            used.update(node.inputs)
            kept.append(node)
    graph.nodes[:] = reversed(kept)
    graph.constants = {name: array for name, array in graph.constants.items() if name in used}
    # What was dropped must not be found again by its content.
    graph.forget()


def _readers(graph: Graph, output: str) -> Counter[str]:
    """Returns how often each output is read."""
    return Counter([name for node in graph.nodes for name in node.inputs] + [output])


def _by_output(graph: Graph) -> Found:
    return {node.output: node for node in graph.nodes}


def _scalar(graph: Graph, name: str) -> float | None:
    array = graph.constants.get(name)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def _operands(graph: Graph, node: Node | None, op: str) -> tuple[str, float] | None:
    """Returns (input, number) of an operator of a tensor and a number, in either order."""
    if node is None or node.op != op or len(node.inputs) != 2:
        return None
    for tensor, number in (node.inputs, reversed(node.inputs)):
        value = _scalar(graph, number)
        if value is not None and tensor not in graph.constants:
            return tensor, value
    return None


def _is_near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(1.0, abs(other))


def _multiply(graph: Graph, output: str) -> None:
    """Division by a constant is multiplication."""
    for node in graph.nodes:
        divisor = graph.constants.get(node.inputs[1]) if node.op == "Div" else None
        if divisor is not None and divisor.dtype == np.float32 and np.all(divisor):
            node.op = "Mul"
            inverse = (1 / divisor.astype(np.float64)).astype(np.float32)
            node.inputs = [node.inputs[0], graph.constant(inverse)]


def _gelus(graph: Graph, output: str) -> None:
    """`x * (0.5 * (1 + erf(x / sqrt(2))))`, in any order of the factors."""
    found = _by_output(graph)
    for node in graph.nodes:
        if node.op != "Mul":
            continue
        for one, other in (node.inputs, node.inputs[::-1]):
            factors = [one]
            half = _operands(graph, found.get(other), "Mul")
            halved = half is not None and _is_near(half[1], 0.5)
            inner = half[0] if halved and half else other
            scaled = _operands(graph, found.get(one), "Mul")
            if not halved and scaled and _is_near(scaled[1], 0.5):
                factors, halved = [scaled[0]], True
            x = _erf_of(graph, found, inner)
            if halved and x is not None and x in factors:
                node.op, node.inputs = "Gelu", [x]
                break


def _erf_of(graph: Graph, found: Found, name: str) -> str | None:
    """Returns x of `1 + erf(x / sqrt(2))`, or of `1 - erf(-x / sqrt(2))`, which is the same."""
    node = found.get(name)
    plus = _operands(graph, node, "Add")
    minus = node is not None and node.op == "Sub" and _scalar(graph, node.inputs[0]) == 1.0
    inner = plus[0] if plus and plus[1] == 1.0 else node.inputs[1] if minus and node else ""
    erf = found.get(inner)
    if erf is None or erf.op != "Erf":
        return None
    scaled = _operands(graph, found.get(erf.inputs[0]), "Mul")
    if scaled is None:
        return None
    x, factor = scaled
    before = found.get(x)
    if minus and before is not None and before.op == "Neg":
        x, factor = before.inputs[0], -factor
    return x if _is_near(factor, -math.sqrt(0.5) if minus else math.sqrt(0.5)) else None


def _spell_gelus(graph: Graph, output: str) -> None:
    """Opset 17 has no GELU: it is spelled as ONNX Runtime finds it and computes it at once."""
    nodes = []
    for node in graph.nodes:
        if node.op != "Gelu":
            nodes.append(node)
            continue
        graph.path, (x,) = node.path, node.inputs
        start = len(graph.nodes)
        numbers = [graph.constant(np.float32(value)) for value in (math.sqrt(2), 1.0, 0.5)]
        inner = graph.node("Erf", [graph.node("Div", [x, numbers[0]])])
        inner = graph.node("Mul", [x, graph.node("Add", [inner, numbers[1]])])
        nodes += graph.nodes[start:]
        del graph.nodes[start:]
        node.op, node.inputs = "Mul", [inner, numbers[2]]
        nodes.append(node)
    graph.nodes[:] = nodes


def _clips(graph: Graph, output: str) -> None:
    """Relu and an upper limit are one Clip."""
    readers, found = _readers(graph, output), _by_output(graph)
    for node in graph.nodes:
        before = found.get(node.inputs[0]) if node.inputs else None
        if before is None or readers[before.output] != 1:
            continue
        zero = graph.constant(np.zeros((), np.float32))
        if node.op == "Clip" and before.op == "Relu" and node.inputs[1] == "":
            node.inputs = [before.inputs[0], zero, node.inputs[2]]
        elif node.op == "Relu" and before.op == "Clip" and before.inputs[1] == "":
            node.op, node.inputs = "Clip", [before.inputs[0], zero, before.inputs[2]]


def _hard_sigmoids(graph: Graph, output: str) -> None:
    """`clip(x + 3, 0, 6) / 6`."""
    found = _by_output(graph)
    for node in graph.nodes:
        scaled = _operands(graph, node, "Mul")
        clip = found.get(scaled[0]) if scaled and _is_near(scaled[1], 1 / 6) else None
        if clip is None or clip.op != "Clip" or len(clip.inputs) != 3:
            continue
        if [_scalar(graph, name) for name in clip.inputs[1:]] != [0.0, 6.0]:
            continue
        shifted = _operands(graph, found.get(clip.inputs[0]), "Add")
        if shifted and shifted[1] == 3.0:
            node.op, node.inputs = "HardSigmoid", [shifted[0]]
            node.attributes = {"alpha": 1 / 6, "beta": 0.5}


def _leaky_relus(graph: Graph, output: str) -> None:
    """`x where x >= 0, else slope * x`."""
    found = _by_output(graph)
    for node in graph.nodes:
        if node.op != "Where":
            continue
        test, (_, x, other) = found.get(node.inputs[0]), node.inputs
        scaled = _operands(graph, found.get(other), "Mul")
        if test is None or test.op not in ("Greater", "GreaterOrEqual") or test.inputs[0] != x:
            continue
        if scaled is not None and scaled[0] == x and _scalar(graph, test.inputs[1]) == 0.0:
            node.op, node.inputs, node.attributes = "LeakyRelu", [x], {"alpha": scaled[1]}


def _softmaxes(graph: Graph, output: str) -> None:
    """`e / sum(e)` with `e = exp(x - max(x))`."""
    found = _by_output(graph)
    for node in graph.nodes:
        e, total = (found.get(name) for name in node.inputs) if node.op == "Div" else (None, None)
        if e is None or total is None or e.op != "Exp" or total.op != "ReduceSum":
            continue
        axes = graph.constants.get(total.inputs[1])
        shifted = found.get(e.inputs[0])
        if total.inputs[0] != e.output or axes is None or axes.size != 1:
            continue
        if shifted is None or shifted.op != "Sub":
            continue
        x, largest = shifted.inputs[0], found.get(shifted.inputs[1])
        # JAX takes the larger of it and minus infinity.
        while (
            largest is not None and largest.op in ("Clip", "Max") and _is_unbounded(graph, largest)
        ):
            largest = found.get(next(i for i in largest.inputs if i and i not in graph.constants))
        if largest is None or largest.op != "ReduceMax" or largest.inputs[0] != x:
            continue
        if list(largest.attributes["axes"]) == axes.tolist():
            node.op, node.inputs = "Softmax", [x]
            node.attributes = {"axis": int(axes[0])}


def _is_unbounded(graph: Graph, node: Node) -> bool:
    limits = [_scalar(graph, name) for name in node.inputs if name in graph.constants]
    return limits == [-math.inf]


def _means(graph: Graph, output: str) -> None:
    """A sum times one over the number of its terms."""
    found = _by_output(graph)
    for node in graph.nodes:
        scaled = _operands(graph, node, "Mul")
        total = found.get(scaled[0]) if scaled else None
        if scaled is None or total is None or total.op != "ReduceSum":
            continue
        if not _is_near(scaled[1] * total.count, 1.0):
            continue
        axes = graph.constants[total.inputs[1]].tolist()
        node.lengths, node.count = total.lengths, total.count
        if axes == [2, 3] and len(total.lengths) == 4:
            node.op, node.inputs, node.attributes = "GlobalAveragePool", [total.inputs[0]], {}
        else:
            node.op, node.inputs = "ReduceMean", [total.inputs[0]]
            node.attributes = {"axes": axes, "keepdims": 1}


def _layer_norms(graph: Graph, output: str) -> None:
    """`(x - mean) / sqrt(max(mean(x^2) - mean^2, 0) + epsilon)` over one axis, as Flax has it."""
    found, nodes = _by_output(graph), []
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    for node in graph.nodes:
        match = _normalized(graph, found, node)
        nodes.append(node)
        if match is None:
            continue
        x, axis, epsilon = match
        rank, channels = len(node.lengths), int(node.lengths[axis])
        order = [place for place in range(rank) if place != axis] + [axis]
        graph.path, start = node.path, len(graph.nodes)
        values = [np.ones(channels, np.float32), np.zeros(channels, np.float32)]
        last = node
        for place, op in enumerate(("Mul", "Add")):
            after = readers.get(last.output, [])
            vector = _channel_vector(graph, after, op, channels, rank - 1 - axis)
            if vector is not None and last.output != output:
                # Its only reader now reads what it would give.
                values[place], after[0].op, after[0].inputs = vector, "Identity", [last.output]
                last = after[0]
        names = [graph.constant(value, "scale") for value in values]
        moved = x if axis == rank - 1 else graph.node("Transpose", [x], perm=order)
        normal = graph.node("LayerNormalization", [moved, *names], axis=-1, epsilon=epsilon)
        node.op, node.inputs, node.attributes = "Identity", [normal], {}
        if axis != rank - 1:
            node.op = "Transpose"
            node.attributes = {"perm": [order.index(place) for place in range(rank)]}
        nodes[-1:] = [*graph.nodes[start:], node]
        del graph.nodes[start:]
    graph.nodes[:] = nodes
    _moves(graph, output)


def _channel_vector(
    graph: Graph, readers: list[Node], op: str, channels: int, trailing: int
) -> np.ndarray | None:
    """Returns the number for each channel by which the one reader scales, or which it adds."""
    if len(readers) != 1 or readers[0].op != op:
        return None
    arrays = [graph.constants[name] for name in readers[0].inputs if name in graph.constants]
    if len(arrays) != 1 or arrays[0].shape != (channels,) + (1,) * trailing:
        return None
    return arrays[0].reshape(-1)


def _normalized(graph: Graph, found: Found, node: Node) -> tuple[str, int, float] | None:
    """Returns (x, axis, epsilon) of the last node of a normalization."""
    if node.op != "Sub":
        return None
    first, second = (found.get(name) for name in node.inputs)
    if first is None or second is None or first.op != "Mul" or second.op != "Mul":
        return None
    shared = set(first.inputs) & set(second.inputs)
    if len(shared) != 1 or len(set(first.inputs)) != 2 or len(set(second.inputs)) != 2:
        return None
    (inverse,) = shared
    (x,), (mean,) = set(first.inputs) - shared, set(second.inputs) - shared
    root = found.get(inverse)
    root = found.get(root.inputs[0]) if root is not None and root.op == "Reciprocal" else None
    shifted = found.get(root.inputs[0]) if root is not None and root.op == "Sqrt" else None
    parts = _operands(graph, shifted, "Add")
    relu = found.get(parts[0]) if parts else None
    spread = found.get(relu.inputs[0]) if relu is not None and relu.op == "Relu" else None
    average = found.get(mean)
    if parts is None or spread is None or spread.op != "Sub" or average is None:
        return None
    squares, square = (found.get(name) for name in spread.inputs)
    if squares is None or square is None or square.op != "Mul" or square.inputs != [mean, mean]:
        return None
    power = found.get(squares.inputs[0])
    fits = average.op == squares.op == "ReduceMean" and average.inputs == [x]
    fits = fits and power is not None and power.op == "Mul" and power.inputs == [x, x]
    axes = average.attributes.get("axes", [])
    if not fits or axes != squares.attributes["axes"] or len(axes) != 1:
        return None
    return x, axes[0], parts[1]


def _pads(graph: Graph, output: str) -> None:
    """Padding that the convolution or the pool behind it can do."""
    readers, found = _readers(graph, output), _by_output(graph)
    neutral = {"Conv": 0.0, "MaxPool": -math.inf}
    for node in graph.nodes:
        pad = found.get(node.inputs[0]) if node.op in neutral else None
        if pad is None or pad.op != "Pad" or readers[pad.output] != 1:
            continue
        ends = graph.constants[pad.inputs[1]].tolist()
        rank = len(ends) // 2
        if any(ends[:2]) or any(ends[rank : rank + 2]):
            continue
        if _scalar(graph, pad.inputs[2]) == neutral[node.op]:
            old = node.attributes.get("pads", [0] * (2 * (rank - 2)))
            added = [*ends[2:rank], *ends[rank + 2 :]]
            node.attributes["pads"] = [a + b for a, b in zip(old, added, strict=True)]
            node.inputs[0] = pad.inputs[0]


def _moves(graph: Graph, output: str) -> None:
    """A Transpose of a Transpose is one, or none."""
    found = _by_output(graph)
    same: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = [same.get(name, name) for name in node.inputs]
        if node.op == "Identity" and node.output != output:
            same[node.output] = node.inputs[0]
        before = found.get(node.inputs[0]) if node.op == "Transpose" else None
        if before is not None and before.op == "Transpose":
            inner = before.attributes["perm"]
            node.attributes["perm"] = [inner[place] for place in node.attributes["perm"]]
            node.inputs = list(before.inputs)
        perm = node.attributes.get("perm")
        if perm is not None and perm == sorted(perm) and node.output != output:
            same[node.output] = node.inputs[0]


def _dense_after_flatten(graph: Graph, output: str) -> None:
    """A Transpose before flattening is one of the rows of the dense layer's weights."""
    readers, found = _readers(graph, output), _by_output(graph)
    for node in graph.nodes:
        weights = graph.constants.get(node.inputs[1]) if node.op in ("Gemm", "MatMul") else None
        flat = found.get(node.inputs[0])
        move = found.get(flat.inputs[0]) if flat is not None and flat.op == "Reshape" else None
        if weights is None or flat is None or move is None or move.op != "Transpose":
            continue
        target = graph.constants.get(flat.inputs[1])
        perm, lengths = move.attributes["perm"], move.lengths
        if target is None or target.tolist() != [-1, len(weights)] or perm[0] != 0:
            continue
        if readers[flat.output] != 1 or readers[move.output] != 1 or readers[node.inputs[1]] != 1:
            continue
        if math.prod(lengths[1:]) != len(weights):
            continue
        rows = np.arange(len(weights)).reshape(lengths[1:])
        rows = rows.transpose([perm[1:].index(place) for place in range(1, len(perm))])
        graph.constants[node.inputs[1]] = np.ascontiguousarray(weights[rows.reshape(-1)])
        flat.inputs[0] = move.inputs[0]
