"""Convolution as one matrix product over patches (im2col), in two memory layouts.

Channels-last patches are `[batch * rows * columns, taps * channels]`. With few channels their copy
moves a few floats at a time; batch-last patches `[taps * channels, rows * columns * batch]` move
`batch` floats at a time instead, several times faster for the first layers of small networks.

Both are written so that plain autodiff gives fast gradients. The image is first split into its
stride phases, so each tap of the window is a contiguous slice and the gradient of the image is a
sum of shifted pads, never a scatter. All of JAX's transforms therefore work, at any order.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops.geometry import Geometry

# Patches above this size are made block by block; above the other, once more in the backward pass.
MAX_PATCH_BYTES = 256 * 2**20
MAX_SAVED_PATCH_BYTES = 32 * 2**20


def conv2d_batch_last(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution `[batch, height, width, channels]` by patches with the batch innermost."""
    groups, features = geometry.feature_group_count, kernel.shape[3]

    def product(block: Geometry, image_block: jax.Array, kernel: jax.Array) -> jax.Array:
        height, width = block.output_size(image_block, kernel)
        taps = window_taps(
            image_block.transpose(3, 1, 2, 0),
            (kernel.shape[0], kernel.shape[1]),
            block,
            (height, width),
        )
        matrix = kernel.reshape(len(taps), -1, groups, features // groups)
        if groups == 1:
            patches = jnp.concatenate(taps, axis=0).reshape(matrix.shape[0] * matrix.shape[1], -1)
            result = multiply(matrix.reshape(-1, features).T, patches, geometry)
        else:
            patches = jnp.stack(taps).reshape(len(taps), groups, kernel.shape[2], -1)
            result = multiply_groups("tigo,tgim->gom", matrix, patches, geometry)
        return result.reshape(features, height, width, -1).transpose(3, 1, 2, 0)

    return in_row_blocks(product, image, kernel, geometry)


def conv2d_channels_last(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution `[batch, height, width, channels]` by patches with the channels innermost."""
    groups, features = geometry.feature_group_count, kernel.shape[3]

    def product(block: Geometry, image_block: jax.Array, kernel: jax.Array) -> jax.Array:
        height, width = block.output_size(image_block, kernel)
        taps = window_taps(image_block, (kernel.shape[0], kernel.shape[1]), block, (height, width))
        matrix = kernel.reshape(len(taps), -1, groups, features // groups)
        if groups == 1:
            patches = jnp.concatenate(taps, axis=3)
            patches = patches.reshape(-1, patches.shape[3])
            result = multiply(patches, matrix.reshape(-1, features), geometry)
        else:
            patches = jnp.stack(taps).reshape(len(taps), -1, groups, kernel.shape[2])
            result = multiply_groups("tmgi,tigo->mgo", patches, matrix, geometry)
        return result.reshape(-1, height, width, features)

    return in_row_blocks(product, image, kernel, geometry)


def window_taps(
    image: jax.Array, window: tuple[int, int], geometry: Geometry, output_size: tuple[int, int]
) -> list[jax.Array]:
    """Returns, for each tap of the window in row-major order, what it sees at each output.

    `image` is `[a, height, width, b]`; each tap is `[a, output height, output width, b]`.
    """
    padded_size = [
        stride * ((size - 1) * dilation // stride + count)
        for size, dilation, stride, count in zip(
            window, geometry.kernel_dilation, geometry.strides, output_size, strict=True
        )
    ]
    margins = [
        (low, total - size - low, 0)
        for total, size, (low, _) in zip(padded_size, image.shape[1:3], geometry.pads, strict=True)
    ]
    padded = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    (row_stride, column_stride), (rows, columns) = geometry.strides, output_size
    split = padded.reshape(
        image.shape[0],
        padded_size[0] // row_stride,
        row_stride,
        padded_size[1] // column_stride,
        column_stride,
        image.shape[3],
    )
    row_dilation, column_dilation = geometry.kernel_dilation
    taps = []
    phases: dict[tuple[int, int], jax.Array] = {}
    for row in range(0, window[0] * row_dilation, row_dilation):
        for column in range(0, window[1] * column_dilation, column_dilation):
            top, left = row // row_stride, column // column_stride
            phase = row % row_stride, column % column_stride
            # Taps share the slice of their phase, so that the gradient adds up by phase first.
            if phase not in phases:
                phases[phase] = split[:, :, phase[0], :, phase[1]]
            taps.append(phases[phase][:, top : top + rows, left : left + columns])
    return taps


def in_row_blocks(
    product: Callable[..., jax.Array],
    image: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *more: jax.Array,
) -> jax.Array:
    """Returns `product(geometry, image, kernel, *more)`, a block of output rows at a time.

    A block has as many rows as the bound on patches allows.
    Blocks are of rows, not of examples, so that a batch sharded over devices stays where it is.
    """
    rows, columns = geometry.output_size(image, kernel)
    taps = kernel.shape[0] * kernel.shape[1]
    row_bytes = image.shape[0] * columns * taps * image.shape[3] * image.dtype.itemsize
    if taps == 1 or rows * row_bytes <= MAX_SAVED_PATCH_BYTES:
        return product(geometry, image, kernel, *more)
    recomputed = jax.checkpoint(product, static_argnums=0)
    if rows * row_bytes <= MAX_PATCH_BYTES:
        return recomputed(geometry, image, kernel, *more)

    block_rows = max(1, MAX_PATCH_BYTES // row_bytes)
    num_blocks = -(-rows // block_rows)
    stride, (top, _) = geometry.strides[0], geometry.pads[0]
    span = (block_rows - 1) * stride + (kernel.shape[0] - 1) * geometry.kernel_dilation[0] + 1
    bottom = (num_blocks - 1) * block_rows * stride + span - image.shape[1] - top
    margins = [(0, 0, 0), (top, bottom, 0), (0, 0, 0), (0, 0, 0)]
    padded = lax.pad(image, jnp.zeros((), image.dtype), margins)
    starts = [block * block_rows * stride for block in range(num_blocks)]
    blocks = jnp.stack([padded[:, start : start + span] for start in starts])
    block_geometry = geometry._replace(pads=((0, 0), geometry.pads[1]))
    results = lax.map(lambda block: recomputed(block_geometry, block, kernel, *more), blocks)
    joined = results.swapaxes(0, 1).reshape(
        image.shape[0], num_blocks * block_rows, columns, results.shape[4]
    )
    return joined[:, :rows]


def multiply(left: jax.Array, right: jax.Array, geometry: Geometry) -> jax.Array:
    """Matrix product in the operands' dtype, accumulated in float32 or wider."""
    accumulator = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.matmul(
        left, right, precision=geometry.precision, preferred_element_type=accumulator
    ).astype(left.dtype)


def multiply_groups(
    equation: str, left: jax.Array, right: jax.Array, geometry: Geometry
) -> jax.Array:
    """`multiply` for grouped operands, by an einsum equation."""
    accumulator = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(
        equation, left, right, precision=geometry.precision, preferred_element_type=accumulator
    ).astype(left.dtype)
