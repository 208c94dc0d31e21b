"""Max and average pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnnjax.errors import UserError
from cnnjax.ops import choice
from cnnjax.ops.geometry import Geometry, Pads, checked_pair, explicit_pads
from cnnjax.ops.im2col import window_taps
from cnnjax.ops.once import computed_once

# XLA:CPU is slow at the gradient of `reduce_window` (`select_and_scatter`). Slices are as many as
# the window has positions, so that a large window stays with it.
SLICES_AT_MOST = 9


def max_pool(
    image: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    *,
    lowering: str | None = None,
) -> jax.Array:
    """Maximum of each window; `strides` default to 1, padding counts as minus infinity.

    Args:
      image: `[..., height, width, channels]`.
      window: its height and width.
      strides: step of the window down and right.
      padding: "SAME", "SAME_LOWER", "VALID" or ((top, bottom), (left, right)).
      lowering: "lax" for `lax.reduce_window`; any other name for maxima of strided slices, which
        XLA:CPU differentiates faster; None: the context's, else by platform.

    Returns:
      `[..., output height, output width, channels]`. Of equal maxima, the first in row-major order
      has the gradient, in every lowering.

    Raises:
      UserError: a window, strides or padding that are not pairs, or an unknown lowering.
    """
    window, strides, pads = _checked(image, window, strides, padding)
    name = choice.requested(lowering)
    batched = image.reshape(-1, *image.shape[-3:])

    def slices(image: jax.Array) -> jax.Array:
        return _max_of_slices(image, window, strides, pads)

    def windows(image: jax.Array) -> jax.Array:
        lowest = -jnp.inf if _is_float(image) else jnp.iinfo(image.dtype).min
        return _reduce_windows(image, lowest, lax.max, window, strides, pads)

    can_slice = image.size > 0 and _is_float(image)
    if can_slice and name == "im2col":
        result = slices(batched)
    elif can_slice and name != "lax" and math.prod(window) <= SLICES_AT_MOST:
        result = lax.platform_dependent(batched, cpu=slices, default=windows)
    else:
        result = windows(batched)
    return result.reshape(*image.shape[:-3], *result.shape[1:])


def _max_of_slices(
    image: jax.Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads
) -> jax.Array:
    margins = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]
    padded = lax.pad(image, jnp.array(-jnp.inf, image.dtype), margins)
    geometry = Geometry(strides, ((0, 0), (0, 0)), (1, 1), 1, None)
    output_size = geometry.output_size(padded, jax.ShapeDtypeStruct(window, image.dtype))
    return first_maximum(tuple(window_taps(padded, window, geometry, output_size)))


@jax.custom_jvp
def first_maximum(values: tuple[jax.Array, ...]) -> jax.Array:
    """Elementwise maximum of arrays; the first of equal maxima has the derivative."""
    return reduce(jnp.maximum, values)


@first_maximum.defjvp
def _(primals, tangents):  # type: ignore[no-untyped-def]
    (values,), (changes,) = primals, tangents
    # Each is compared with the largest before it, never for equality with the maximum: a compiler
    # that computes the values again for this rule may round them otherwise, and none would be
    # equal.
    largest, winner = values[0], jnp.zeros(values[0].shape, jnp.int8)
    for index, value in enumerate(values[1:], 1):
        winner = jnp.where(value > largest, jnp.int8(index), winner)
        largest = jnp.maximum(largest, value)
    # Written once, a byte a window: in the transpose each pixel asks all windows that it is in.
    winner = computed_once(winner)
    parts = [
        jnp.where(winner == index, change, jnp.zeros((), change.dtype))
        for index, change in enumerate(changes)
    ]
    return first_maximum(values), reduce(jnp.add, parts)


def avg_pool(
    image: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """Mean of each window; `strides` default to 1.

    Args:
      image: `[..., height, width, channels]`.
      window: its height and width.
      strides: step of the window down and right.
      padding: "SAME", "SAME_LOWER", "VALID" or ((top, bottom), (left, right)).
      count_include_pad: divide by the window's size; False: by the pixels in it that are not
        padding.

    Returns:
      `[..., output height, output width, channels]`.

    Raises:
      UserError: a window, strides or padding that are not pairs.
    """
    window, strides, pads = _checked(image, window, strides, padding)
    batched = image.reshape(-1, *image.shape[-3:])
    total = _reduce_windows(batched, 0.0, lax.add, window, strides, pads)
    count: jax.Array | int = window[0] * window[1]
    if not count_include_pad:
        inside = jnp.ones((1, *batched.shape[1:3], 1), image.dtype)
        count = _reduce_windows(inside, 0.0, lax.add, window, strides, pads)
    return (total / count).reshape(*image.shape[:-3], *total.shape[1:])


def _reduce_windows(
    image: jax.Array,
    start: float,
    operation: Callable[[Any, Any], Any],
    window: tuple[int, int],
    strides: tuple[int, int],
    pads: Pads,
) -> jax.Array:
    return lax.reduce_window(
        image,
        np.array(start, image.dtype),
        operation,
        (1, *window, 1),
        (1, *strides, 1),
        ((0, 0), *pads, (0, 0)),
    )


def _is_float(image: jax.Array) -> bool:
    return jnp.issubdtype(image.dtype, jnp.floating)


def _checked(
    image: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None,
    padding: str | Sequence[tuple[int, int]],
) -> tuple[tuple[int, int], tuple[int, int], Pads]:
    if image.ndim < 3:
        raise UserError(
            f"a pool needs an image [..., height, width, channels], not shape {image.shape}"
        )
    window = checked_pair("window", window)
    strides = checked_pair("strides", (1, 1) if strides is None else strides)
    return window, strides, explicit_pads(image.shape[-3:-1], window, strides, padding)
