"""Large products in blocks: by rows to bound memory, by examples to stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops import choice
from cnnjax.ops.geometry import Geometry

# Patches above this size are made block by block; above the other, once more in the backward pass.
MAX_PATCH_BYTES = 256 * 2**20
MAX_SAVED_PATCH_BYTES = 32 * 2**20

# Rows of a matrix product that make it efficient, while its operands still fit the cache.
PRODUCT_ROWS = 4096


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


def in_example_chunks(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    image: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
) -> jax.Array:
    """Returns `function(image, kernel)`, a few examples at a time, for NHWC -> NHWC convolutions.

    Nothing that `function` makes is kept for the backward pass, which makes it again.
    """
    rows, columns = geometry.output_size(image, kernel)
    chunk = examples_in_product(image.shape[0], rows * columns)
    return map_examples(function, chunk, (image,), (kernel,))


def map_examples(
    function: Callable[..., jax.Array],
    chunk: int,
    arrays: Sequence[jax.Array],
    constants: Sequence[jax.Array],
) -> jax.Array:
    """Returns `function(*arrays, *constants)`, `chunk` examples at a time, for `[batch, ...]`.

    Nothing that `function` makes is kept for the backward pass, which makes it again.
    """
    recomputed = jax.checkpoint(function)
    if chunk == arrays[0].shape[0]:
        return recomputed(*arrays, *constants)
    chunks = [_in_chunks(array, chunk) for array in arrays]
    results = lax.map(lambda examples: recomputed(*examples, *constants), chunks)
    if choice.batch_may_be_sharded():
        results = results.swapaxes(0, 1)
    return results.reshape(arrays[0].shape[0], *results.shape[2:])


def sum_over_examples(
    function: Callable[..., jax.Array], chunk: int, *arrays: jax.Array
) -> jax.Array:
    """Returns `function(*arrays)`, which sums over the batch, by `chunk` examples at a time.

    The last may be fewer.
    """
    recomputed = jax.checkpoint(function)
    batch = arrays[0].shape[0]
    if chunk == batch:
        return recomputed(*arrays)
    if rest := batch % chunk:
        last = recomputed(*(array[-rest:] for array in arrays))
        return last + sum_over_examples(function, chunk, *(array[:-rest] for array in arrays))
    chunks = [_in_chunks(array, chunk) for array in arrays]
    shape = jax.eval_shape(function, *(array[0] for array in chunks))
    total, _ = lax.scan(
        lambda total, examples: (total + recomputed(*examples), None),
        jnp.zeros(shape.shape, shape.dtype),
        chunks,
    )
    return total


def examples_in_product(batch: int, positions: int) -> int:
    """Returns the divisor of `batch` whose products have most nearly PRODUCT_ROWS rows.

    Of a batch that may be sharded it is at least 8, so that with as many devices it is not
    gathered. It is all of `batch` if no divisor is within a factor of 2.
    """
    least = 8 if choice.batch_may_be_sharded() else 1
    wanted = max(least, PRODUCT_ROWS / max(1, positions))
    if batch <= wanted:
        return batch
    divisors = [size for size in range(least, batch + 1) if batch % size == 0]
    nearest = min(divisors, key=lambda size: abs(math.log(size / wanted)))
    return nearest if wanted / 2 <= nearest <= 2 * wanted else batch


def _in_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """Returns `[batch / chunk, chunk, ...]`.

    Of a batch that may be sharded, chunks are interleaved: its leading part, on which it is
    sharded, stays whole. Else they are as they lie, which spares a copy.
    """
    if choice.batch_may_be_sharded():
        return array.reshape(chunk, array.shape[0] // chunk, *array.shape[1:]).swapaxes(0, 1)
    return array.reshape(array.shape[0] // chunk, chunk, *array.shape[1:])
