"""The images of a dataset to which each channel of a layer responds most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cnnjax.errors import UserError
from cnnjax.explain import taps
from cnnjax.explain.inside import passes
from cnnjax.explain.inside.receptive import ReceptiveField

# What is shown of a crop outside of the image.
OUTSIDE = 128


class Maximal(NamedTuple):
    """The highest activations of each channel, each of another image, the highest first.

    Attributes:
      value: float `[channels, count]`; minus infinity where there were fewer images.
      image: number of the image, int `[channels, count]`.
      position: of the unit in its image, row * width + column, int `[channels, count]`.
    """

    value: jax.Array
    image: jax.Array
    position: jax.Array


def maximal_images(
    model: nn.Module,
    variables: Any,
    batches: Iterable[dict[str, jax.Array]],
    layers: Sequence[str],
    *,
    count: int = 9,
    normalize: Callable[[jax.Array], jax.Array] = lambda image: image,
) -> dict[str, Maximal]:
    """Returns the highest activations of every channel of the layers, over all images.

    Zeiler and Fergus 2014 (arXiv 1311.2901), section 4. Only the best of each channel are kept.
    Arguments and errors as for `passes.fold`; `count` images for each channel.
    """
    (kept,) = passes.fold(model, variables, batches, layers, [highest(count)], normalize=normalize)
    return {name: kept[name] for name in layers}


def highest(count: int) -> passes.Fold:
    """Returns the fold that keeps a `Maximal` of each layer.

    Raises:
      UserError: a count below 1.
    """
    if count < 1:
        raise UserError(f"{count} images for each channel: give at least 1.")

    def start(shapes: passes.Shapes) -> dict[str, Maximal]:
        return {
            name: Maximal(
                jnp.full((shape[-1], count), -jnp.inf),
                jnp.zeros((shape[-1], count), jnp.int32),
                jnp.zeros((shape[-1], count), jnp.int32),
            )
            for name, shape in shapes.items()
        }

    def add(
        kept: dict[str, Maximal], found: taps.Arrays, mask: jax.Array, first: jax.Array
    ) -> dict[str, Maximal]:
        return {name: _merged(kept[name], found[name], mask, first) for name in kept}

    return passes.Fold(start, add)


def _merged(kept: Maximal, x: jax.Array, mask: jax.Array, first: jax.Array) -> Maximal:
    x = passes.positions(x).astype(jnp.float32)
    place = jnp.argmax(x, 1).astype(jnp.int32)
    value = jnp.where(mask[:, None], jnp.max(x, 1), -jnp.inf)
    image = jnp.broadcast_to(first + jnp.arange(len(x), dtype=jnp.int32)[:, None], value.shape)
    both = Maximal(
        *(
            jnp.concatenate([old, new.T], 1)
            for old, new in zip(kept, (value, image, place), strict=True)
        )
    )
    # Of equal ones the first: those that were seen before.
    _, best = lax.top_k(both.value, kept.value.shape[1])
    return Maximal(*(jnp.take_along_axis(each, best, 1) for each in both))


def crop(
    image: np.ndarray, field: ReceptiveField, row: int, column: int, *, outside: int = OUTSIDE
) -> np.ndarray:
    """Returns the pixels that a unit sees, cut from its image.

    Args:
      image: `[height, width, channels]`.
      field: of the layer; without what sees the whole image, if there is anything else.
      row, column: of the unit.
      outside: the value where the field reaches over the border. A field that is larger than the
        image is cut to it.

    Returns:
      `[rows, columns, channels]`, of one size for all units of a layer.
    """
    result = image
    for axis, (low, high) in enumerate(field.box(row, column, image.shape)):
        size = image.shape[axis]
        if high - low >= size:
            continue
        pads = [(0, 0)] * image.ndim
        pads[axis] = (max(0, -low), max(0, high - size))
        padded = np.pad(result, pads, constant_values=outside)
        start = low + pads[axis][0]
        result = padded.take(range(start, start + high - low), axis)
    return result
