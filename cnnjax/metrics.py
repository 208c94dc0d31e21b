"""Metrics that add up: `(sum, count)` pairs and confusion counts, and what is computed from them.

Batches, devices and processes are merged by addition, so the number does not depend on how the
data were cut. Counts are int32 and exact. A `mask` is bool `[batch]`; False marks padding, which
counts nowhere, whatever it holds; None means that every example counts.
"""

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cnnjax.errors import UserError

PyTree = Any
Pair = tuple[jax.Array, jax.Array]


def mean(values: ArrayLike, weights: ArrayLike | None = None) -> Pair:
    """Returns the pair whose quotient is the weighted mean.

    Args:
      values: `[batch, ...]`, such as a loss; summed in float32 at least.
      weights: of the same shape: a mask (bool, counted exactly), numbers of at least 0, or None
        for 1 each. A value of weight 0 may be anything, NaN too.

    Returns:
      `(sum, count)`: scalars, float32 (or float64) and int32; the dtype of the weights where they
      are numbers.
    """
    values = jnp.asarray(values)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if weights is not None and jnp.asarray(weights).dtype != jnp.bool_:
        weights = jnp.asarray(weights)
        return jnp.sum(jnp.where(weights != 0, values * weights, 0)), jnp.sum(weights)
    mask = _mask_like(values, weights)
    # Selected, not multiplied: a NaN in the padding must not reach the sum.
    return jnp.sum(jnp.where(mask, values, 0)), jnp.sum(mask, dtype=jnp.int32)


def accuracy(logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None) -> Pair:
    """Returns (number of right predictions, number of examples), both int32.

    >>> right, count = accuracy(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1]))
    >>> int(right), int(count)
    (1, 2)

    Args:
      logits: `[batch, classes]`, or `[batch, 1]` of a binary classifier.
      labels: integers `[batch]`, or one-hot or soft labels `[batch, classes]`, of which the
        heaviest class counts.
      mask: bool `[batch]`, or None.

    A row of logits with a NaN in it is never right.
    """
    logits = jnp.asarray(logits)
    right = predicted_label(logits) == _class_numbers(labels, logits.shape[:-1])
    return _count(right & ~jnp.any(jnp.isnan(logits), axis=-1), mask)


def top_k_accuracy(
    logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, *, k: int = 5
) -> Pair:
    """Returns (number of examples whose label is among the `k` largest logits, number of examples).

    Among equal logits the lower class comes first, as in `predicted_label`, so `k=1` is `accuracy`.

    Args:
      logits: `[batch, classes]`.
      labels: as for `accuracy`.
      mask: bool `[batch]`, or None.
      k: from 1 to the number of classes.

    Raises:
      UserError: `k` is out of that range.
    """
    logits = jnp.asarray(logits)
    num_classes = logits.shape[-1]
    if not 1 <= k <= num_classes:
        raise UserError(f"k must be from 1 to the number of classes {num_classes}, not {k}.")
    labels = _class_numbers(labels, logits.shape[:-1])[..., None]
    label_logit = jnp.take_along_axis(logits, jnp.clip(labels, 0, num_classes - 1), axis=-1)
    classes = jnp.arange(num_classes)
    before = (logits > label_logit) | ((logits == label_logit) & (classes < labels))
    valid = ((labels >= 0) & (labels < num_classes))[..., 0]
    valid &= ~jnp.any(jnp.isnan(logits), axis=-1)
    return _count((jnp.sum(before, axis=-1) < k) & valid, mask)


