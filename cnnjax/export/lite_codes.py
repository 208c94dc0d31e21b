"""The integers of a quantized network in a LiteRT file, in place of the converter's own.

TensorFlow's converter chooses scales by itself, for every tensor. What `cnnjax compress` has chosen
for the layers, their codes, scales, zero points and biases, is written over that; tensors that no
layer reads, such as sums, keep the converter's. LiteRT derives all multipliers from the scales when
it opens a file (https://ai.google.dev/edge/litert/models/quantization_spec).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

# Of a layer: the place of its input, its kernel and its bias, and the kernel's axis of channels.
LAYERS = {
    "CONV_2D": (0, 1, 2, 0),
    "DEPTHWISE_CONV_2D": (0, 1, 2, 3),
    "FULLY_CONNECTED": (0, 1, 2, 0),
    "TRANSPOSE_CONV": (2, 1, 3, 0),
}
# Their output has the scale of their (first) input.
SAME_SCALE = (
    *("RESHAPE", "TRANSPOSE", "SQUEEZE", "EXPAND_DIMS", "MAX_POOL_2D", "AVERAGE_POOL_2D"),
    *("PAD", "PADV2", "SLICE", "STRIDED_SLICE", "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"),
)
# Their outputs' scales are given by the specification.
FIXED_SCALE = ("LOGISTIC", "TANH", "SOFTMAX", "LOG_SOFTMAX", "L2_NORMALIZATION", "CONCATENATION")


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of the layers.

    Attributes:
      layers: paths of those whose kernel is in the file as the run has it.
      inputs: paths of those whose input has the run's scale, too.
      missing: paths of those that the file has no such kernel for, as where the converter has
        joined them with the preprocessing.
    """

    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    missing: tuple[str, ...]

    def table(self) -> str:
        """Returns the line that the command prints."""
        total = len(self.layers) + len(self.missing)
        text = f"scales    {len(self.inputs)} of {total} layers have the run's own"
        converted = [path for path in (*self.missing, *self.layers) if path not in self.inputs]
        return text + (f", the converter's: {', '.join(converted)}" if converted else "")


def with_codes(content: bytes, layers: Mapping[str, Mapping[str, Any]]) -> tuple[bytes, Written]:
    """Returns a LiteRT file with the layers' own integers.

    Args:
      content: of an int8 file of the same network with the weights that the codes stand for.
      layers: what `compress.quantization_parameters` returns; only layers with int8 inputs count.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    (graph,) = model.subgraphs
    names = {value: name for name, value in vars(schema.BuiltinOperator).items()}
    kinds = [names[_builtin(model.operatorCodes[each.opcodeIndex])] for each in graph.operators]
    groups = _groups(graph, kinds)
    waiting = {path: entry for path, entry in layers.items() if entry["activations"]}
    found: list[tuple[str, Any, str]] = []
    for operator, kind in zip(graph.operators, kinds, strict=True):
        if kind not in LAYERS:
            continue
        path = _matching(model, graph, operator, kind, waiting)
        if path is not None:
            found.append((path, operator, kind))
            del waiting[path]
    inputs = _rescale(graph, kinds, groups, found, layers)
    for path, operator, kind in found:
        _write_layer(model, graph, operator, kind, layers[path])
    written = Written(tuple(path for path, *_ in found), tuple(inputs), tuple(waiting))
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model)), written


def _builtin(code: Any) -> int:
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def _groups(graph: Any, kinds: list[str]) -> list[int]:
    """Returns a number for each tensor; those that must have one scale have one number."""
    numbers = list(range(len(graph.tensors)))
    for operator, kind in zip(graph.operators, kinds, strict=True):
        if kind in SAME_SCALE:
            kept, gone = numbers[operator.inputs[0]], numbers[operator.outputs[0]]
            numbers = [kept if number == gone else number for number in numbers]
    return numbers


def _kernel(model: Any, graph: Any, operator: Any, kind: str) -> tuple[Any, np.ndarray]:
    """Returns the tensor of a layer's kernel and its codes, channels first: `[features, -1]`."""
    _, place, _, axis = LAYERS[kind]
    tensor = graph.tensors[operator.inputs[place]]
    data = model.buffers[tensor.buffer].data
    codes = np.frombuffer(bytes(data) if data is not None else b"", np.int8)
    if codes.size != np.prod(tensor.shape):
        return tensor, np.zeros((0, 0), np.int8)
    codes = np.moveaxis(codes.reshape(tensor.shape), axis, 0)
    return tensor, codes.reshape(len(codes), -1)


