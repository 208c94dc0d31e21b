"""A model's layers, parameters and multiply-accumulates, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import aligned, ops, trees
from cnnjax.models.interceptors import intercept_methods


class LayerRow(NamedTuple):
    """One layer: its path, class, output shape `[height, width, channels]`, and counts.

    `parameters` are its own (not its children's); `statistics` its running values of BatchNorm;
    `macs` the multiply-accumulates for one image if it is a convolution or a dense layer.
    """

    path: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    statistics: int
    macs: int


class Summary(NamedTuple):
    """A model at one image size: its layers in the order of computation, and their sums.

    `activation_bytes` is the memory of every layer's output for one image in float32: about what
    training keeps for the backward pass. `trained` are the parameters that are not frozen (see
    `cnnjax.finetune`): all of a plain model.
    """

    image_shape: tuple[int, int, int]
    rows: tuple[LayerRow, ...]
    parameters: int
    statistics: int
    macs: int
    activation_bytes: int
    trained: int


def abstract_variables(model: Any, image_shape: Sequence[int]) -> Any:
    """Returns the variables of a model as `jax.ShapeDtypeStruct`s; nothing is computed.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]`.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)


def summary(model: nn.Module, image_shape: tuple[int, int, int]) -> Summary:
    """Returns the layers of `model` for an image `[height, width, channels]`; computes nothing.

    Multiply-accumulates are those of convolutions and dense layers, as in torchvision's tables
    (where they are called GFLOPS).
    """
    calls: dict[tuple[str, ...], tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {}

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and args and hasattr(output, "shape"):
            calls[context.module.path] = (context.module, args[0].shape, output.shape)
        return output

    with intercept_methods(record):
        variables = abstract_variables(model, image_shape)
    frozen = variables.get("frozen", {})
    trained = trees.named_leaves(variables["params"])
    params = trees.named_leaves(frozen.get("params", {})) | trained
    statistics = trees.named_leaves(frozen.get("batch_stats", {}))
    statistics |= trees.named_leaves(variables.get("batch_stats", {}))
    rows = []
    for path, (module, input_shape, output_shape) in calls.items():
        prefix = "/".join(path)
        own = _children(params, prefix)
        own_statistics = _children(statistics, prefix)
        if own or not path:
            parameters = sum(leaf.size for leaf in own.values())
            running = sum(leaf.size for leaf in own_statistics.values())
            macs = _macs(module, own, input_shape, output_shape)
            kind = type(module).__name__
            rows.append(LayerRow(prefix, kind, output_shape[1:], parameters, running, macs))
    layers = tuple(row for row in rows if row.path)
    return Summary(
        image_shape=image_shape,
        rows=layers,
        parameters=sum(leaf.size for leaf in params.values()),
        statistics=sum(leaf.size for leaf in statistics.values()),
        macs=sum(row.macs for row in layers),
        activation_bytes=4 * sum(math.prod(row.output_shape) for row in layers),
        trained=trees.count_parameters(trained),
    )


def format_summary(result: Summary, *, layers: bool = True) -> str:
    """Returns a table of the layers (unless `layers` is False) and a line of totals, as text."""
    lines = []
    if layers:
        header = ("layer", "kind", "output", "parameters", "MACs")
        cells = [header] + [
            (
                row.path,
                row.kind,
                "x".join(map(str, row.output_shape)),
                f"{row.parameters:,}",
                f"{row.macs:,}" if row.macs else "",
            )
            for row in result.rows
        ]
        lines = aligned.lines(cells, "lllr", ruled=True)
    size = "x".join(map(str, result.image_shape))
    totals = f"{result.parameters:,} parameters"
    if result.trained < result.parameters:
        totals += f" ({result.trained:,} of them trained)"
    if result.statistics:
        totals += f", {result.statistics:,} running statistics"
    totals += f", {result.macs:,} multiply-accumulates"
    totals += f" and {result.activation_bytes / 2**20:.2f} MiB of activations an image of {size}"
    return "\n".join([*lines, totals])


def _children(leaves: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the leaves directly under `prefix`, by their last name."""
    return {
        path.rpartition("/")[2]: leaf
        for path, leaf in leaves.items()
        if path.rpartition("/")[0] == prefix
    }


def _macs(
    module: nn.Module,
    params: dict[str, Any],
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
) -> int:
    """Each weight of `kernel` is used once at each position of the output, before pooling.

    Those of a transposed convolution are used once at each position of the input.
    """
    if "kernel" not in params:
        return 0
    positions = output_shape[1:-1]
    if isinstance(module, ops.ConvTranspose | nn.ConvTranspose):
        positions = input_shape[1:-1]
    if isinstance(module, ops.ConvPool):
        positions = jax.eval_shape(
            lambda image, kernel: ops.conv2d(image, kernel, padding=module.padding),
            jax.ShapeDtypeStruct(input_shape, jnp.float32),
            params["kernel"],
        ).shape[1:-1]
    return math.prod(positions) * params["kernel"].size
