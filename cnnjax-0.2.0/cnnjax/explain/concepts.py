"""Whether a concept that people name, such as "striped", speaks for a class: TCAV.

Kim et al. 2018, "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept
Activation Vectors" (arXiv 1711.11279). A linear classifier tells a layer's activations of images
of the concept from those of other images; its normal is the concept's direction. The score is the
fraction of a class's images whose logit rises in that direction. A direction can be found for any
set of images, also a random one: a score counts only against the scores of random sets.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from cnnjax.errors import UserError
from cnnjax.explain import taps, targets

HELD_OUT = 1 / 3
BATCH_SIZE = 64
FEWEST, FEWEST_REPEATS = 6, 2
SIGNIFICANT = 0.05
# A direction that does not tell held-out images apart (0.5 is chance) is no concept's.
SEPARATES = 0.7


class ConceptVector(NamedTuple):
    """The direction of a concept in a layer.

    Attributes:
      direction: `[features]`, of length 1.
      accuracy: of the classifier on held-out images, the mean over both sets; 0.5 is chance.
    """

    direction: np.ndarray
    accuracy: float


class Concept(NamedTuple):
    """What the test says of a concept, a layer and a class.

    Attributes:
      concept, layer, label: which.
      score, spread: mean and standard deviation of the TCAV score over random counterparts.
      random_score: mean score of random sets against each other.
      p_value: of the two-sided t-test of both, times the number of tests (Bonferroni), at most 1.
      accuracy: mean accuracy of the concept's classifiers on held-out images.
    """

    concept: str
    layer: str
    label: int
    score: float
    spread: float
    random_score: float
    p_value: float
    accuracy: float

    @property
    def is_significant(self) -> bool:
        """Whether the score is another than that of random sets, and the direction separates."""
        return self.p_value <= SIGNIFICANT and self.accuracy >= SEPARATES

    @property
    def verdict(self) -> str:
        """What is to be said of it."""
        if self.accuracy < SEPARATES:
            return "the layer does not separate the concept"
        if self.p_value > SIGNIFICANT:
            return "no more than random images"
        return f"speaks {'for' if self.score > self.random_score else 'against'} the class"


def concept_vector(
    positive: np.ndarray, negative: np.ndarray, *, seed: int = 0, held_out: float = HELD_OUT
) -> ConceptVector:
    """Finds the direction that leads from images without a concept to those with it.

    Section 3.2, by scikit-learn's logistic regression. Activations are divided by one number, their
    standard deviation, so that its penalty means the same in each layer.

    Args:
      positive, negative: activations `[images, features]` with and without the concept.
      seed: chooses the images that are held out.
      held_out: fraction of both sets that only measures the accuracy.

    Raises:
      UserError: sets of fewer than 6 images, of other features, or whose activations are constant.
    """
    from sklearn.linear_model import LogisticRegression

    if positive.ndim != 2 or negative.ndim != 2 or positive.shape[1] != negative.shape[1]:
        raise UserError(
            f"activations are [images, features] of one layer, not {positive.shape} and "
            f"{negative.shape}."
        )
    if min(len(positive), len(negative)) < FEWEST:
        raise UserError(
            f"{len(positive)} images of the concept and {len(negative)} others: give {FEWEST} or "
            "more of each, better 50."
        )
    generator = np.random.default_rng(seed)
    x = np.concatenate([positive, negative]).astype(np.float64)
    is_concept = np.arange(len(x)) < len(positive)
    is_held = np.zeros(len(x), bool)
    for rows in (np.flatnonzero(is_concept), np.flatnonzero(~is_concept)):
        is_held[generator.permutation(rows)[: max(1, round(held_out * len(rows)))]] = True
    center, scale = x[~is_held].mean(0), x[~is_held].std()
    if not scale > 0:
        raise UserError("the layer's activations are the same for all images: choose another.")
    x = (x - center) / scale
    # With fewer images than features the answer lies in the images' span, where it is found fast.
    _, _, basis = np.linalg.svd(x[~is_held], full_matrices=False)
    found = LogisticRegression(class_weight="balanced", max_iter=1000, tol=1e-3)
    found.fit(x[~is_held] @ basis.T, is_concept[~is_held])
    right = found.predict(x[is_held] @ basis.T) == is_concept[is_held]
    accuracy = np.mean([right[is_concept[is_held] == kind].mean() for kind in (True, False)])
    direction = found.coef_[0] @ basis
    return ConceptVector(direction / np.linalg.norm(direction), float(accuracy))


def activations(model: nn.Module, variables: Any, image: jax.Array, layer: str) -> np.ndarray:
    """Returns a layer's activations of images, flattened, `[images, features]`.

    Args:
      model, variables, layer: as for `taps.tap`.
      image: `[images, height, width, channels]`, as the model expects them; passed in batches.
    """
    return _in_batches(_reader(model, layer), variables, image)


def gradients(
    model: nn.Module, variables: Any, image: jax.Array, label: int, layer: str
) -> np.ndarray:
    """Returns the gradients of a class's logit with respect to a layer, `[images, features]`.

    Their product with a direction is the directional derivative of equation 1. Arguments as for
    `activations`.
    """
    return _in_batches(_slope_reader(model, layer), variables, image, label)


def _reader(model: nn.Module, layer: str) -> Any:
    @jax.jit
    def read(variables: Any, image: jax.Array) -> jax.Array:
        return taps.tap(model, variables, image, [layer])[1][layer].reshape(len(image), -1)

    return read


def _slope_reader(model: nn.Module, layer: str) -> Any:
    @jax.jit
    def read(variables: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        target = targets.class_score(label)
        found = taps.activations_and_gradients(model, variables, image, target, [layer])[1]
        return found[layer].reshape(len(image), -1)

    return read


def _in_batches(read: Any, variables: Any, image: jax.Array, *others: Any) -> np.ndarray:
    """Returns what `read` says of all images, in batches of one size: it is compiled once."""
    pixels, parts = np.asarray(image), []
    for start in range(0, len(pixels), BATCH_SIZE):
        part = pixels[start : start + BATCH_SIZE]
        padding = [(0, BATCH_SIZE - len(part))] + [(0, 0)] * (pixels.ndim - 1)
        found = read(variables, np.pad(part, padding), *others)
        parts.append(np.asarray(found[: len(part)], np.float32))
    return np.concatenate(parts)


def tcav_score(gradients: np.ndarray, direction: np.ndarray) -> float:
    """Returns the fraction of images whose target rises in a direction: equation 2."""
    return float(np.mean(gradients @ direction > 0))


def p_value(scores: Sequence[float], random_scores: Sequence[float], tests: int = 1) -> float:
    """Returns that of the two-sided t-test of two sets of scores (section 3.4).

    Welch's, which does not take their variances for the same.

    Args:
      scores, random_scores: two or more each.
      tests: how many are made: the value is multiplied by it, at most 1 (Bonferroni).

    Raises:
      UserError: fewer than two scores.
    """
    import scipy.stats

    if min(len(scores), len(random_scores)) < 2:
        raise UserError("a t-test needs two scores or more on each side: more repeats.")
    if not (np.std(scores) or np.std(random_scores)):
        return float(np.mean(scores) == np.mean(random_scores))
    with warnings.catch_warnings():
        # Scores that are all 1 have no variance, which is no loss of precision.
        warnings.filterwarnings("ignore", message="Precision loss")
        found = scipy.stats.ttest_ind(scores, random_scores, equal_var=False)
    return min(1.0, float(found.pvalue) * tests)


def tcav(
    model: nn.Module,
    variables: Any,
    concepts: Mapping[str, jax.Array],
    others: jax.Array,
    of_class: Mapping[int, jax.Array],
    layers: Sequence[str],
    *,
    repeats: int = 20,
    seed: int = 0,
) -> list[Concept]:
    """Tests each concept in each layer for each class.

    Args:
      model: a Linen module with the contract of `cnnjax.models`, of class logits.
      variables: its `params` and, where it has them, `batch_stats`.
      concepts: name -> images `[images, height, width, channels]` with the concept, as the model
        expects them.
      others: random images, of which counterparts as large as the concept's are drawn: 50 or more.
      of_class: class -> images of it, whose scores are asked.
      layers: names as for `taps.tap`.
      repeats: random counterparts, each with a direction of its own.
      seed: chooses them.

    Returns:
      A `Concept` for each concept, layer and class, in this order.

    Raises:
      UserError: too few images or repeats, an unknown layer, or a class that the network lacks.
    """
    import threadpoolctl

    if repeats < FEWEST_REPEATS:
        raise UserError(f"repeats={repeats}: give {FEWEST_REPEATS} or more, better 20.")
    for label, image in of_class.items():
        if not len(image):
            raise UserError(f"there are no images of class {label}.")
        outputs = jax.eval_shape(lambda image: taps.outputs_of(model, variables, image), image)
        jax.eval_shape(targets.class_score(label), outputs)
    tests = len(concepts) * len(layers) * len(of_class)
    found: dict[tuple[str, str, int], Concept] = {}
    for layer in layers:
        read, read_slope = _reader(model, layer), _slope_reader(model, layer)
        known = {name: _in_batches(read, variables, image) for name, image in concepts.items()}
        random = _in_batches(read, variables, others)
        slopes = {
            label: _in_batches(read_slope, variables, image, label)
            for label, image in of_class.items()
        }
        for name, positive in known.items():
            generator = np.random.default_rng([seed, len(positive)])
            size = min(len(positive), len(random) // 2)
            draws = [generator.permutation(len(random))[: 2 * size] for _ in range(repeats)]
            # Many small fits: threads would wait for each other.
            with threadpoolctl.threadpool_limits(1):
                vectors = [
                    concept_vector(positive, random[rows[:size]], seed=number)
                    for number, rows in enumerate(draws)
                ]
                by_chance = [
                    concept_vector(random[rows[size:]], random[rows[:size]], seed=number)
                    for number, rows in enumerate(draws)
                ]
            for label, slope in slopes.items():
                scores, baseline = (
                    [tcav_score(slope, each.direction) for each in vectors_]
                    for vectors_ in (vectors, by_chance)
                )
                found[name, layer, label] = Concept(
                    *(name, layer, label, float(np.mean(scores)), float(np.std(scores))),
                    random_score=float(np.mean(baseline)),
                    p_value=p_value(scores, baseline, tests),
                    accuracy=float(np.mean([vector.accuracy for vector in vectors])),
                )
    return [
        found[name, layer, label] for name in concepts for layer in layers for label in of_class
    ]


def table(found: Sequence[Concept], class_names: Sequence[str]) -> str:
    """Returns the lines that say what was found, under a heading that says what they mean."""
    rows = [("concept", "layer", "class", "accuracy", "TCAV", "random", "p", "")]
    for each in found:
        p = "<0.001" if each.p_value < 0.001 else f"{each.p_value:.3f}"
        score = f"{each.score:.2f} ± {each.spread:.2f}"
        name = str(class_names[each.label])
        numbers = f"{each.accuracy:.2f}", score, f"{each.random_score:.2f}", p
        rows.append((each.concept, each.layer, name, *numbers, each.verdict))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([f"{MEANING}", *lines])


MEANING = (
    "TCAV: fraction of the class's images whose logit rises toward the concept; random: the same "
    "toward random images; p: of the difference, times the number of tests; accuracy: of the "
    f"concept's classifier on images held out (0.5 is chance; below {SEPARATES} the concept means "
    "nothing there)."
)
