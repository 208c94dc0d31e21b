"""A network as an ONNX file.

    onnx_model.write(path, forward_of(model), variables, Signature((28, 28, 1)))

The traced program is lowered here, operator by operator, to opset 17 (IR version 8), which ONNX
Runtime reads since 1.12; nothing of JAX or TensorFlow is in the file. ONNX: https://onnx.ai.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import cnnjax
from cnnjax.errors import UserError
from cnnjax.export.onnx_graph import rewrites
from cnnjax.export.onnx_graph.graph import Graph, Node
from cnnjax.export.onnx_graph.lowering import lower
from cnnjax.export.onnx_graph.values import is_symbolic
from cnnjax.export.program import BATCH, INPUT, OUTPUT, Forward, Signature, Variables, traced

OPSET, IR_VERSION = 17, 8
# Protocol buffers hold no more.
MOST_BYTES = 2**31 - 2**20


def write(
    path: Path,
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    metadata: Mapping[str, Any] | None = None,
    channels_first: bool = False,
) -> None:
    """Writes a network as an ONNX file, checked by `onnx.checker` with shape inference.

    Args:
      path: of the file.
      forward: `forward(variables, image) -> logits`, such as `forward_of(model)`.
      variables: its arrays.
      signature: of the images.
      metadata: for the file's `metadata_props`: text as it is, anything else as JSON.
      channels_first: whether the file takes `[batch, channels, height, width]`, as PyTorch does.

    Raises:
      UserError: an operation without a rule, named with its layer; or more than 2 GB of weights.
    """
    import onnx

    model = make(forward, variables, signature, metadata=metadata, channels_first=channels_first)
    onnx.save(model, str(path))


def make(
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    metadata: Mapping[str, Any] | None = None,
    channels_first: bool = False,
) -> Any:
    """Returns the `onnx.ModelProto` that `write` writes; arguments and errors as there."""
    import onnx
    from onnx import helper, numpy_helper

    graph, output = lower(traced(forward, variables, signature), channels_first=channels_first)
    graph.path = ""
    last = graph.node("Identity", [graph.arranged(output, tuple(range(len(output.shape))))])
    rewrites.simplify(graph, last)
    size = sum(array.nbytes for array in graph.constants.values())
    if size > MOST_BYTES:
        raise UserError(f"the weights take {size:,} bytes, and an ONNX file holds 2 GB.")
    inputs = _lengths((signature.abstract().shape[0], *signature.shape))
    if channels_first:
        inputs = [inputs[axis] for axis in (0, 3, 1, 2)]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(signature.dtype))
    proto = helper.make_graph(
        [
            helper.make_node(
                node.op,
                node.inputs,
                [node.output],
                name=node.output,
                **node.attributes,
            )
            for node in _with_output(graph, last)
        ],
        "cnnjax",
        [helper.make_tensor_value_info(INPUT, kind, inputs)],
        [helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, _lengths(output.shape))],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    model = helper.make_model(
        proto,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="cnnjax",
        producer_version=cnnjax.__version__,
    )
    helper.set_model_props(
        model,
        {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in (metadata or {}).items()
        },
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _with_output(graph: Graph, last: str) -> list[Node]:
    """Returns the nodes, of which the last one's output is called `logits`."""
    *nodes, identity = graph.nodes
    (name,) = identity.inputs
    if name == INPUT or name in graph.constants:
        identity.output = OUTPUT
        return graph.nodes
    for node in nodes:
        node.inputs = [OUTPUT if each == name else each for each in node.inputs]
        node.output = OUTPUT if node.output == name else node.output
    return nodes


def _lengths(shape: tuple[Any, ...]) -> list[int | str]:
    return [BATCH if is_symbolic(dim) else int(dim) for dim in shape]
