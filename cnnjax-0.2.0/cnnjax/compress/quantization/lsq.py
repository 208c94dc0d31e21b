"""Training through rounding, with step sizes that are learned.

    x' = s * clip(round(x / s), low, high)

Straight through the rounding the derivative with respect to `x` is 1 inside of the range and 0
outside of it, and with respect to `s` it is `round(x / s) - x / s` inside, and `low` or `high`
outside, times `1 / sqrt(count * high)`: Esser et al. 2020, "Learned Step Size Quantization" (arXiv
1902.08153), equations 1 to 3 and section 2.2.

What is trained is `log s`: a change of it is a relative one, so that an optimizer that scales its
updates, such as Adam, suits steps of any size, and none gets negative. The steps start where
calibration has put them, instead of at the paper's `2 mean|x| / sqrt(high)`. Zero points stay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from cnnjax.compress.quantization import integers
from cnnjax.trees import from_named_leaves, named_leaves

if TYPE_CHECKING:
    from cnnjax.compress.quantization.quantized import LayerPlan

Array = jax.Array
KERNEL_STEP, INPUT_STEP = "kernel_log_step", "input_log_step"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def fake_quantize(x: Array, step: Array, low: int, high: int, count: int) -> Array:
    """Returns `step * clip(round(x / step), low, high)`, with the derivatives of the module.

    Args:
      x: any shape.
      step: positive; of a shape that broadcasts against the last axes of `x`.
      low, high: the smallest and the largest code, less the zero point.
      count: numbers that share a step: the derivative of `step` is divided by
        `sqrt(count * max(-low, high))`.
    """
    return step * jnp.clip(jnp.round(x / step), low, high)


def _forward(x: Array, step: Array, low: int, high: int, count: int) -> tuple[Array, Any]:
    return fake_quantize(x, step, low, high, count), (x, step)


def _backward(low: int, high: int, count: int, kept: Any, cotangent: Array) -> tuple[Array, Array]:
    x, step = kept
    scaled = x / step
    inside = (scaled >= low) & (scaled <= high)
    of_step = jnp.where(inside, jnp.round(scaled) - scaled, jnp.clip(scaled, low, high))
    factor = 1 / math.sqrt(count * max(-low, high))
    summed = jax.vjp(lambda step: jnp.broadcast_to(step, x.shape), step)[1](cotangent * of_step)[0]
    return jnp.where(inside, cotangent, 0), summed * factor


fake_quantize.defvjp(_forward, _backward)


def rounded_input(x: Array, log_step: Array, plan: LayerPlan) -> Array:
    """Returns a layer's input, rounded to what its codes stand for."""
    low = integers.smallest(plan.activations, symmetric=plan.symmetric) - plan.zero
    high = integers.largest(plan.activations) - plan.zero
    count = math.prod(x.shape[1:])
    return fake_quantize(x.astype(jnp.float32), jnp.exp(log_step), low, high, count).astype(x.dtype)


def rounded_kernels(
    params: Any, plans: Mapping[str, LayerPlan]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Returns the parameters with rounded kernels and no steps, and the steps of the inputs."""
    leaves = dict(named_leaves(params))
    steps = {}
    for path, plan in plans.items():
        kernel, log_step = leaves[f"{path}/kernel"], leaves.pop(f"{path}/{KERNEL_STEP}")
        assert isinstance(plan.weights, int)
        bound = integers.largest(plan.weights)
        count = math.prod(kernel.shape[:-1])
        rounded = fake_quantize(kernel, jnp.exp(log_step), -bound, bound, count)
        leaves[f"{path}/kernel"] = rounded
        if plan.activations:
            steps[path] = leaves.pop(f"{path}/{INPUT_STEP}")
    return from_named_leaves(leaves), steps


def with_steps(
    params: Any,
    plans: Mapping[str, LayerPlan],
    input_scales: Mapping[str, Any],
    kernel_scales: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns float parameters with the steps of each planned layer; as `quantized.store`."""
    leaves = dict(named_leaves(params))
    for path, plan in plans.items():
        assert isinstance(plan.weights, int)
        scale = None if kernel_scales is None else kernel_scales[path]
        if scale is None:
            scale = integers.weight_scale(leaves[f"{path}/kernel"], plan.weights)
        leaves[f"{path}/{KERNEL_STEP}"] = jnp.log(jnp.asarray(scale, jnp.float32))
        if plan.activations:
            leaves[f"{path}/{INPUT_STEP}"] = jnp.log(jnp.asarray(input_scales[path], jnp.float32))
    return from_named_leaves(leaves)


def without_steps(params: Any) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """Returns the parameters alone, the scales of the kernels, and those of the inputs."""
    leaves = dict(named_leaves(params))
    scales: dict[str, dict[str, Array]] = {KERNEL_STEP: {}, INPUT_STEP: {}}
    for path in list(leaves):
        layer, _, name = path.rpartition("/")
        if name in scales:
            scales[name][layer] = jnp.exp(leaves.pop(path))
    return from_named_leaves(leaves), scales[KERNEL_STEP], scales[INPUT_STEP]
