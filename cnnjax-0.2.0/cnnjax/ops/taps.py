"""Depthwise convolution as a sum of elementwise products, one for each tap of the window.

It has no matrix product to make; the compiler fuses all taps into one pass over the image.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from cnnjax.ops.geometry import Geometry
from cnnjax.ops.im2col import window_taps


@partial(jax.checkpoint, static_argnums=2)  # Else each tap, as large as the image, is kept.
def depthwise_taps(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Depthwise convolution, one group a channel, as a sum of elementwise products.

    `image [batch, height, width, channels]`, `kernel [height, width, 1, channels * multiplier]`.
    """
    channels, features = image.shape[3], kernel.shape[3]
    window = kernel.shape[0], kernel.shape[1]
    taps = window_taps(image, window, geometry, geometry.output_size(image, kernel))
    accumulator = jnp.promote_types(image.dtype, jnp.float32)
    total = jnp.zeros((), accumulator)
    for tap, weights in zip(taps, kernel.reshape(len(taps), features), strict=True):
        repeated = jnp.repeat(tap, features // channels, axis=3)
        total = total + repeated.astype(accumulator) * weights.astype(accumulator)
    return total.astype(image.dtype)
