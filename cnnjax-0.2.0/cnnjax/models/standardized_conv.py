"""Convolution with a standardized kernel.

Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
Standardization" (arXiv 1903.10520), equation 7.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import ops


def standardized(kernel: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """Returns the kernel with mean 0 and variance 1 over the inputs of each output channel.

    Args:
      kernel: `[height, width, inputs, features]`.
      epsilon: added to the variance: that of BiT in timm (the authors' code has 1e-10).
    """
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    mean = jnp.mean(wide, axis=(0, 1, 2))
    factor = jax.lax.rsqrt(jnp.var(wide, axis=(0, 1, 2)) + epsilon)
    return ((wide - mean) * factor).astype(kernel.dtype)


def _standardized_convolution(
    image: jax.Array, kernel: jax.Array, *args: Any, **options: Any
) -> Any:
    return ops.conv_general_dilated(image, standardized(kernel), *args, **options)


class StandardizedConv(ops.Conv):
    """`ops.Conv` whose kernel is `standardized` in each pass."""

    conv_general_dilated: Any = _standardized_convolution
