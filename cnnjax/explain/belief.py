"""A table that says of each method whether its maps can be believed, on some test images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import metrics
from cnnjax.errors import UserError
from cnnjax.explain import checks, targets
from cnnjax.explain.named import Method

# A map that is still so much like that of a network with random weights does not show what the
# network learned. (Two maps of unlike networks share the image, hence more than 0.)
ALIKE = 0.5
# Nor does one that hardly changes when only the last layer, which tells classes apart, is random.
HARDLY_CHANGED = 0.9
# What the row of random maps is called.
RANDOM = "random map"
MEANING = (
    "deletion, insertion: mean probability of the predicted class while the pixels that the map "
    "ranks highest are hidden (lower is better) or shown (higher is better), against random maps. "
    "random head, random all: rank correlation with the map of the same network whose last layer, "
    f"or all layers, have random weights; a map that stays above {HARDLY_CHANGED} or {ALIKE} does "
    "not depend on what was learned, whatever it shows."
)


class Belief(NamedTuple):
    """What the checks say of one method: means and standard deviations over images.

    Attributes:
      method: how it was written.
      deletion, insertion: mean of the curve of each image.
      random_head, random_all: rank correlation with the maps of the changed networks.
    """

    method: str
    deletion: tuple[float, float]
    insertion: tuple[float, float]
    random_head: tuple[float, float]
    random_all: tuple[float, float]

    def cells(self) -> dict[str, str]:
        """Returns the numbers as texts, by what they are called."""
        return {
            name.replace("_", " "): "{:.3f} ± {:.3f}".format(*getattr(self, name))
            for name in ("deletion", "insertion", "random_head", "random_all")
        }

    @property
    def verdict(self) -> str:
        """What is to be said of a method that fails; else nothing."""
        return "fails: does not depend on what was learned" if self.fails else ""

    @property
    def fails(self) -> bool:
        """Whether the map does not depend on what the network learned."""
        return self.random_all[0] > ALIKE or self.random_head[0] > HARDLY_CHANGED


def examine(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    methods: Sequence[Method],
    *,
    steps: int = 16,
    baseline: float = 0.0,
) -> list[Belief]:
    """Checks each method on the class that the network predicts for each image.

    Args:
      key: of the random weights, of the methods' draws and of the random maps.
      model: a Linen module with the contract of `cnnjax.models`, of class logits.
      variables: its `params` and, where it has them, `batch_stats`.
      image: float `[batch, height, width, channels]`, as the model expects it.
      methods: of `named.read`.
      steps: of the deletion and insertion curves.
      baseline: value of a hidden pixel, in the units of `image`.

    Returns:
      A `Belief` for each method, and one for random maps, the last.

    Raises:
      UserError: there are no images, or the model's outputs are no class logits.
    """
    if not len(image):
        raise UserError("there are no images to check the methods on: give at least one.")
    of_maps, of_weights, of_methods = jax.random.split(key, 3)
    label = metrics.predicted_label(jax.jit(model.apply)(variables, image))
    changed = list(checks.reinitialized_from_the_top(of_weights, model, variables, image))
    networks = [variables, changed[0][1], changed[-1][1]]

    @functools.partial(jax.jit, static_argnums=0)
    def draw(method: Method, variables: Any) -> jax.Array:
        return method(of_methods, model, variables, image, targets.class_score(label))

    @jax.jit
    def curves(map_: jax.Array) -> tuple[jax.Array, jax.Array]:
        arguments = model, variables, image, targets.class_probability(label), map_
        deleted = checks.deletion_curve(*arguments, steps=steps, baseline=baseline)
        inserted = checks.insertion_curve(*arguments, steps=steps, baseline=baseline)
        return jnp.mean(deleted, 0), jnp.mean(inserted, 0)

    random = [jax.random.normal(each, image.shape[:3]) for each in jax.random.split(of_maps, 3)]
    found = []
    for text, maps in [
        *((method.text, [draw(method, each) for each in networks]) for method in methods),
        (RANDOM, random),
    ]:
        alike = [checks.rank_correlation(maps[0], other) for other in maps[1:]]
        found.append(Belief(text, *map(_mean_and_spread, (*curves(maps[0]), *alike))))
    return found


def _mean_and_spread(values: Any) -> tuple[float, float]:
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std())


def table(beliefs: Sequence[Belief], count: int) -> str:
    """Returns the lines that the command prints, under a heading that says what they mean."""
    width = max(len(belief.method) for belief in beliefs)
    names = "  ".join(f"{name:>14}" for name in beliefs[0].cells())
    lines = [f"Over {count} images. {MEANING}", f"{'':{width}}  {names}"]
    for belief in beliefs:
        cells = "  ".join(f"{text:>14}" for text in belief.cells().values())
        lines.append(f"{belief.method:{width}}  {cells}  {belief.verdict}".rstrip())
    return "\n".join(lines)
