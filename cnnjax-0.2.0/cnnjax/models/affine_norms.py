"""Batch and layer normalization in few passes over their input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` of the last axis, applied as one factor and one summand a channel.

    Ioffe & Szegedy 2015 (arXiv 1502.03167), algorithm 1, with `a = scale / sqrt(var + epsilon)`:

    `(x - mean) * a + bias = x * a + (bias - mean * a)`

    What is kept for the backward pass is `x` alone, not `x - mean` beside it; the gradient of `x`
    is again a factor of the cotangent, one of `x` and a summand, each a number a channel. So
    there are two passes over the images forward and two backward, one of each pair a sum.

    Parameters, statistics, their names and values are those of `nn.BatchNorm`.

    Call: `[batch, ..., features]` to the same shape.
    """

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """As `nn.BatchNorm.__call__`."""
        if mask is not None or self.axis != -1 or not self.use_fast_variance:
            return super().__call__(x, use_running_average, mask=mask)
        averages = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        wide = x.astype(jnp.promote_types(self.dtype or x.dtype, jnp.float32))
        if averages:
            mean, var = running_mean.value, running_var.value
        else:
            mapped = None if self.is_initializing() else self.axis_name
            mean, var = _moments(wide, mapped, self.axis_index_groups)
            if not self.is_initializing():
                for running, value in ((running_mean, mean), (running_var, var)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * value
        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            factor = factor * self.param("scale", self.scale_init, shape, self.param_dtype)
        summand = -mean * factor
        if self.use_bias:
            summand = summand + self.param("bias", self.bias_init, shape, self.param_dtype)
        result = wide * factor + summand
        return result.astype(self.dtype or jnp.promote_types(x.dtype, self.param_dtype))


def _moments(x: Array, axis_name: str | None, groups: Any) -> tuple[Array, Array]:
    """Returns mean and variance over all but the last axis, and over mapped devices."""
    axes = tuple(range(x.ndim - 1))
    mean, square = jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)
    if axis_name is not None:
        both = jax.lax.pmean(jnp.stack([mean, square]), axis_name, axis_index_groups=groups)
        mean, square = both[0], both[1]
    # Rounding may make the difference of the moments negative.
    return mean, jnp.maximum(0.0, square - jnp.square(mean))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of the last axis, applied as one factor and one summand a position.

    Ba, Kiros & Hinton 2016 (arXiv 1607.06450), over the channels of each position:

    `(x - mean) / deviation = x / deviation - mean / deviation`, then times scale plus bias.

    Scale and the factor are not multiplied with each other first, which would make an array as
    large as `x`, kept for the backward pass.

    Parameters, their names and values are those of `nn.LayerNorm`.

    Call: `[batch, ..., features]` to the same shape.
    """

    @nn.compact
    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """As `nn.LayerNorm.__call__`."""
        last_axis = self.reduction_axes == -1 and self.feature_axes == -1
        if mask is not None or not last_axis or self.axis_name is not None:
            return super().__call__(x, mask=mask)
        wide = x.astype(jnp.promote_types(self.dtype or x.dtype, jnp.float32))
        mean = jnp.mean(wide, -1, keepdims=True)
        square = jnp.mean(jnp.square(wide), -1, keepdims=True)
        var = jnp.maximum(0.0, square - jnp.square(mean))
        factor = jax.lax.rsqrt(var + self.epsilon)
        result = wide * factor - mean * factor
        shape = (x.shape[-1],)
        if self.use_scale:
            result = result * self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            result = result + self.param("bias", self.bias_init, shape, self.param_dtype)
        return result.astype(self.dtype or jnp.promote_types(x.dtype, self.param_dtype))
