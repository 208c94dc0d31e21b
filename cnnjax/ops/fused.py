"""Convolution, bias, activation and 2x2 max pool as one function.

A 2x2 pool of a stride-1 convolution looks at four outputs that lie side by side. All four see the
same `(k + 1) x (k + 1)` patch, at stride 2, so they are four groups of output channels of one
stride-2 convolution: the kernel shifted by (0, 0), (0, 1), (1, 0) and (1, 1) within that patch.
There are a quarter as many patches to copy, and the pool becomes a maximum over four arrays of the
matrix product. Everything is done with the batch innermost. A non-decreasing activation commutes
with the maximum and is applied to a quarter of the values, as is the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.ops import choice
from cnnjax.ops.blocks import in_row_blocks
from cnnjax.ops.convolution import conv2d
from cnnjax.ops.geometry import Geometry, make_geometry
from cnnjax.ops.im2col import multiply_batch_last, window_taps
from cnnjax.ops.once import computed_once
from cnnjax.ops.pooling import max_pool

# Functions that never decrease, so that they may be applied after the maximum.
MONOTONE: tuple[Callable[..., Any], ...] = (
    jax.nn.relu,
    nn.relu,
    jax.nn.sigmoid,
    nn.sigmoid,
    jnp.tanh,
    nn.tanh,
)


def conv2d_activation_max_pool(
    image: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    precision: Any = None,
    lowering: str | None = None,
) -> jax.Array:
    """Returns `max_pool(activation(conv2d(image, kernel) + bias), (2, 2), (2, 2))`.

    Of equal maxima, the first in row-major order has the gradient. On the CPU, with few channels
    and an activation known not to decrease (relu, sigmoid, tanh), it is computed as one function
    (a `lowering` of "im2col" asks for that form); otherwise as written above.

    Args:
      image: `[batch, height, width, channels]`.
      kernel: `[kernel height, kernel width, channels, features]`.
      bias: `[features]` or None.
      padding: of the convolution, as in `conv2d`.
      activation: any function of one array, elementwise.
      precision: as in `conv2d`.
      lowering: as in `conv2d`.

    Returns:
      `[batch, pooled height, pooled width, features]`; an odd last row or column is dropped.

    Raises:
      UserError: as `conv2d`.
    """
    name = choice.requested(lowering)
    geometry = make_geometry(image, kernel, (1, 1), padding, (1, 1), 1, precision)
    height, width = geometry.output_size(image, kernel)
    fusable = (
        any(activation is function for function in MONOTONE)
        and jnp.issubdtype(image.dtype, jnp.floating)
        and 0 not in (image.size, kernel.size, height // 2, width // 2)
    )
    if fusable and (name == "im2col" or (name == "auto" and choice.fuses(image, kernel, geometry))):
        return _fused(image, kernel, bias, geometry, activation)
    result = conv2d(
        image, kernel, padding=padding, bias=bias, precision=precision, lowering=lowering
    )
    return max_pool(activation(result), (2, 2), (2, 2), lowering=lowering)


def _fused(
    image: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """NHWC x HWIO -> NHWC, with the batch innermost from the patches to the activation."""
    features = kernel.shape[3]
    shifted = jnp.stack(
        [
            jnp.pad(kernel, ((down, 1 - down), (right, 1 - right), (0, 0), (0, 0)))
            for down in (0, 1)
            for right in (0, 1)
        ],
        axis=3,
    )
    if bias is None:
        bias = jnp.zeros(features, image.dtype)

    def product(
        block: Geometry, image_block: jax.Array, shifted: jax.Array, bias: jax.Array
    ) -> jax.Array:
        height, width = block.output_size(image_block, shifted)
        window = shifted.shape[0], shifted.shape[1]
        batch_last = computed_once(image_block.transpose(3, 1, 2, 0))
        taps = window_taps(batch_last, window, block, (height, width))
        patches = jnp.concatenate(taps, axis=0)
        values = multiply_batch_last(shifted.reshape(-1, 4 * features).T, patches, geometry)
        pooled = _maximum_of_four(values.reshape(4, features, height, width, -1))
        result = activation(pooled + bias[:, None, None, None])
        return computed_once(result).transpose(3, 1, 2, 0)

    return in_row_blocks(product, image, shifted, geometry._replace(strides=(2, 2)), bias)


@jax.custom_jvp
def _maximum_of_four(values: jax.Array) -> jax.Array:
    """Maximum over the first axis, of length 4; the first of equal maxima has the derivative."""
    return jnp.maximum(jnp.maximum(values[0], values[1]), jnp.maximum(values[2], values[3]))


@_maximum_of_four.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (values,), (changes,) = primals, tangents
    maximum = _maximum_of_four(values)
    winner = jnp.where(values[2] == maximum, 2, 3)
    winner = jnp.where(values[1] == maximum, 1, winner)
    winner = jnp.where(values[0] == maximum, 0, winner).astype(jnp.int8)
    # As a sum over the axis, whose transpose writes all four cotangents in one pass.
    place = jax.lax.broadcasted_iota(jnp.int8, values.shape, 0)
    return maximum, jnp.sum(jnp.where(place == winner, changes, 0), axis=0)
