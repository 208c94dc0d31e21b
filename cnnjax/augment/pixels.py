"""The scale of pixels: what a network gets of an image as it is stored."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.traced import is_traced


def normalize(
    images: jax.Array,
    mean: Sequence[float] | float,
    std: Sequence[float] | float,
    *,
    channel_order: str = "RGB",
) -> jax.Array:
    """Maps pixels to zero mean and unit deviation: `(x - mean) / std`.

    Args:
      images: `[..., height, width, channels]`; uint8 is divided by 255 first, floats are taken as
        they are.
      mean, std: one number, or one a channel of the result, in units where white is 1.
      channel_order: `"BGR"` reverses the channels first, for weights that came from Caffe.

    Returns:
      float32 of the same shape.
    """
    white = 255.0 if images.dtype == jnp.uint8 else 1.0
    # As constants they are divided here, once.
    array = jnp.asarray if is_traced(mean) or is_traced(std) else np.asarray
    center, deviation = array(mean, np.float32), array(std, np.float32)
    if channel_order == "BGR":
        images = images[..., ::-1]
    # One multiplication and one subtraction a pixel.
    return images.astype(jnp.float32) * (1.0 / (white * deviation)) - center / deviation
