"""A table that says of each method whether its maps can be believed, on some test images."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import aligned, metrics, trees
from cnnjax.errors import UserError
from cnnjax.explain import checks, gradients, targets
from cnnjax.explain.named import Method

# A map that is still so much like that of a network with random weights does not show what the
# network learned. (Two maps of unlike networks share the image, hence more than 0.)
ALIKE = 0.5
# Nor does one that hardly changes when only the last layer, which tells classes apart, is random.
HARDLY_CHANGED = 0.9
# Integrated gradients whose sums are further off are not integrated.
COMPLETE, MOST_STEPS = 0.01, 3200
# What the row of random maps is called.
RANDOM = "random map"
# What each column says.
COLUMNS = {
    "deletion": "mean probability of the predicted class while the pixels that the map ranks "
    "highest are hidden: lower is better, against random maps",
    "insertion": "the same while they are shown: higher is better",
    "sensitivity_n": "correlation of the map's sum over a random tenth of the pixels with what "
    "hiding them takes from the class's score: higher is better",
    "random_head": "rank correlation with the map of the same network whose last layer has random "
    f"weights: a map that stays above {HARDLY_CHANGED} does not depend on what was learned",
    "random_all": f"the same with all layers random: not above {ALIKE}",
    "random_labels": "the same of a network trained on permuted labels, which has learned images "
    f"by heart and no classes: not above {ALIKE}",
}


class Belief(NamedTuple):
    """What the checks say of one method: means and standard deviations over images.

    Attributes:
      method: how it was written.
      deletion, insertion: mean of the curve of each image.
      sensitivity_n: of `checks.sensitivity_n`.
      random_head, random_all: rank correlation with the maps of the changed networks.
      random_labels: of a network trained on permuted labels; None where none was given.
      layers: mean rank correlation where one layer alone is random, by its path, last layer first;
        empty where that was not asked for.
    """

    method: str
    deletion: tuple[float, float]
    insertion: tuple[float, float]
    sensitivity_n: tuple[float, float]
    random_head: tuple[float, float]
    random_all: tuple[float, float]
    random_labels: tuple[float, float] | None = None
    layers: dict[str, float] = {}  # noqa: RUF012

    def cells(self) -> dict[str, str]:
        """Returns the numbers as texts, by what they are called."""
        known = {name: getattr(self, name) for name in COLUMNS}
        return {
            _heading(name): "{:.3f} ± {:.3f}".format(*value)
            for name, value in known.items()
            if value is not None
        }

    @property
    def verdict(self) -> str:
        """What is to be said of a method that fails; else nothing."""
        return "fails: does not depend on what was learned" if self.fails else ""

    @property
    def fails(self) -> bool:
        """Whether the map does not depend on what the network learned."""
        alike = [self.random_all, *filter(None, [self.random_labels])]
        return max(mean for mean, _ in alike) > ALIKE or self.random_head[0] > HARDLY_CHANGED


def examine(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    methods: Sequence[Method],
    *,
    steps: int = 16,
    baseline: float = 0.0,
    permuted: Any = None,
    independent: bool = False,
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
      permuted: variables of the same model trained on permuted labels (Adebayo et al. 2018, section
        4); None for none.
      independent: whether maps of networks of which one layer alone is random are compared too
        (section 3.2): a map for each layer.

    Returns:
      A `Belief` for each method, and one for random maps, the last.

    Raises:
      UserError: there are no images, the model's outputs are no class logits, or `permuted` is of
        another model.
    """
    if not len(image):
        raise UserError("there are no images to check the methods on: give at least one.")
    of_maps, of_weights, of_methods, of_subsets = jax.random.split(key, 4)
    label = metrics.predicted_label(jax.jit(model.apply)(variables, image))
    changed = list(checks.reinitialized_from_the_top(of_weights, model, variables, image))
    networks = {"own": variables, "random_head": changed[0][1], "random_all": changed[-1][1]}
    if permuted is not None:
        check_same_network(variables, permuted)
        networks["random_labels"] = permuted
    layers = {}
    if independent:
        one_by_one = checks.reinitialized_from_the_top(
            of_weights, model, variables, image, cascade=False
        )
        layers = dict(one_by_one)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(method: Method, variables: Any, image: jax.Array) -> jax.Array:
        return method(of_methods, model, variables, image, targets.class_score(label))

    @jax.jit
    def measured(map_: jax.Array, image: jax.Array) -> dict[str, jax.Array]:
        arguments = model, variables, image, targets.class_probability(label), map_
        options: dict[str, Any] = {"steps": steps, "baseline": baseline}
        scored = model, variables, image, targets.class_score(label), map_
        return {
            "deletion": jnp.mean(checks.deletion_curve(*arguments, **options), 0),
            "insertion": jnp.mean(checks.insertion_curve(*arguments, **options), 0),
            "sensitivity_n": checks.sensitivity_n(of_subsets, *scored, baseline=baseline),
        }

    def random(count: int) -> list[jax.Array]:
        return [
            jax.random.normal(each, image.shape[:3]) for each in jax.random.split(of_maps, count)
        ]

    found = []
    for method in [*methods, None]:
        if method is None:
            maps = dict(zip([*networks, *layers], random(len(networks) + len(layers)), strict=True))
        else:
            maps = {name: draw(method, each, image) for name, each in (networks | layers).items()}
        own = maps.pop("own")
        alike = {name: checks.rank_correlation(own, other) for name, other in maps.items()}
        scores = measured(own, image) | {
            name: each for name, each in alike.items() if name in networks
        }
        found.append(
            Belief(
                method.text if method else RANDOM,
                **{name: _mean_and_spread(each) for name, each in scores.items()},
                layers={name: float(jnp.mean(alike[name])) for name in layers},
            )
        )
    return found


