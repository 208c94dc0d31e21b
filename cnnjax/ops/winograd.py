"""3x3 convolution with 2.25 times fewer multiplications, by Winograd's minimal filtering.

Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), section
4.1: F(2x2, 3x3). Each 2x2 tile of the output is made from the 4x4 tile of the image that it sees,

    output tile = A^T [ (G kernel G^T) * (B^T image tile B) ] A        (equation 8)

where `*` is elementwise; summed over the channels it is 16 matrix products, one for each position
of the 4x4 tile, of `[tiles, channels]` with `[channels, features]`. Larger tiles would multiply
less still, but lose a decimal digit of float32, and their transforms cost more than they save here.

Both gradients have the same structure (section 3.1 of the same paper): that of the image is a
convolution with the flipped kernel; that of the kernel is, in the transformed domain, the product
of the image's tiles with those of the cotangent. Autodiff of the formula above would find neither:
it would scatter overlapping tiles. So the derivative rule is given, as a linear function that is
the transpose of the gradient wanted: transposing it yields exactly that gradient, and forward mode,
vmap and any order of derivative still work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from cnnjax.ops.blocks import (
    examples_in_product,
    map_examples,
    sum_over_examples,
)
from cnnjax.ops.geometry import Geometry
from cnnjax.ops.im2col import widened, window_taps

Matrix = Sequence[Sequence[float]]

IMAGE_TRANSFORM: Matrix = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))  # B^T
KERNEL_TRANSFORM: Matrix = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # G
OUTPUT_TRANSFORM: Matrix = ((1, 1, 1, 0), (0, 1, -1, -1))  # A^T


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def conv2d_winograd(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution NHWC x HWIO -> NHWC, ungrouped, 3x3 at stride 1."""
    return _convolve(image, _kernel_matrices(kernel), geometry)


def _jvp(geometry, primals, tangents):  # type: ignore[no-untyped-def]
    (image, kernel), (image_tangent, kernel_tangent) = primals, tangents
    result = conv2d_winograd(image, kernel, geometry)
    tangent = jnp.zeros_like(result)
    if not isinstance(image_tangent, SymbolicZero):
        gradient = partial(_image_gradient, kernel=kernel, geometry=geometry, like=image)
        tangent = tangent + _transposed(gradient, result, image_tangent)
    if not isinstance(kernel_tangent, SymbolicZero):
        gradient = partial(_kernel_gradient, image=image, geometry=geometry, like=kernel)
        tangent = tangent + _transposed(gradient, result, kernel_tangent)
    return result, tangent


conv2d_winograd.defjvp(_jvp, symbolic_zeros=True)


