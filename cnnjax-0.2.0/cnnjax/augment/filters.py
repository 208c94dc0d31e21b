"""Filters of single images: smoothing, and the median, which removes salt and pepper.

Each maps one image `[height, width, channels]`, uint8 or float of any range, to one of the same
shape and dtype, channel by channel. They suit `jit`, `vmap` and gradients. As preprocessing they
are chosen by a string, see `make_filter`: `median:3`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError

Filter = Callable[[jax.Array], jax.Array]


# As many copies of the image as a window has pixels are made.
LARGEST_WINDOW = 31


def gaussian_filter(image: jax.Array, deviation: jax.Array | float) -> jax.Array:
    """Smooths by a Gaussian of `deviation` pixels; the image itself at 0.

    Pixels outside the image have no weight: near the border the weights of those inside are scaled
    to a sum of 1. Differentiable in the deviation too, which may be a traced number.
    """
    values, back = _as_floats(image)
    rows = gaussian_matrix(image.shape[0], deviation).astype(values.dtype)
    columns = gaussian_matrix(image.shape[1], deviation).astype(values.dtype)
    return back(
        jnp.einsum("yi,xj,ijc->yxc", rows, columns, values, precision=jax.lax.Precision.HIGHEST)
    )


def gaussian_matrix(size: int, deviation: jax.Array | float) -> jax.Array:
    """Returns the matrix `[size, size]` that smooths a row of pixels; each row sums to 1."""
    distance = np.subtract.outer(np.arange(size), np.arange(size)).astype(np.float32)
    # A thousandth of a pixel is the identity, without a division by 0.
    deviation = jnp.maximum(jnp.asarray(deviation, _float32_at_least(deviation)), 1e-3)
    weights = jnp.exp(-0.5 * jnp.square(distance / deviation))
    return weights / weights.sum(axis=1, keepdims=True)


def mean_filter(image: jax.Array, size: int) -> jax.Array:
    """Replaces each pixel by the mean of the `size` x `size` around it; the border is repeated."""
    values, back = _as_floats(image)
    return back(jnp.mean(jnp.stack(_windows(values, size)), axis=0))


def median_filter(image: jax.Array, size: int) -> jax.Array:
    """Replaces each pixel by the median of the `size` x `size` around it; the border is repeated.

    Tukey 1977, "Exploratory Data Analysis". Computed by minima and maxima of whole images, which
    compilers turn into vector instructions, unlike a sort for each pixel.
    """
    return _median(_windows(image, size))


def gaussian(deviation: float) -> Filter:
    """Smooths by a Gaussian of so many pixels."""
    if deviation < 0:
        raise UserError(f"deviation={deviation}: give 0 pixels or more")
    return functools.partial(gaussian_filter, deviation=deviation)


def mean(size: int) -> Filter:
    """Replaces each pixel by the mean of the `size` x `size` around it."""
    check_window(size)
    return functools.partial(mean_filter, size=size)


def median(size: int) -> Filter:
    """Replaces each pixel by the median of the `size` x `size` around it."""
    check_window(size)
    return functools.partial(median_filter, size=size)


FILTERS: dict[str, Callable[..., Filter]] = {"gaussian": gaussian, "mean": mean, "median": median}


def make_filter(text: str) -> Filter | None:
    """Returns the filter that `text` names: `median:3`, `mean(size=3)`; None for "".

    Raises:
      UserError: an unknown name, or a number that it cannot be.
    """
    return spec.call(spec.parse_one(text, "filter"), FILTERS, "filter") if text else None


def filter_images(images: jax.Array, function: Filter | None) -> jax.Array:
    """Applies a filter to each image of `[..., height, width, channels]`."""
    if function is None:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    return jax.vmap(function)(flat).reshape(images.shape)


def _float32_at_least(value: jax.Array | float) -> Any:
    return jnp.promote_types(jnp.result_type(value), jnp.float32)


def _as_floats(image: jax.Array) -> tuple[jax.Array, Filter]:
    """Returns the image as floats, and what turns floats into its dtype."""
    if image.dtype != jnp.uint8:
        return image, lambda values: values
    return image.astype(jnp.float32), lambda values: jnp.round(values).astype(jnp.uint8)


def _windows(image: jax.Array, size: int) -> list[jax.Array]:
    """The image moved to each place of a window, as `size * size` images."""
    check_window(size)
    height, width, _ = image.shape
    around = size // 2
    padded = jnp.pad(image, ((around, around), (around, around), (0, 0)), mode="edge")
    return [padded[y : y + height, x : x + width] for y in range(size) for x in range(size)]


def _median(values: list[jax.Array]) -> jax.Array:
    """Element by element, by forgetful selection: of n // 2 + 2 values neither the smallest nor the
    largest is the median of all n, so both are dropped and another one is taken in."""
    if len(values) == 1:
        return values[0]
    count = len(values) // 2 + 2
    active, waiting = list(values[:count]), list(values[count:])
    while len(active) > 1:
        last = len(active) - 1
        for i in range(last, 0, -1):  # The smallest to the front,
            active[i - 1], active[i] = _in_order(active[i - 1], active[i])
        for i in range(1, last):  # and the largest to the end.
            active[i], active[i + 1] = _in_order(active[i], active[i + 1])
        active = active[1:-1]
        if waiting:
            active.append(waiting.pop())
    return active[0]


def _in_order(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.minimum(first, second), jnp.maximum(first, second)


def check_window(size: int) -> None:
    """Raises a UserError unless a filter can have a window of this side."""
    if not 1 <= size <= LARGEST_WINDOW or size % 2 == 0:
        raise UserError(
            f"a filter's window of size={size}: give an odd number of pixels, such as 3, and at "
            f"most {LARGEST_WINDOW}"
        )
