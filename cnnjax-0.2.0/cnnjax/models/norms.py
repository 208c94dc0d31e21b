"""The normalizations that networks choose among, by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from cnnjax.errors import UserError, unknown_name
from cnnjax.models.affine_norms import BatchNorm, LayerNorm
from cnnjax.models.grouped_norm import GroupedBatchNorm
from cnnjax.models.unbiased_norm import UnbiasedBatchNorm

Array = jax.Array
Layer = Callable[[Array], Array]
NORMS = ("batch", "batch_unbiased", "group", "layer", "none")


def norm_layer(
    norm: str,
    *,
    train: bool,
    dtype: Any = None,
    axis_name: str | None = None,
    group_size: int = 0,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    use_scale: bool = True,
) -> Callable[..., Any]:
    """Returns `norm(name=..., scale_init=...)`, which makes one normalization layer.

    Args:
      norm: `"batch"` (arXiv 1502.03167), `"batch_unbiased"` (the same with PyTorch's running
        variance, see `UnbiasedBatchNorm`), `"group"` (arXiv 1803.08494, 32 groups, or the largest
        power of two below that divides the channels), `"layer"` (over the channels of each
        position, as in ConvNeXt) or `"none"`.
      train: batch norm takes the batch's statistics and updates its running ones.
      dtype: of the output, `None` for the input's; statistics are float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch statistics are averaged.
      group_size: examples that share batch statistics, consecutive ones of the whole batch; 0 for
        all. See `GroupedBatchNorm`.
      epsilon: added to the variance.
      momentum: of the running statistics, as in Flax: 1 minus PyTorch's.
      use_scale: whether channels are multiplied by learned scales.

    Raises:
      UserError: `norm` is none of these, or has no batch statistics to group.
    """
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    if group_size and (norm != "batch" or group_size < 0):
        raise UserError(
            f"norm_group_size is {group_size} with norm={norm!r}: give a positive number of "
            "examples with norm='batch', or 0."
        )
    ones = nn.initializers.ones
    common = {"epsilon": epsilon, "dtype": dtype, "use_scale": use_scale}

    def group(*, name: str, scale_init: Any = ones) -> Layer:
        def apply(x: Array) -> Array:
            num_groups = math.gcd(32, x.shape[-1])
            return nn.GroupNorm(num_groups, scale_init=scale_init, name=name, **common)(x)

        return apply

    def identity(*, name: str, scale_init: Any = ones) -> Layer:
        del name, scale_init
        return lambda x: x

    if norm in ("batch", "batch_unbiased"):
        common |= {"momentum": momentum, "axis_name": axis_name}
        if group_size and train:
            return functools.partial(GroupedBatchNorm, group_size, **common)
        layer = BatchNorm if norm == "batch" else UnbiasedBatchNorm
        return functools.partial(layer, use_running_average=not train, **common)
    if norm == "layer":
        return functools.partial(LayerNorm, **common)
    if norm == "group":
        return group
    return identity
