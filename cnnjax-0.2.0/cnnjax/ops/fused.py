"""Convolution, bias, activation and 2x2 max pool as one function.

A 2x2 pool of a stride-1 convolution looks at four outputs that lie side by side. All four see the
same `(k + 1) x (k + 1)` patch, at stride 2, so they are four groups of output channels of one
stride-2 convolution: the kernel shifted by (0, 0), (0, 1), (1, 0) and (1, 1) within that patch.
There are a quarter as many patches to copy, and the pool becomes a maximum over four arrays of the
matrix product. With many features, for which the zeros in the shifted kernels cost more than
copies do, only the columns are treated so, and the rows have stride 1: `(k + 1) k` patches and two
groups. Everything is done with the batch innermost. A non-decreasing activation commutes
with the maximum and is applied to a quarter of the values, as is the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cnnjax.ops import choice
from cnnjax.ops.blocks import in_row_blocks
from cnnjax.ops.convolution import conv2d
from cnnjax.ops.geometry import Geometry, make_geometry
from cnnjax.ops.im2col import multiply_batch_last, patches_batch_last
from cnnjax.ops.once import computed_once, computed_once_both_ways
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
    if bias is None:
        bias = jnp.zeros(kernel.shape[3:], image.dtype)

    def fused(image: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return _fused(image, kernel, bias, geometry, activation)

    def in_turn(image: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        # Once and forward, with many features XLA's own are fastest.
        many = kernel.shape[3] >= choice.ONCE_FEATURES
        is_lax = name == "once" and many and choice.window_fits(image, kernel, geometry)
        form = "lax" if is_lax else name
        result = conv2d(
            image, kernel, padding=padding, bias=bias, precision=precision, lowering=form
        )
        return max_pool(activation(result), (2, 2), (2, 2), lowering=form)

    if fusable and name == "im2col":
        return fused(image, kernel, bias)
    if fusable and choice.fuses(image, kernel, geometry, name):
        return lax.platform_dependent(image, kernel, bias, cpu=fused, default=in_turn)
    return in_turn(image, kernel, bias)


def _fused(
    image: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    geometry: Geometry,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """NHWC x HWIO -> NHWC, with the batch innermost from the patches to the activation."""
    features = kernel.shape[3]
    rows = geometry.output_size(image, kernel)[0]
    row_stride = choice.fused_row_stride(image, kernel, geometry)
    shifted = jnp.stack(
        [
            jnp.pad(kernel, ((down, row_stride - 1 - down), (right, 1 - right), (0, 0), (0, 0)))
            for down in range(row_stride)
            for right in (0, 1)
        ],
        axis=3,
    )

    def product(
        block: Geometry, image_block: jax.Array, shifted: jax.Array, bias: jax.Array
    ) -> jax.Array:
        height, width = block.output_size(image_block, shifted)
        window = shifted.shape[0], shifted.shape[1]
        batch_last = computed_once(image_block.transpose(3, 1, 2, 0))
        patches = patches_batch_last(batch_last, window, block, (height, width))
        matrix = shifted.reshape(patches.shape[0], -1).T
        values = multiply_batch_last(matrix, patches, geometry)
        shape = (row_stride, 2, features, -1, 2 // row_stride, width, image_block.shape[0])
        values = values.reshape(shape)
        if row_stride == 1:
            # The product's cotangent is flat: fused with its flattening, each of its elements
            # would be found by divisions.
            values = computed_once_both_ways(values)
        pooled = _maximum_of_four(values)
        result = activation(pooled + bias[:, None, None, None])
        return computed_once(result).transpose(3, 1, 2, 0)

    (top, bottom), columns = geometry.pads
    whole_windows = geometry._replace(
        strides=(row_stride, 2), pads=((top, bottom - rows % 2), columns)
    )
    return in_row_blocks(product, image, shifted, whole_windows, bias)


@jax.custom_jvp
def _maximum_of_four(values: jax.Array) -> jax.Array:
    """Maximum over the positions under a pool window; the first of equal maxima has the derivative.

    `values` is `[shifts down, shifts right, features, rows, rows within a window, columns, batch]`;
    of the axes 0 and 4, both of which are down, one has length 2 and the other 1.
    """
    top_left, top_right, left, right = _positions(values)
    return jnp.maximum(jnp.maximum(top_left, top_right), jnp.maximum(left, right))


@_maximum_of_four.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (values,), (changes,) = primals, tangents
    # By comparisons of the values, not with their maximum: see `pooling.first_maximum`.
    top_left, top_right, left, right = _positions(values)
    above = jnp.where(top_right > top_left, 1, 0)
    below = jnp.where(right > left, 3, 2)
    lower = jnp.maximum(left, right) > jnp.maximum(top_left, top_right)
    winner = jnp.where(lower, below, above).astype(jnp.int8)
    positions = jnp.arange(4, dtype=jnp.int8).reshape(values.shape[0], -1, 2).swapaxes(1, 2)
    place = positions[:, :, None, None, :, None, None]
    won = place == jnp.expand_dims(winner, (0, 1, 4))
    # As a sum over the axes, whose transpose writes all four cotangents in one pass.
    return _maximum_of_four(values), jnp.sum(jnp.where(won, changes, 0), axis=(0, 1, 4))


def _positions(values: jax.Array) -> list[jax.Array]:
    """Returns the four arrays `[features, rows, columns, batch]`, in row-major order."""
    downs, within = values.shape[0], values.shape[4]
    return [
        values[down, right, :, :, row]
        for down in range(downs)
        for row in range(within)
        for right in (0, 1)
    ]
