"""Weights rescaled between layers, and biases corrected, so that fewer bits suffice.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
1906.04721): section 4.1, equations 8 to 11, and section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.compress.quantization import traced
from cnnjax.compress.quantization.calibration import average_over, inputs_of
from cnnjax.compress.quantization.quantized import Quantized, leaves_of, linear_output
from cnnjax.trees import from_named_leaves, named_leaves

if TYPE_CHECKING:
    from cnnjax.compress.quantization.network import Prepared

Variables = dict[str, Any]
Normalize = Callable[[Any], jax.Array]
# One pass moves ranges along a chain by one layer; the ranges of ResNets are still after a few.
SWEEPS = 20
# Below this a channel counts as dead, and is left alone.
DEAD = 1e-8


def equalize(
    model: Any, variables: Variables, image_shape: Sequence[int], *, sweeps: int = SWEEPS
) -> tuple[Variables, list[tuple[str, str]]]:
    """Returns variables with which a model computes the same, and the pairs that were rescaled.

    Where a layer feeds one other through functions that a positive factor of a channel passes
    through (ReLU, pools, flattening), its channel is divided by `s`, and the other's weights of
    that channel are multiplied by it, so that both have the same range. Which layers these are is
    read from the traced program, and that the functions between are of that kind is tried on
    numbers: ReLU6, GELU or a sum is not.

    Args:
      model: of `cnnjax.models`, or folded (`fold_batch_norm`), so that no norm lies between.
      variables: its `params` and `batch_stats`.
      image_shape: `[height, width, channels]`.
      sweeps: passes over all pairs.
    """
    program = traced.trace(model, variables, image_shape)
    params = {path: np.asarray(leaf) for path, leaf in named_leaves(variables["params"]).items()}
    pairs = [
        (first, second, channels)
        for first, second, function in program.between()
        for channels in [_channels(program.layers[first], program.layers[second], function)]
        if channels is not None
    ]
    wide = {path: leaf.astype(np.float64) for path, leaf in params.items()}
    for _ in range(sweeps if pairs else 0):
        for first, second, channels in pairs:
            _equalize_pair(wide, first, second, channels, program.layers[second].groups)
    leaves = {path: jnp.asarray(leaf, params[path].dtype) for path, leaf in wide.items()}
    return {**variables, "params": from_named_leaves(leaves)}, [pair[:2] for pair in pairs]


def _equalize_pair(
    params: dict[str, np.ndarray], first: str, second: str, channels: np.ndarray, groups: int
) -> None:
    kernel, following = params[f"{first}/kernel"], params[f"{second}/kernel"]
    here = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    of_input = _input_ranges(following, groups)
    there = np.zeros_like(here)
    np.maximum.at(there, channels, of_input)
    alive = (here > DEAD) & (there > DEAD)
    factor = np.where(alive, np.sqrt(np.where(alive, here, 1) / np.where(alive, there, 1)), 1)
    params[f"{first}/kernel"] = kernel / factor
    if f"{first}/bias" in params:
        params[f"{first}/bias"] = params[f"{first}/bias"] / factor
    params[f"{second}/kernel"] = following * _as_inputs(factor[channels], following, groups)


def _input_ranges(kernel: np.ndarray, groups: int) -> np.ndarray:
    """Returns the largest weight of each input channel, `[groups * channels a group]`."""
    magnitude = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 2)))
    of_group = magnitude.reshape(magnitude.shape[0], groups, -1).max(axis=-1)
    return of_group.T.reshape(-1)


def _as_inputs(factor: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """Returns a number for each input channel as `[channels a group, features]` of a kernel."""
    per_group = factor.reshape(groups, -1).T
    return np.repeat(per_group, kernel.shape[-1] // groups, axis=1)


def _channels(
    first: traced.Layer, second: traced.Layer, function: Callable[[jax.Array], jax.Array]
) -> np.ndarray | None:
    """Returns, for each input channel of the second layer, the output channel of the first.

    None where a positive factor of a channel does not come out again.
    """
    features, inputs = first.output_shape[-1], second.input_shape[-1]
    if inputs % features or not _is_homogeneous(first):
        return None
    # Flattened images have the channels innermost.
    channels = np.tile(np.arange(features), inputs // features)
    key = jax.random.key(0)
    factor = jnp.exp(jax.random.normal(jax.random.fold_in(key, 1), (features,)))
    for size in (0.1, 100.0):
        value = size * jax.random.normal(key, first.output_shape)
        plain, scaled = np.asarray(function(value)), np.asarray(function(value * factor))
        wanted = plain * np.asarray(factor)[channels]
        if not np.allclose(scaled, wanted, rtol=1e-4, atol=1e-5 * size):
            return None
    return channels


def _is_homogeneous(layer: traced.Layer) -> bool:
    """Whether a positive factor of a channel's weights and bias comes out of the layer."""
    if not isinstance(layer.module, ops.ConvPool):
        return True
    z = jnp.asarray([-100.0, -3.0, -0.1, 0.0, 0.1, 3.0, 100.0])
    activation = layer.module.activation
    return bool(np.allclose(activation(7.0 * z), 7.0 * activation(z), rtol=1e-4, atol=1e-5))


def correct_biases(
    prepared: Prepared,
    model: Quantized,
    variables: Variables,
    images: Sequence[Any],
    normalize: Normalize,
) -> Variables:
    """Returns variables whose biases make up for the mean error of each channel.

    One layer after the other, with those before it quantized and corrected: section 4.2, with
    expectations over images (appendix D). Layers without a bias are left as they are.

    Args:
      prepared: the network before its weights became codes.
      model, variables: after that.
      images: batches `[batch, height, width, channels]`.
      normalize: images -> what the model expects.
    """
    plans = dict(model.layers)

    def means(network: Any, variables: Variables, x: jax.Array) -> dict[str, jax.Array]:
        quantized = network is model

        def measure(path: str, module: nn.Module, x: jax.Array) -> jax.Array:
            own = leaves_of(variables["params"], path)
            result = linear_output(module, x, own, plans[path] if quantized else None)
            return jnp.mean(result, axis=tuple(range(result.ndim - 1)))

        return inputs_of(network, variables, x, plans, measure)

    of_float = average_over(jax.jit(lambda v, x: means(prepared.model, v, x)))
    of_codes = average_over(jax.jit(lambda v, x: means(model, v, x)))
    wanted = of_float(prepared.variables, images, normalize)
    for path in plans:
        leaves = dict(named_leaves(variables["params"]))
        bias = leaves.get(f"{path}/bias")
        if bias is None:
            continue
        error = of_codes(variables, images, normalize)[path] - wanted[path]
        leaves[f"{path}/bias"] = jnp.asarray(np.asarray(bias) - error, bias.dtype)
        variables = {**variables, "params": from_named_leaves(leaves)}
    return variables