def _matching(
    model: Any, graph: Any, operator: Any, kind: str, layers: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """Returns the path of the layer whose weights an operator has, up to half a step."""
    tensor, codes = _kernel(model, graph, operator, kind)
    quantization = tensor.quantization
    if not codes.size or quantization is None or quantization.scale is None:
        return None
    scale = np.asarray(quantization.scale, np.float32).reshape(-1, 1)
    for path, entry in layers.items():
        own = _arranged(entry["kernel"], kind)
        if own.shape != codes.shape:
            continue
        meant = own * entry["kernel_scale"].reshape(-1, 1)
        if np.all(np.abs(codes * scale - meant) <= 0.51 * scale + 1e-12):
            return path
    return None


def _arranged(kernel: np.ndarray, kind: str) -> np.ndarray:
    """Returns `[height, width, channels, features]` or `[channels, features]` as `[features, -1]`.

    The kernel of a transposed convolution lies as JAX's, neither flipped.
    """
    first = np.moveaxis(kernel, -1, 0)
    if kind == "TRANSPOSE_CONV":
        first = first[:, ::-1, ::-1]
    return np.ascontiguousarray(first).reshape(len(first), -1)


def _rescale(
    graph: Any,
    kinds: list[str],
    groups: list[int],
    found: list[tuple[str, Any, str]],
    layers: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Gives the layers' inputs the run's scales; returns the paths of those that have them."""
    # What enters and leaves the file keeps the type and the scale that it was made with.
    fixed = {groups[each] for each in (*graph.inputs, *graph.outputs)}
    for operator, kind in zip(graph.operators, kinds, strict=True):
        if kind in FIXED_SCALE:
            fixed |= {groups[each] for each in operator.outputs}
        if kind == "CONCATENATION":
            fixed |= {groups[each] for each in operator.inputs}
    chosen: dict[int, tuple[float, int]] = {}
    done = []
    for path, operator, kind in found:
        group = groups[operator.inputs[LAYERS[kind][0]]]
        wanted = (float(layers[path]["input_scale"]), int(layers[path]["input_zero"]))
        if group in fixed or chosen.setdefault(group, wanted) != wanted:
            continue
        done.append(path)
    for tensor, group in zip(graph.tensors, groups, strict=True):
        if group in chosen and tensor.quantization is not None:
            scale, zero = chosen[group]
            tensor.quantization.scale = np.asarray([scale], np.float32)
            tensor.quantization.zeroPoint = np.asarray([zero], np.int64)
    return done


def _write_layer(
    model: Any, graph: Any, operator: Any, kind: str, entry: Mapping[str, Any]
) -> None:
    """Writes a layer's codes, and its bias in units of its input's scale in the file."""
    source, place, bias_place, axis = LAYERS[kind]
    tensor = graph.tensors[operator.inputs[place]]
    codes = _arranged(entry["kernel"], kind)
    shape = list(tensor.shape)
    moved = codes.reshape([shape[axis], *shape[:axis], *shape[axis + 1 :]])
    data = np.ascontiguousarray(np.moveaxis(moved, 0, axis)).astype(np.int8)
    model.buffers[tensor.buffer].data = np.frombuffer(data.tobytes(), np.uint8)
    scale = entry["kernel_scale"].astype(np.float32)
    tensor.quantization.scale = scale
    tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
    tensor.quantization.quantizedDimension = axis
    if len(operator.inputs) <= bias_place or operator.inputs[bias_place] < 0:
        return
    bias = graph.tensors[operator.inputs[bias_place]]
    of_input = graph.tensors[operator.inputs[source]].quantization.scale[0]
    steps = np.float64(of_input) * scale.astype(np.float64)
    values = entry["bias"] if entry["bias"] is not None else np.zeros(len(scale))
    limits = np.iinfo(np.int32)
    numbers = np.clip(np.round(values / steps), limits.min, limits.max).astype(np.int32)
    model.buffers[bias.buffer].data = np.frombuffer(numbers.tobytes(), np.uint8)
    bias.quantization.scale = steps.astype(np.float32)
    bias.quantization.zeroPoint = np.zeros(len(scale), np.int64)
