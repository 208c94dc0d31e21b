"""Batch normalization whose statistics are of groups of examples instead of the whole batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.errors import UserError

Array = jax.Array


class GroupedBatchNorm(nn.Module):
    """Normalizes each group of consecutive examples by its own mean and variance, while training.

    "Ghost" batch normalization: Hoffer et al. 2017 (arXiv 1705.08741), algorithm 1. Groups are of
    the whole batch: those of a `group_size` do not depend on the devices that share it, and batch
    size / devices gives each device its own. The running statistics take the mean over all groups
    of the means, and of the variances, and so are the same on every device. (The paper feeds the
    groups one after another into the running averages, which would depend on their order.)

    Parameters and statistics are named as those of `nn.BatchNorm`, which evaluates.

    Attributes:
      group_size: examples in a group; it divides the batch. Where the batch is mapped over devices
        (`axis_name`), one of group and device holds a whole number of the other.
      axis_name: mapped axis (`pmap`, `shard_map`) that the batch is divided over.
      momentum, epsilon: as for `nn.BatchNorm`.
      dtype: of the output; None for that of input and parameters. Statistics are float32 or wider.
      use_scale: whether channels are multiplied by learned scales.

    Call: `[batch, ..., features]` to the same shape.

    Raises:
      UserError: the batch is not made of such groups.
    """

    group_size: int
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    use_scale: bool = True
    scale_init: Any = nn.initializers.ones
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        ones = jnp.ones(shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, jnp.float32) if self.use_scale else ones
        bias = self.param("bias", self.bias_init, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        num_groups, num_devices = self._division(x.shape[0])
        grouped = x.reshape(num_groups, -1, *x.shape[1:])
        grouped = grouped.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(1, grouped.ndim - 1))
        moments = jnp.stack(
            [grouped.mean(axes, keepdims=True), jnp.square(grouped).mean(axes, keepdims=True)]
        )
        if num_devices > 1:
            moments = self._mean_over_neighbors(moments, num_devices)
        mean = moments[0]
        # Rounding may make the difference of the moments negative.
        var = jnp.maximum(0.0, moments[1] - jnp.square(mean))
        if not self.is_initializing():
            self._update(running_mean, mean)
            self._update(running_var, var)
        y = (grouped - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(x.shape).astype(self.dtype or jnp.promote_types(x.dtype, scale.dtype))

    def _division(self, batch_size: int) -> tuple[int, int]:
        """Returns the groups on this device, and the devices over which each group extends."""
        mapped = self.axis_name is not None
        num_devices = jax.lax.axis_size(self.axis_name) if mapped else 1
        if batch_size % self.group_size == 0:
            return batch_size // self.group_size, 1
        if self.group_size % batch_size == 0 and num_devices * batch_size % self.group_size == 0:
            return 1, self.group_size // batch_size
        part = f"{num_devices} devices with {batch_size}" if mapped else f"a batch of {batch_size}"
        raise UserError(
            f"norm_group_size is {self.group_size}: {part} examples cannot be divided into such "
            "groups; use a divisor of the batch size" + (" on each device." if mapped else ".")
        )

    def _mean_over_neighbors(self, moments: Array, num_devices: int) -> Array:
        count = jax.lax.axis_size(self.axis_name)
        neighbors = [list(range(i, i + num_devices)) for i in range(0, count, num_devices)]
        return jax.lax.pmean(moments, self.axis_name, axis_index_groups=neighbors)

    def _update(self, running: nn.Variable, by_group: Array) -> None:
        new = by_group.reshape(-1, by_group.shape[-1]).mean(0)
        if self.axis_name is not None:
            new = jax.lax.pmean(new, self.axis_name)
        running.value = self.momentum * running.value + (1 - self.momentum) * new