def check_same_network(variables: Any, permuted: Any) -> None:
    """Raises a UserError unless two sets of variables are of the same model."""
    own, other = (
        {path: leaf.shape for path, leaf in trees.named_leaves(each).items()}
        for each in (variables, permuted)
    )
    differing = [path for path in own | other if own.get(path) != other.get(path)]
    if differing:
        raise UserError(
            f"the network of permuted labels is another one ({differing[0]} is "
            f"{other.get(differing[0], 'missing')}, not {own.get(differing[0], 'there')}): train "
            "the same model with the same classes."
        )


def _mean_and_spread(values: Any) -> tuple[float, float]:
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std())


def _heading(name: str) -> str:
    return name.replace("sensitivity_n", "sensitivity-n").replace("_", " ")


def meaning(beliefs: Sequence[Belief]) -> str:
    """Returns what the columns of a table say, on one line."""
    shown = [name for name in COLUMNS if getattr(beliefs[0], name) is not None]
    return "; ".join(f"{_heading(name)}: {COLUMNS[name]}" for name in shown) + "."


def table(beliefs: Sequence[Belief], count: int) -> str:
    """Returns the lines that the command prints, under a heading that says what they mean."""
    width = max(len(belief.method) for belief in beliefs)
    names = "  ".join(f"{name:>14}" for name in beliefs[0].cells())
    lines = [f"Over {count} images. {meaning(beliefs)}", f"{'':{width}}  {names}"]
    for belief in beliefs:
        cells = "  ".join(f"{text:>14}" for text in belief.cells().values())
        lines.append(f"{belief.method:{width}}  {cells}  {belief.verdict}".rstrip())
    return "\n".join(lines)


LAYERS_MEANING = (
    "One layer alone random: mean rank correlation with the map of the network as it is. A layer "
    "on which a map does not depend leaves it near 1."
)


def layer_rows(beliefs: Sequence[Belief]) -> list[dict[str, str]]:
    """Returns a row for each layer that was made random alone: `layer`, then a cell a method."""
    return [
        {"layer": layer} | {belief.method: f"{belief.layers[layer]:.3f}" for belief in beliefs}
        for layer in beliefs[0].layers
    ]


def layer_table(beliefs: Sequence[Belief]) -> str:
    """Returns the lines of `layer_rows` under a heading that says what they mean."""
    rows = layer_rows(beliefs)
    cells = [["", *list(rows[0])[1:]], *(list(row.values()) for row in rows)]
    return "\n".join([LAYERS_MEANING, *aligned.lines(cells, "lr")])


class Completeness(NamedTuple):
    """How far a map of integrated gradients is from what it must add up to.

    Attributes:
      method: how it was written.
      error: sum over images of the absolute difference, relative to the sum of what it must be.
      worst: the largest relative error of an image.
      steps: with which the error is below `COMPLETE`; those of the method where it is, 0 where
        `MOST_STEPS` do not suffice.
    """

    method: str
    error: float
    worst: float
    steps: int

    @property
    def text(self) -> str:
        """One line for people."""
        start = f"{self.method} is complete to {self.error:.2%} (worst image {self.worst:.2%})"
        if self.error <= COMPLETE:
            return start
        if not self.steps:
            return f"{start}: above {COMPLETE:.0%} with {MOST_STEPS} steps too"
        return f"{start}: above {COMPLETE:.0%}; below with steps={self.steps}"


def completeness(
    method: Method, model: nn.Module, variables: Any, image: jax.Array
) -> Completeness:
    """Compares the sums of integrated gradients of the predicted classes with what they must be.

    Args:
      method: of the name `integrated_gradients`; its options count.
      model, variables, image: as for `examine`.
    """
    options = dict(method.options)
    steps = options.pop(
        "steps", inspect.signature(gradients.integrated_gradients).parameters["steps"].default
    )
    options.pop("channels", None)
    label = metrics.predicted_label(jax.jit(model.apply)(variables, image))

    @functools.partial(jax.jit, static_argnums=0)
    def compared(steps: int, variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        arguments = model, variables, image, targets.class_score(label)
        map_ = gradients.integrated_gradients(*arguments, steps=steps, **options)
        return checks.completeness(*arguments, map_, baseline=options.get("baseline", 0.0))

    def errors(steps: int) -> tuple[float, float]:
        total, difference = (
            np.asarray(each, np.float64) for each in compared(steps, variables, image)
        )
        wrong, right = np.abs(total - difference), np.maximum(np.abs(difference), 1e-12)
        return float(wrong.sum() / right.sum()), float((wrong / right).max())

    error, worst = errors(steps)
    enough = steps
    while enough and (error if enough == steps else errors(enough)[0]) > COMPLETE:
        enough = 2 * enough if 2 * enough <= MOST_STEPS else 0
    return Completeness(method.text, error, worst, enough)
