"""One pass over the images of a dataset, in which activations are seen and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.errors import UserError
from cnnjax.explain import taps

Shapes = dict[str, tuple[int, ...]]


class Fold(NamedTuple):
    """What is kept of the activations of all images.

    Attributes:
      start: shapes of the activations of a batch -> what is kept of none.
      add: (kept, activations by layer, mask `[batch]`, number of the batch's first image) -> kept.
    """

    start: Callable[[Shapes], Any]
    add: Callable[[Any, taps.Arrays, jax.Array, jax.Array], Any]


def fold(
    model: nn.Module,
    variables: Any,
    batches: Iterable[dict[str, jax.Array]],
    layers: Sequence[str],
    folds: Sequence[Fold],
    *,
    normalize: Callable[[jax.Array], jax.Array] = lambda image: image,
) -> list[Any]:
    """Returns what each fold keeps of the activations of all images, of one pass over them.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      batches: dicts with `image [batch, height, width, channels]` and perhaps `mask [batch]`, such
        as `cnnjax.data.batches.evaluation_batches` yields, all of one shape.
      layers: stages or layers.
      folds: compiled together, into one program for a batch.
      normalize: of stored images to what the model expects.

    Raises:
      UserError: an unknown layer, or no images.
    """

    @jax.jit
    def add(kept: list[Any], variables: Any, image: jax.Array, mask: jax.Array, first: Any) -> Any:
        _, found = taps.tap(model, variables, normalize(image), layers)
        return [each.add(old, found, mask, first) for each, old in zip(folds, kept, strict=True)]

    kept: list[Any] = []
    first = 0
    for batch in batches:
        image = batch["image"]
        mask = batch.get("mask", jnp.ones(len(image), bool))
        if not kept:
            shapes = jax.eval_shape(
                lambda image: taps.tap(model, variables, normalize(image), layers)[1], image
            )
            kept = [each.start({name: x.shape for name, x in shapes.items()}) for each in folds]
        kept = add(kept, variables, image, mask, jnp.int32(first))
        first += len(image)
    if not kept:
        raise UserError("there are no images to look at: give at least one.")
    return kept


def positions(x: jax.Array) -> jax.Array:
    """Returns an activation as `[batch, positions, channels]`: a dense layer has one position."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
