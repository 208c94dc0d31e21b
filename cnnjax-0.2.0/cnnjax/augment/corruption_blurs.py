"""Blurs of the corruptions: Gaussian, defocus, motion, zoom, glass. See `augment.corruptions`."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

PRECISION = jax.lax.Precision.HIGHEST


def smoothing_matrix(
    size: int,
    deviation: float,
    *,
    border: Literal["nearest", "symmetric"] = "nearest",
    truncate: float = 4.0,
) -> np.ndarray:
    """Returns the matrix `[size, size]` of a Gaussian filter of a row, as SciPy's.

    Args:
      size: pixels of the row.
      deviation: of the Gaussian, in pixels; 0 is the identity.
      border: what lies outside: the last pixel, or the mirrored row (SciPy's "reflect").
      truncate: where the Gaussian ends, in deviations.
    """
    radius = int(truncate * deviation + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * np.square(offsets / (deviation or 1.0)))
    places = np.arange(size)[:, None] + offsets
    if border == "nearest":
        places = places.clip(0, size - 1)
    else:
        places = places % (2 * size)
        places = np.where(places < size, places, 2 * size - 1 - places)
    matrix = np.zeros((size, size))
    rows = np.broadcast_to(np.arange(size)[:, None], places.shape)
    np.add.at(matrix, (rows, places), np.broadcast_to(weights / weights.sum(), places.shape))
    return matrix.astype(np.float32)


def smoothed(image: jax.Array, deviation: float, **options) -> jax.Array:
    """Filters `[height, width, channels]` by a Gaussian; options as of `smoothing_matrix`."""
    rows, columns = (smoothing_matrix(size, deviation, **options) for size in image.shape[:2])
    return jnp.einsum("yi,xj,ijc->yxc", rows, columns, image, precision=PRECISION)


def filtered(image: jax.Array, kernel: np.ndarray) -> jax.Array:
    """Correlates each channel of `[height, width, channels]` with a kernel of odd sides.

    What lies outside is mirrored at the last pixel's center.
    """
    down, right = (side // 2 for side in kernel.shape)
    padded = jnp.pad(image, ((down, down), (right, right), (0, 0)), mode="reflect")
    channels_first = jnp.moveaxis(padded, -1, 0)[:, None]
    result = jax.lax.conv_general_dilated(
        channels_first,
        jnp.asarray(kernel, image.dtype)[None, None],
        (1, 1),
        "VALID",
        precision=PRECISION,
    )
    return jnp.moveaxis(result[:, 0], 0, -1)


def gaussian_blur(key: jax.Array, image: jax.Array, deviation: float) -> jax.Array:
    """Smooths by a Gaussian of `deviation` pixels. Nothing is random."""
    del key
    return smoothed(image, deviation)


def defocus_blur(key: jax.Array, image: jax.Array, radius: float, softness: float) -> jax.Array:
    """Spreads each pixel over a disk whose edge is softened. Nothing is random."""
    del key
    return filtered(image, disk(radius, softness))


def disk(radius: float, softness: float) -> np.ndarray:
    """Returns the kernel of a disk that sums to 1, its edge smoothed by `softness` pixels."""
    reach = 8 if radius <= 8 else int(radius)
    places = np.arange(-reach, reach + 1)
    inside = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    half = 1 if radius <= 8 else 2
    weights = np.exp(-0.5 * np.square(np.arange(-half, half + 1) / softness))
    weights /= weights.sum()
    padded = np.pad(inside / inside.sum(), half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * half + 1, 2 * half + 1))
    kernel = np.einsum("yxij,i,j->yx", windows, weights, weights)
    # Rows and columns without weight cost time.
    margin = int(np.argmax(kernel.max(axis=0) > 1e-12))
    return kernel[margin : len(kernel) - margin, margin : len(kernel) - margin]


def motion_blur(key: jax.Array, image: jax.Array, radius: int, deviation: float) -> jax.Array:
    """Smears the image to one side, at an angle within 45 degrees of the horizontal."""
    angle = jax.random.uniform(key, minval=-math.pi / 4, maxval=math.pi / 4)
    return smeared(image, radius, deviation, angle)


def smeared(image: jax.Array, radius: int, deviation: float, angle: jax.Array) -> jax.Array:
    """Averages `2 radius + 1` pixels on one side with the weights of half a Gaussian.

    ImageMagick's motion blur: whole pixels along the angle (radians); the border is repeated.
    """
    count = 2 * radius + 1
    steps = np.arange(count)
    weights = np.exp(-0.5 * np.square(steps / deviation))
    down, right = (
        jnp.ceil(steps * f(angle) - 0.5).astype(jnp.int32) + count for f in (jnp.sin, jnp.cos)
    )
    padded = jnp.pad(image, ((count, count), (count, count), (0, 0)), mode="edge")

    def add(
        total: jax.Array, item: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        weight, row, column = item
        part = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
        return total + weight * part, None

    items = (jnp.asarray(weights / weights.sum(), image.dtype), down, right)
    return jax.lax.scan(add, jnp.zeros_like(image), items)[0]


def zoom_blur(key: jax.Array, image: jax.Array, largest: float, step: float) -> jax.Array:
    """Averages the image with itself enlarged by 1, 1 + step ... below `largest`.

    Nothing is random.
    """
    del key
    factors = np.arange(1.0, largest, step)
    return (image + sum(zoomed(image, factor) for factor in factors)) / (len(factors) + 1)


def zoomed(image: jax.Array, factor: float) -> jax.Array:
    """Enlarges the middle of `[height, width, channels]`, linearly, to the same size."""
    for axis, size in enumerate(image.shape[:2]):
        places = _zoomed_places(size, factor)
        low = np.minimum(np.floor(places).astype(int), max(size - 2, 0))
        high = np.minimum(low + 1, size - 1)
        part = (places - low).astype(np.float32).reshape((-1, *[1] * (2 - axis)))
        image = (1 - part) * jnp.take(image, low, axis) + part * jnp.take(image, high, axis)
    return image


def _zoomed_places(size: int, factor: float) -> np.ndarray:
    """Where each pixel of an enlarged row is read, as SciPy's `zoom` of the middle part does."""
    part = math.ceil(size / factor)
    enlarged = max(size, round(part * factor))
    places = np.arange(enlarged) * ((part - 1) / max(enlarged - 1, 1)) + (size - part) // 2
    start = (enlarged - size) // 2
    return places[start : start + size]


def glass_blur(
    key: jax.Array, image: jax.Array, deviation: float, reach: int, rounds: int
) -> jax.Array:
    """Smooths, replaces pixels by random neighbors up to `reach` away, and smooths again.

    The pixels are replaced one after another, from the last row to the first. (The paper speaks of
    exchanging them; in the authors' program one view of the array overwrites the other, so that
    this is what the published images show.)
    """
    height, width, channels = image.shape
    image = jnp.floor(255 * smoothed(image, deviation)) / 255
    rows, columns = (np.arange(size - reach, reach, -1) for size in (height, width))
    first = np.tile((rows[:, None] * width + columns).ravel(), rounds)
    moves = jax.random.randint(key, (len(first), 2), -reach, reach)
    second = first + moves[:, 0] * width + moves[:, 1]

    def replace(order: jax.Array, places: Any) -> tuple[jax.Array, None]:
        return order.at[places[0]].set(order[places[1]]), None

    order, _ = jax.lax.scan(
        replace, jnp.arange(height * width), (jnp.asarray(first), jnp.asarray(second))
    )
    shuffled = image.reshape(-1, channels)[order].reshape(image.shape)
    return smoothed(shuffled, deviation)
