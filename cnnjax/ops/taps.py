"""The compiler's convolution, with the gradient of the kernel as one matrix product per tap.

XLA:CPU has a fast kernel for the forward convolution and for the gradient of the image at stride 1.
For the gradient of the kernel it first transposes image and cotangent, which costs as much again.
Here that gradient is, for each tap of the window, the product `tap^T @ cotangent` in the layout in
which both already lie, over a few examples at a time so that they stay in the cache. At stride 2
the gradient of the image is taken phase by phase, where the compiler would convolve stuffed zeros.

Only the derivative *rule* is given: the tangent is a sum of two ordinary linear functions, and
reverse mode transposes those. So forward mode, reverse mode, vmap and any order of derivative work.

A depthwise convolution has no product to make: each tap is multiplied elementwise, and the compiler
fuses all taps into one pass.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from cnnjax.ops.blocks import in_example_chunks
from cnnjax.ops.geometry import Geometry, lax_conv2d
from cnnjax.ops.im2col import multiply_channels_last, window_taps


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def conv2d_taps(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution NHWC x HWIO -> NHWC, ungrouped: `lax` forward, gradients as said above."""
    return lax_conv2d(image, kernel, geometry)


def _jvp(geometry, primals, tangents):  # type: ignore[no-untyped-def]
    (image, kernel), (image_tangent, kernel_tangent) = primals, tangents
    result = conv2d_taps(image, kernel, geometry)
    tangent = jnp.zeros_like(result)
    if not isinstance(image_tangent, SymbolicZero):
        tangent = by_phases(image_tangent, kernel, geometry)
    if not isinstance(kernel_tangent, SymbolicZero):
        tangent = tangent + by_taps(image, kernel_tangent, geometry)
    return result, tangent


conv2d_taps.defjvp(_jvp, symbolic_zeros=True)


def by_phases(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution as a sum of stride-1 convolutions, one for each phase of the strides.

    Transposed in `image`, each term is a stride-1 convolution of the cotangent with few taps.
    """
    if geometry.strides == (1, 1) or geometry.kernel_dilation != (1, 1):
        return conv2d_taps(image, kernel, geometry)
    (row_stride, column_stride), (kernel_rows, kernel_columns) = geometry.strides, kernel.shape[:2]
    rows, columns = geometry.output_size(image, kernel)
    phase_rows = (kernel_rows - 1) // row_stride + rows
    phase_columns = (kernel_columns - 1) // column_stride + columns
    (top, _), (left, _) = geometry.pads
    bottom = phase_rows * row_stride - image.shape[1] - top
    right = phase_columns * column_stride - image.shape[2] - left
    margins = [(0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)]
    phases = lax.pad(image, jnp.zeros((), image.dtype), margins).reshape(
        image.shape[0], phase_rows, row_stride, phase_columns, column_stride, image.shape[3]
    )
    plain = geometry._replace(strides=(1, 1), pads=((0, 0), (0, 0)))
    total = jnp.zeros((), image.dtype)
    for row in range(min(row_stride, kernel_rows)):
        for column in range(min(column_stride, kernel_columns)):
            part = kernel[row::row_stride, column::column_stride]
            seen = phases[:, : part.shape[0] - 1 + rows, row, : part.shape[1] - 1 + columns, column]
            total = total + conv2d_taps(seen, part, plain)
    return total


def by_taps(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution as a sum of matrix products, one for each tap of the window.

    Transposed in `kernel`, each term is the product of a tap with the cotangent.
    """
    rows, columns = geometry.output_size(image, kernel)

    def sum_of_products(examples: jax.Array, kernel: jax.Array) -> jax.Array:
        window = kernel.shape[0], kernel.shape[1]
        taps = window_taps(examples, window, geometry, (rows, columns))
        matrices = kernel.reshape(len(taps), -1, kernel.shape[3])
        products = [
            multiply_channels_last(tap, matrix, geometry)
            for tap, matrix in zip(taps, matrices, strict=True)
        ]
        return sum(products[1:], products[0])

    return in_example_chunks(sum_of_products, image, kernel, geometry)


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
