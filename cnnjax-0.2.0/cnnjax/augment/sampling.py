"""Reading images and class maps at other places than their own, and where boxes go with them.

A pixel's place is that of its center, in rows and columns from 0; a box's edges are counted from
the image's edge, so that the pixel in row 3 lies between 3 and 4.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.errors import UserError

# What lies outside an image: its border repeated, its pixels mirrored, or one value.
Fill = float | Literal["reflect"] | None


def warp(
    image: jax.Array, inverse: jax.Array, move: jax.Array, *, fill: float | None = None
) -> jax.Array:
    """Moves each point by a linear map about the center and then by `move`, interpolating.

    Args:
      image: float `[height, width, channels]`.
      inverse: `[2, 2]`: the row (x, y) of a point of the result, from the center, times this is
        where the point is read.
      move: (x, y), in pixels.
      fill: the value outside the image; None repeats the border.
    """
    height, width, _ = image.shape
    return sample_bilinear(image, *places((height, width), inverse, move), fill=fill)


def places(
    size: tuple[int, int], inverse: jax.Array, move: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the row and the column, `[height, width]`, that `warp` reads for each pixel."""
    height, width = size
    center = jnp.array([(width - 1) / 2, (height - 1) / 2])
    start = center - (center + move) @ inverse
    # One product for all pixels: XLA would compute the draws again for each pixel otherwise.
    grid = np.stack([*np.meshgrid(np.arange(width), np.arange(height)), np.ones((height, width))])
    source = jnp.tensordot(
        jnp.concatenate([inverse, start[None]]),
        grid.astype(np.float32),
        axes=(0, 0),
        precision=jax.lax.Precision.HIGHEST,
    )
    return source[1], source[0]


def sample_bilinear(
    image: jax.Array, y: jax.Array, x: jax.Array, *, fill: float | None = None
) -> jax.Array:
    """Reads `image` between its pixels.

    Args:
      image: `[height, width, channels]`.
      y, x: row and column of each point wanted, float `[rows, columns]`.
      fill: the value outside the image; None repeats the border.

    Returns:
      `[rows, columns, channels]`: the mean of the four neighbors, weighted by nearness.
    """
    if fill is not None:
        image, y, x = padded(image, 1, fill), y + 1.0, x + 1.0
    height, width, channels = image.shape
    y, x = jnp.clip(y, 0.0, height - 1.0), jnp.clip(x, 0.0, width - 1.0)
    # The last pixel is read as the far neighbor of the one before it.
    top = jnp.minimum(jnp.floor(y), max(height - 2, 0)).astype(jnp.int32)
    left = jnp.minimum(jnp.floor(x), max(width - 2, 0)).astype(jnp.int32)
    down, right = (y - top)[..., None], (x - left)[..., None]
    # One flat index: XLA's CPU gather is several times slower along two axes.
    flat = image.reshape(height * width, channels)
    index = top * width + left
    below, beside = width * (height > 1), int(width > 1)

    def neighbor(offset: int) -> jax.Array:
        return flat.at[index + offset].get(mode="promise_in_bounds")

    upper = (1.0 - right) * neighbor(0) + right * neighbor(beside)
    lower = (1.0 - right) * neighbor(below) + right * neighbor(below + beside)
    return (1.0 - down) * upper + down * lower


def sample_nearest(
    class_map: jax.Array, y: jax.Array, x: jax.Array, padding: float = 0
) -> jax.Array:
    """Reads a class map `[height, width]` at the nearest pixels; `padding` outside of it.

    `y` and `x` are row and column of each point wanted, float `[rows, columns]`, as is the result.
    """
    height, width = class_map.shape
    # Halves go up: rounding them to even numbers would read every other pixel twice.
    row, column = jnp.floor(y + 0.5), jnp.floor(x + 0.5)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = jnp.where(inside, row * width + column, 0).astype(jnp.int32)
    read = class_map.reshape(-1).at[index].get(mode="promise_in_bounds")
    return jnp.where(inside, read, jnp.asarray(padding, class_map.dtype))


def warp_boxes(
    boxes: jax.Array, size: tuple[int, int], inverse: jax.Array, move: jax.Array
) -> jax.Array:
    """Returns the hulls `[max, 4]` of the boxes' corners after the `warp` of an image of `size`."""
    height, width = size
    (a, b), (c, d) = inverse
    forward = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    center = jnp.array([width / 2, height / 2])
    top, left, bottom, right = jnp.split(boxes, 4, axis=-1)
    # (x, y) of the four corners, [max, 4, 2].
    corners = jnp.stack(
        [
            jnp.concatenate([left, left, right, right], axis=-1),
            jnp.concatenate([top, bottom, top, bottom], axis=-1),
        ],
        axis=-1,
    )
    start = center + move - jnp.matmul(center, forward, precision=jax.lax.Precision.HIGHEST)
    moved = jnp.matmul(corners, forward, precision=jax.lax.Precision.HIGHEST) + start
    low, high = moved.min(axis=1), moved.max(axis=1)
    hulls = jnp.stack([low[:, 1], low[:, 0], high[:, 1], high[:, 0]], axis=-1)
    return clipped_boxes(jnp.where(is_box(boxes), hulls, 0.0), size)


def sampled_boxes(boxes: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the hulls `[max, 4]` of what is read from within the boxes.

    `y` and `x`, float `[height, width]`, are row and column that each pixel is read from. A pixel
    whose place lies within a box widens the hull as far as the box's edge is from that place, by
    one pixel at most: a box that holds no pixel's center is lost.
    """
    height, width = y.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5

    def hull(box: jax.Array) -> jax.Array:
        top, left, bottom, right = box
        # From the place to the box's edges, which are counted from the image's edge.
        up, down = y + 0.5 - top, bottom - y - 0.5
        before, behind = x + 0.5 - left, right - x - 0.5
        inside = (up >= 0) & (down > 0) & (before >= 0) & (behind > 0)

        def smallest(values: jax.Array) -> jax.Array:
            return jnp.min(jnp.where(inside, values, jnp.inf))

        edges = [
            smallest(rows - jnp.minimum(up, 1.0)),
            smallest(columns - jnp.minimum(before, 1.0)),
            -smallest(-rows - jnp.minimum(down, 1.0)),
            -smallest(-columns - jnp.minimum(behind, 1.0)),
        ]
        return jnp.where(inside.any(), jnp.stack(edges), 0.0)

    return clipped_boxes(jax.vmap(hull)(boxes), (height, width))


def is_box(boxes: jax.Array) -> jax.Array:
    """Returns bool `[max, 1]`: whether a row (top, left, bottom, right) has an area."""
    return ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))[:, None]


def clipped_boxes(boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Cuts boxes `[max, 4]` at the borders of an image of `size`; what has no area becomes 0."""
    height, width = size
    boxes = jnp.clip(boxes, 0.0, np.array([height, width, height, width], np.float32))
    return jnp.where(is_box(boxes), boxes, 0.0)


def padded(image: jax.Array, pixels: int, fill: Fill) -> jax.Array:
    """Returns the image `[height, width, channels]` with so many pixels more on each side."""
    widths = ((pixels, pixels), (pixels, pixels), (0, 0))
    if fill is None:
        return jnp.pad(image, widths, mode="edge")
    if fill == "reflect":
        if pixels >= min(image.shape[:2]):
            raise UserError(
                f"fill='reflect': {pixels} pixels cannot be mirrored from an image of "
                f"{image.shape[0]}x{image.shape[1]}; use fewer"
            )
        return jnp.pad(image, widths, mode="reflect")
    return jnp.pad(image, widths, constant_values=fill)
