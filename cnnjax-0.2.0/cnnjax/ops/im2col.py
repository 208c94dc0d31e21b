"""Convolution as one matrix product over patches (im2col), in three memory layouts.

Channels-last patches are `[batch * rows * columns, taps * channels]`. With few channels their copy
moves a few floats at a time. Taps-first patches `[taps * channels, batch * rows * columns]` move a
row of the image at a time; batch-last patches `[taps * channels, rows * columns * batch]` move
`batch` floats at a time, but what is made of them has the batch innermost: only `fused` uses them,
which makes the output four times smaller before it is laid out as others want it.

All are written so that plain autodiff gives fast gradients. The image is first split into its
stride phases, so each tap of the window is a contiguous slice and the gradient of the image is a
sum of shifted pads, never a scatter. All of JAX's transforms therefore work, at any order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops import choice
from cnnjax.ops.blocks import in_example_chunks, in_row_blocks
from cnnjax.ops.geometry import Geometry
from cnnjax.ops.once import computed_once


def conv2d_taps_first(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Ungrouped convolution of few channels `[batch, height, width, channels]`.

    Patches `[taps * channels, batch * rows * columns]` are copied a row of the image at a time, and
    the product contracts their leading axis, so that the output has its channels innermost.
    """
    features = kernel.shape[3]

    def product(block: Geometry, image_block: jax.Array, kernel: jax.Array) -> jax.Array:
        window, output_size = kernel.shape[:2], block.output_size(image_block, kernel)

        def plane_taps(plane: jax.Array) -> jax.Array:
            return jnp.stack(window_taps(plane[..., None], window, block, output_size))

        patches = jax.vmap(plane_taps, in_axes=3, out_axes=1)(image_block)
        patches = computed_once(patches.reshape(kernel.size // features, -1))
        matrix = kernel.reshape(-1, features)
        result = multiply(patches, matrix, geometry, contracted_axis=0)
        return result.reshape(-1, *output_size, features)

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
            result = multiply_channels_last(patches, matrix.reshape(-1, features), geometry)
        else:
            patches = jnp.stack(taps).reshape(len(taps), *taps[0].shape[:3], groups, -1)
            result = multiply_groups(patches, matrix, geometry)
        return result.reshape(-1, height, width, features)

    def in_blocks(examples: jax.Array, kernel: jax.Array) -> jax.Array:
        return in_row_blocks(product, examples, kernel, geometry)

    if kernel.shape[:2] == (1, 1):  # No patches to copy: nothing to keep in the cache.
        return in_blocks(image, kernel)
    return in_example_chunks(in_blocks, image, kernel, geometry)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def patches_batch_last(
    image: jax.Array, window: tuple[int, ...], geometry: Geometry, output_size: tuple[int, int]
) -> jax.Array:
    """Returns `[taps * channels, output height, output width, batch]`, taps in row-major order.

    `image` is `[channels, height, width, batch]`. The columns' taps are copied first, for all rows
    of each stride phase, then the rows' taps, each of which is a contiguous block for each channel:
    half as long as a copy of each tap, of which there are many more.
    """
    split = split_phases(image, window, geometry, output_size)
    (row_stride, column_stride), (rows, columns) = geometry.strides, output_size
    row_dilation, column_dilation = geometry.kernel_dilation

    def column_tap(row_phase: int, tap: int) -> jax.Array:
        left, phase = divmod(tap * column_dilation, column_stride)
        return split[:, :, row_phase, left : left + columns, phase]

    by_row_phase = {}
    for row_phase in {tap * row_dilation % row_stride for tap in range(window[0])}:
        taps = [column_tap(row_phase, tap) for tap in range(window[1])]
        by_row_phase[row_phase] = computed_once(jnp.concatenate(taps, axis=0))

    def row_tap(tap: int) -> jax.Array:
        top, phase = divmod(tap * row_dilation, row_stride)
        return by_row_phase[phase][:, top : top + rows]

    return jnp.concatenate([row_tap(tap) for tap in range(window[0])], axis=0)


@patches_batch_last.defjvp
def _(
    window: tuple[int, ...],
    geometry: Geometry,
    output_size: tuple[int, int],
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    # The transpose of one copy of each tap is one sum over all of them, without arrays between.
    taps = window_taps(tangents[0], window, geometry, output_size)
    return patches_batch_last(primals[0], window, geometry, output_size), jnp.concatenate(taps, 0)


def window_taps(
    image: jax.Array, window: tuple[int, ...], geometry: Geometry, output_size: tuple[int, int]
) -> list[jax.Array]:
    """Returns, for each tap of the window in row-major order, what it sees at each output.

    `image` is `[a, height, width, b]`; each tap is `[a, output height, output width, b]`.
    """
    split = split_phases(image, window, geometry, output_size)
    (row_stride, column_stride), (rows, columns) = geometry.strides, output_size
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


def split_phases(
    image: jax.Array, window: tuple[int, ...], geometry: Geometry, output_size: tuple[int, int]
) -> jax.Array:
    """Returns the padded image `[a, height / stride, stride, width / stride, stride, b]`."""
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
    row_stride, column_stride = geometry.strides
    return padded.reshape(
        image.shape[0],
        padded_size[0] // row_stride,
        row_stride,
        padded_size[1] // column_stride,
        column_stride,
        image.shape[3],
    )


def multiply(
    left: jax.Array, right: jax.Array, geometry: Geometry, *, contracted_axis: int = -1
) -> jax.Array:
    """Contracts an axis of `left` with the first of `right`, in float32 or wider.

    The other axes stay apart, since flattening would hide along which of them a batch is sharded;
    the compiler makes one matrix product of it all the same. The result has the operands' dtype.
    """
    product = jnp.tensordot(
        widened(left), widened(right), axes=((contracted_axis,), (0,)), precision=geometry.precision
    )
    return product.astype(left.dtype)


def multiply_channels_last(left: jax.Array, right: jax.Array, geometry: Geometry) -> jax.Array:
    """`multiply` of patches `[batch, rows, columns, inner]` with a matrix, the fastest way.

    Flattened, a sharded batch is still the leading axis.
    """
    flat = multiply(left.reshape(-1, left.shape[3]), right, geometry)
    return flat.reshape(*left.shape[:3], right.shape[1])


def multiply_batch_last(left: jax.Array, right: jax.Array, geometry: Geometry) -> jax.Array:
    """`multiply` of a matrix with patches `[inner, rows, columns, batch]`.

    Flattened to a matrix, the gradient of the patches needs no transpose and is a third faster; but
    of a batch sharded along the last axis, flattening would gather all examples on each device.
    """
    if choice.batch_may_be_sharded():
        return multiply(left, right, geometry)
    flat = multiply(left, right.reshape(right.shape[0], -1), geometry)
    return flat.reshape(left.shape[0], *right.shape[1:])


def multiply_groups(left: jax.Array, right: jax.Array, geometry: Geometry) -> jax.Array:
    """`multiply` of taps `[taps, batch, rows, columns, groups, inner]`, a matrix for each group."""
    product = jnp.einsum(
        "tnhwgi,tigo->nhwgo", widened(left), widened(right), precision=geometry.precision
    )
    return product.astype(left.dtype)


def widened(operand: jax.Array) -> jax.Array:
    """Returns 16-bit floats as float32: not all products of XLA:CPU can accumulate wider."""
    return operand.astype(jnp.promote_types(operand.dtype, jnp.float32))
