"""Batch normalization that keeps its running variance as PyTorch does."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

from cnnjax.models.affine_norms import BatchNorm

Array = jax.Array


class UnbiasedBatchNorm(BatchNorm):
    """`nn.BatchNorm` whose running variance averages unbiased variances.

    A batch is normalized by its own variance, the mean of n squared deviations, in both frameworks.
    What PyTorch adds to the running average is that times `n / (n - 1)`, n being batch * height *
    width over all devices; Flax adds it as it is. They differ by 1 / n: little for large images,
    much where n is small. Parameters and statistics have the names of `nn.BatchNorm`.

    Call: `[batch, ..., features]` to the same shape.
    """

    def __call__(self, x: Array, use_running_average: bool | None = None, **options: Any) -> Array:
        """As `nn.BatchNorm.__call__`."""
        averages = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        updates = not averages and not self.is_initializing()
        before: Any = self.get_variable("batch_stats", "var") if updates else None
        y = super().__call__(x, use_running_average, **options)
        if updates:
            count = math.prod(x.shape[:-1])
            if self.axis_name is not None:
                count *= jax.lax.axis_size(self.axis_name)
            kept = self.momentum * before
            added = self.get_variable("batch_stats", "var") - kept
            # A single value has no unbiased variance; PyTorch refuses it.
            self.put_variable("batch_stats", "var", kept + added * (count / max(count - 1, 1)))
        return y