def _transposed(
    gradient: Callable[[jax.Array], jax.Array], result: jax.Array, tangent: jax.Array
) -> jax.Array:
    """Returns the transpose of `gradient`, a linear function of what has `result`'s shape."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        # A kernel that is the same on every device has a gradient that is not: so must this be.
        tangent = tangent + jnp.zeros_like(result)[0, 0, 0, 0]
    (change,) = jax.linear_transpose(gradient, result)(tangent)
    return change


def _convolve(
    image: jax.Array, matrices: list[jax.Array], geometry: Geometry, contracted_axis: int = 0
) -> jax.Array:
    """Convolves with the 16 entries of `G kernel G^T`, or with their transposes.

    The products contract one axis or the other: transposing the entries would cost as much again.
    """
    window = jax.ShapeDtypeStruct((3, 3, *matrices[0].shape), image.dtype)
    rows, columns = geometry.output_size(image, window)

    def convolve(image: jax.Array, *matrices: jax.Array) -> jax.Array:
        tiles = _image_tiles(image, geometry, (rows, columns))
        products = [
            _multiply(tile, matrix, contracted_axis, geometry)
            for tile, matrix in zip(tiles, matrices, strict=True)
        ]
        (top_left, top_right, left, right) = _both_ways(OUTPUT_TRANSFORM, products)
        pairs = [jnp.stack(pair, axis=3) for pair in ((top_left, top_right), (left, right))]
        output = jnp.stack(pairs, axis=2)
        batch, tile_rows, _, tile_columns, _, features = output.shape
        output = output.reshape(batch, 2 * tile_rows, 2 * tile_columns, features)
        return output[:, :rows, :columns].astype(image.dtype)

    chunk = examples_in_product(image.shape[0], rows * columns)
    return map_examples(convolve, chunk, (image,), matrices)


def _image_gradient(
    cotangent: jax.Array, kernel: jax.Array, geometry: Geometry, like: jax.Array
) -> jax.Array:
    """The cotangent, padded to see every use of each pixel, convolved with the flipped kernel."""
    rows, columns = (
        (2 - low, size + low - out)
        for size, out, (low, _) in zip(
            like.shape[1:3], cotangent.shape[1:3], geometry.pads, strict=True
        )
    )
    matrices = _kernel_matrices(kernel[::-1, ::-1])
    return _convolve(
        cotangent, matrices, geometry._replace(pads=(rows, columns)), contracted_axis=1
    )


def _kernel_gradient(
    cotangent: jax.Array, image: jax.Array, geometry: Geometry, like: jax.Array
) -> jax.Array:
    rows, columns = cotangent.shape[1:3]

    def products(cotangent: jax.Array, image: jax.Array) -> jax.Array:
        tiles = _image_tiles(image, geometry, (rows, columns))
        cotangent_tiles = _cotangent_tiles(cotangent)
        # Flattened, a batch that is sharded is still the leading axis.
        pairs = [
            (one.reshape(-1, one.shape[3]), other.reshape(-1, other.shape[3]))
            for one, other in zip(tiles, cotangent_tiles, strict=True)
        ]
        return jnp.stack([_multiply(one.T, other, 0, geometry) for one, other in pairs])

    chunk = examples_in_product(image.shape[0], rows * columns)
    total = sum_over_examples(products, chunk, cotangent, image)
    transposed = tuple(zip(*KERNEL_TRANSFORM, strict=True))
    taps = _both_ways(transposed, list(total))
    return jnp.stack(taps).reshape(like.shape).astype(like.dtype)


def _multiply(
    rows: jax.Array, matrix: jax.Array, contracted_axis: int, geometry: Geometry
) -> jax.Array:
    """Contracts the last axis of `rows` with one of `matrix`."""
    flat = rows.reshape(-1, rows.shape[-1])
    contracted = ((1,), (contracted_axis,)), ((), ())
    product = lax.dot_general(flat, matrix, contracted, precision=geometry.precision)
    return product.reshape(*rows.shape[:-1], -1)


def _image_tiles(
    image: jax.Array, geometry: Geometry, output_size: tuple[int, int]
) -> list[jax.Array]:
    """Returns the 16 entries of `B^T tile B`, each `[batch, tile rows, tile columns, channels]`."""
    tile_rows, tile_columns = (-(-size // 2) for size in output_size)
    stepping = geometry._replace(strides=(2, 2))
    return _both_ways(
        IMAGE_TRANSFORM, window_taps(widened(image), (4, 4), stepping, (tile_rows, tile_columns))
    )


def _cotangent_tiles(cotangent: jax.Array) -> list[jax.Array]:
    """Returns the 16 entries of `A tile A^T` of each 2x2 tile."""
    batch, rows, columns, features = cotangent.shape
    margins = [(0, 0, 0), (0, rows % 2, 0), (0, columns % 2, 0), (0, 0, 0)]
    wide = widened(cotangent)
    padded = lax.pad(wide, jnp.zeros((), wide.dtype), margins)
    split = padded.reshape(batch, -(-rows // 2), 2, -(-columns // 2), 2, features)
    entries = [split[:, :, row, :, column] for row in (0, 1) for column in (0, 1)]
    return _both_ways(tuple(zip(*OUTPUT_TRANSFORM, strict=True)), entries)


def _kernel_matrices(kernel: jax.Array) -> list[jax.Array]:
    """Returns the 16 entries of `G kernel G^T`, each `[channels, features]`."""
    taps = [widened(kernel[row, column]) for row in range(3) for column in range(3)]
    return _both_ways(KERNEL_TRANSFORM, taps)


def _both_ways(matrix: Matrix, entries: list[jax.Array]) -> list[jax.Array]:
    """Returns the entries of `matrix @ square @ matrix^T`, of a square of arrays, row by row."""
    size = len(matrix[0])
    columns = [_combine(matrix, entries[column::size]) for column in range(size)]
    return [
        entry
        for row in range(len(matrix))
        for entry in _combine(matrix, [column[row] for column in columns])
    ]


def _combine(matrix: Matrix, entries: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns `matrix @ entries` without multiplications by 0, 1 and -1."""
    results = []
    for weights in matrix:
        total: jax.Array | None = None
        for weight, entry in zip(weights, entries, strict=True):
            if weight == 0:
                continue
            term = entry if abs(weight) == 1 else entry * abs(weight)
            if total is None:
                total = term if weight > 0 else -term
            else:
                total = total + term if weight > 0 else total - term
        assert total is not None
        results.append(total)
    return results