def predicted_label(logits: ArrayLike) -> jax.Array:
    """Returns the likeliest class, int32 `[batch]`: the lowest one among equals.

    One logit, `[batch, 1]`, predicts class 1 where it is positive.
    """
    logits = jnp.asarray(logits)
    if logits.shape[-1] == 1:
        return (logits[..., 0] > 0).astype(jnp.int32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def probabilities(logits: ArrayLike) -> jax.Array:
    """Returns the classes' probabilities `[batch, classes]`, float32 (float64 for float64 logits).

    They are the softmax of the logits; one logit, `[batch, 1]`, gives the columns `[1 - p, p]` with
    `p = sigmoid(logit)`.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if logits.shape[-1] == 1:
        # 1 - p is computed as sigmoid(-logit), which is exact where p rounds to 1.
        return jax.nn.sigmoid(jnp.concatenate([-logits, logits], axis=-1))
    return jax.nn.softmax(logits, axis=-1)


def confusion_counts(
    labels: ArrayLike,
    predictions: ArrayLike,
    mask: ArrayLike | None = None,
    num_classes: int | None = None,
) -> jax.Array:
    """Counts examples by true and predicted class.

    Args:
      labels: integers `[batch]`, or one-hot or soft labels `[batch, classes]`.
      predictions: integers `[batch]`, such as `predicted_label(logits)`.
      mask: bool `[batch]`, or None.
      num_classes: the side of the matrix, never guessed; 2 for a model with one logit.

    Returns:
      int32 `[num_classes, num_classes]`, true class by row, predicted class by column. A class
      number outside `[0, num_classes)` counts nowhere.

    Raises:
      UserError: no `num_classes`, or shapes that do not go together.
    """
    if num_classes is None:
        raise UserError("confusion_counts needs num_classes: classes may be missing from a batch.")
    predictions = jnp.asarray(predictions).astype(jnp.int32)
    labels = _class_numbers(labels, predictions.shape)
    counted = _mask_like(labels, mask)
    for numbers in (labels, predictions):
        counted &= (numbers >= 0) & (numbers < num_classes)
    cells = jnp.where(counted, labels * num_classes + predictions, num_classes**2)
    counts = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(1, mode="drop")
    return counts.reshape(num_classes, num_classes)


def merge(first: PyTree, second: PyTree) -> PyTree:
    """Adds two results of the same metrics: pairs and confusion counts alike.

    Raises:
      UserError: the two hold different metrics.
    """
    structures: list[Any] = [jax.tree.structure(tree) for tree in (first, second)]
    if structures[0] != structures[1]:
        names = [sorted(tree) if isinstance(tree, Mapping) else tree for tree in (first, second)]
        raise UserError(f"metrics {names[0]} and {names[1]} cannot be added: they differ in kind.")
    return jax.tree.map(operator.add, first, second)


def pairs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that are `(sum, count)` pairs, without arrays of counts."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, tuple | list) and len(value) == 2
    }


def finalize(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Divides each `(sum, count)` pair, in float64 on the host; NaN where nothing was counted.

    Entries that are no pairs, such as confusion counts, are left out. Under a JAX transformation
    the quotients are arrays instead of floats.
    """
    return {name: _quotient(*value) for name, value in pairs(metrics).items()}


def precision_recall_f1(confusion: ArrayLike) -> dict[str, jax.Array]:
    """Scores each class by its confusion counts.

    precision = right / predicted, recall = right / examples, F1 = 2 right / (predicted + examples).
    A quotient 0 / 0 is 0, as in scikit-learn: a class that is never predicted has precision 0, one
    without examples has recall 0.

    Args:
      confusion: counts `[classes, classes]`, true class by row.

    Returns:
      `precision`, `recall`, `f1`: float32 `[classes]`; `support`, the number of examples: int32.
    """
    confusion = jnp.asarray(confusion)
    right, examples, predicted = jnp.diagonal(confusion), confusion.sum(1), confusion.sum(0)
    return {
        "precision": _divide(right, predicted, empty=0.0),
        "recall": _divide(right, examples, empty=0.0),
        "f1": _divide(2 * right, predicted + examples, empty=0.0),
        "support": examples.astype(jnp.int32),
    }


def macro_average(confusion: ArrayLike) -> dict[str, jax.Array]:
    """Averages precision, recall and F1 over the classes, each with the same weight.

    A class that is neither predicted nor has examples is left out, as in scikit-learn.

    Args:
      confusion: counts `[classes, classes]`, true class by row.

    Returns:
      `precision`, `recall`, `f1`: float32 scalars, NaN where nothing was counted.
    """
    confusion = jnp.asarray(confusion)
    present = (confusion.sum(0) + confusion.sum(1)) > 0
    scores = precision_recall_f1(confusion)
    return {
        name: _divide(jnp.sum(jnp.where(present, scores[name], 0.0)), present.sum(), empty=jnp.nan)
        for name in ("precision", "recall", "f1")
    }


def micro_average(confusion: ArrayLike) -> dict[str, jax.Array]:
    """Computes precision, recall and F1 from the counts of all classes together.

    With one label and one prediction an example all three equal the accuracy.

    Args:
      confusion: counts `[classes, classes]`, true class by row.

    Returns:
      `precision`, `recall`, `f1`: float32 scalars, NaN where nothing was counted.
    """
    confusion = jnp.asarray(confusion)
    score = _divide(jnp.trace(confusion), confusion.sum(), empty=jnp.nan)
    return {"precision": score, "recall": score, "f1": score}


def iou(confusion: ArrayLike) -> np.ndarray:
    """Returns the intersection over union of each class, float64 `[classes]`, on the host.

    right / (examples + predicted - right), Jaccard's index; NaN for a class that is neither
    predicted nor has examples: average with `class_mean`.

    Args:
      confusion: counts `[classes, classes]`, true class by row; of pixels, for a class map.
    """
    right, examples, predicted = _class_counts(confusion)
    return _ratio(right, examples + predicted - right)


def dice(confusion: ArrayLike) -> np.ndarray:
    """Returns the Dice coefficient of each class, float64 `[classes]`, on the host.

    2 right / (examples + predicted), which is its F1; NaN for a class that is neither predicted nor
    has examples.

    Args:
      confusion: as for `iou`.
    """
    right, examples, predicted = _class_counts(confusion)
    return _ratio(2 * right, examples + predicted)


def class_mean(scores: np.ndarray) -> float:
    """Returns the mean of the scores that are numbers; NaN if none is."""
    numbers = scores[~np.isnan(scores)]
    return float(numbers.mean()) if numbers.size else float("nan")


def roc_auc(scores: ArrayLike, positives: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
    """Area under the receiver operating characteristic.

    It is the chance that a positive example scores higher than a negative one, ties counting half
    (the Mann-Whitney statistic; Fawcett 2006, "An introduction to ROC analysis", section 7).

    Args:
      scores: float `[batch]`, larger for likelier positives.
      positives: bool or 0/1 `[batch]`.
      mask: bool `[batch]`, or None.

    Returns:
      float32 scalar (float64 for float64 scores); NaN without a positive or without a negative
      example, or where a counted score is NaN.
    """
    scores = jnp.asarray(scores)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    mask = _mask_like(scores, mask)
    positive = jnp.asarray(positives).astype(bool) & mask
    negative = ~jnp.asarray(positives).astype(bool) & mask
    num_negatives = jnp.sum(negative)
    # Infinity sorts everything that is no negative example to the end.
    negative_scores = jnp.sort(jnp.where(negative, scores, jnp.inf))
    lower = jnp.searchsorted(negative_scores, scores, side="left")
    not_higher = jnp.searchsorted(negative_scores, scores, side="right")
    not_higher = jnp.minimum(not_higher, num_negatives)
    beaten = _divide((lower + not_higher).astype(scores.dtype), 2 * num_negatives, empty=jnp.nan)
    area = _divide(jnp.sum(jnp.where(positive, beaten, 0)), jnp.sum(positive), empty=jnp.nan)
    return jnp.where(jnp.any(jnp.isnan(scores) & mask), jnp.nan, area)


def roc_auc_one_vs_rest(
    probabilities: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
    """Area under the ROC of each class against all others.

    Args:
      probabilities: `[batch, classes]`; any score that grows with the class's likelihood will do.
      labels: integers `[batch]`, or one-hot or soft labels `[batch, classes]`.
      mask: bool `[batch]`, or None.

    Returns:
      `[classes]`; NaN for a class without examples (average with `jnp.nanmean`).
    """
    probabilities = jnp.asarray(probabilities)
    labels = _class_numbers(labels, probabilities.shape[:-1])
    mask = _mask_like(labels, mask)

    def one_class(number_and_scores: tuple[jax.Array, jax.Array]) -> jax.Array:
        number, scores = number_and_scores
        return roc_auc(scores, labels == number, mask)

    # One class after another: all at once would hold several copies of [batch, classes].
    return jax.lax.map(one_class, (jnp.arange(probabilities.shape[-1]), probabilities.T))


def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None = None,
    num_bins: int = 15,
) -> jax.Array:
    """How far confidence is from accuracy.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, equation (3): examples
    are put by their largest probability into `num_bins` bins `((m - 1) / M, m / M]`, and

        ECE = sum_m |B_m| / n * |accuracy(B_m) - mean confidence(B_m)|

    Args:
      probabilities: `[batch, classes]`, as from `probabilities`.
      labels: integers `[batch]`, or one-hot or soft labels `[batch, classes]`.
      mask: bool `[batch]`, or None.
      num_bins: `M`; 15 in the paper.

    Returns:
      float32 scalar in [0, 1] (float64 for float64 probabilities); NaN without an example.
    """
    if num_bins < 1:
        raise UserError(f"num_bins must be 1 or more, not {num_bins}.")
    probabilities = jnp.asarray(probabilities)
    mask = _mask_like(probabilities[..., 0], mask)
    confidence = jnp.max(probabilities, axis=-1)
    right = jnp.argmax(probabilities, axis=-1) == _class_numbers(labels, probabilities.shape[:-1])
    upper_edges = jnp.arange(1, num_bins + 1, dtype=confidence.dtype) / num_bins
    bins = jnp.minimum(jnp.searchsorted(upper_edges, confidence, side="left"), num_bins - 1)
    # |B_m| / n * |accuracy - confidence| = |sum of (right - confidence) over B_m| / n
    gaps = jnp.where(mask, right - confidence, 0)
    gap_of_bin = jnp.zeros(num_bins, confidence.dtype).at[bins].add(gaps)
    return _divide(jnp.sum(jnp.abs(gap_of_bin)), jnp.sum(mask), empty=jnp.nan)


def _class_numbers(labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Labels as int32 class numbers: of one-hot or soft rows the heaviest class."""
    labels = jnp.asarray(labels)
    if labels.ndim == len(shape) + 1:
        labels = labels[..., 0] if labels.shape[-1] == 1 else jnp.argmax(labels, axis=-1)
    if labels.shape != shape:
        raise UserError(
            f"there are labels {list(labels.shape)} for predictions {list(shape)}: "
            "give one label an example."
        )
    # The label of a binary task may be a probability.
    return jnp.round(labels).astype(jnp.int32)


def _mask_like(values: jax.Array, mask: ArrayLike | None) -> jax.Array:
    if mask is None:
        return jnp.ones(values.shape, bool)
    mask = jnp.asarray(mask).astype(bool)
    if mask.shape != values.shape:
        raise UserError(
            f"the mask has shape {list(mask.shape)}, but there are values {list(values.shape)}: "
            "give one bool an example."
        )
    return mask


def _count(right: jax.Array, mask: ArrayLike | None) -> Pair:
    mask = _mask_like(right, mask)
    return jnp.sum(right & mask, dtype=jnp.int32), jnp.sum(mask, dtype=jnp.int32)


def _divide(numerator: jax.Array, denominator: jax.Array, *, empty: float) -> jax.Array:
    """Quotient in float32 at least; `empty` where the denominator is 0."""
    dtype = jnp.promote_types(numerator.dtype, jnp.float32)
    quotient = numerator.astype(dtype) / jnp.maximum(denominator, 1).astype(dtype)
    return jnp.where(denominator > 0, quotient, jnp.asarray(empty, dtype))


def _quotient(total: Any, count: Any) -> Any:
    if isinstance(total, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
        return jnp.where(count == 0, jnp.nan, total / jnp.where(count == 0, 1, count))
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.where(count == 0, np.nan, total / count)
    return quotient.item() if quotient.ndim == 0 else quotient


def _class_counts(confusion: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns right, true and predicted counts of each class: exact, however many pixels."""
    counts = np.asarray(confusion, np.float64)
    return counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)
