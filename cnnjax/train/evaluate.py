"""Evaluation over a whole dataset: metrics, predictions, the table of scores.

Sums and counts are added up on the host, counts as integers and sums in float64, so that the
result does not depend on how the data were cut into batches. Batches are dispatched ahead of the
device: the host never waits for the batch that it has just sent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax import metrics
from cnnjax.devices import processes
from cnnjax.errors import UserError

PyTree = Any

# Enough to keep a device busy, few enough for large results to fit into memory.
_BATCHES_IN_FLIGHT = 8


def evaluate(
    eval_step: Callable[[PyTree, Any], Mapping[str, Any]], variables: PyTree, batches: Iterable[Any]
) -> dict[str, Any]:
    """Evaluates all batches.

    Args:
      eval_step: `(variables, batch) -> metrics`, of which each is a pair (sum, count) or an array
        of counts, as from `cnnjax.train.step.make_eval_step`.
      variables: what `model.apply` takes.
      batches: batches of one dataset, the last one padded and masked.

    Returns:
      For each pair its quotient, a float (NaN where nothing was counted); for each array of counts,
      such as `confusion`, their int64 sum.

    Raises:
      UserError: there are no batches.
    """
    total: PyTree = None
    for result in _fetched(dict(eval_step(variables, batch)) for batch in batches):
        wide = jax.tree.map(_widen, result)
        total = wide if total is None else metrics.merge(total, wide)
    if total is None:
        raise _no_batches()
    counts = {name: value for name, value in total.items() if isinstance(value, np.ndarray)}
    return metrics.finalize(total) | counts


def scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the plain numbers of what `evaluate` returned: all but the arrays of counts."""
    return {name: value for name, value in result.items() if isinstance(value, float)}


def predict_all(
    predict: Callable[[PyTree, Any], Any], variables: PyTree, batches: Iterable[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Predicts all examples, without the padding.

    Args:
      predict: `(variables, image [batch, height, width, channels]) -> probabilities
        [batch, classes]`, as from `cnnjax.train.step.make_predict`.
      variables: what `model.apply` takes.
      batches: dicts of `image`, `label` and `mask`.

    Returns:
      Probabilities, float32 `[examples, classes]`, and labels, `[examples]` or as the batches have
      them, in the order of the batches.

    Raises:
      UserError: there are no batches.
    """
    sent = ((predict(variables, b["image"]), b["label"], b["mask"]) for b in batches)
    parts = [
        (np.asarray(probabilities, np.float32)[mask], label[mask])
        for probabilities, label, mask in _fetched(sent)
    ]
    if not parts:
        raise _no_batches()
    probabilities, labels = zip(*parts, strict=True)
    return np.concatenate(probabilities), np.concatenate(labels)


def confusion(probabilities: Any, labels: Any) -> np.ndarray:
    """Counts examples by true class (row) and likeliest class (column).

    Args:
      probabilities: `[examples, classes]`.
      labels: integers `[examples]`.

    Returns:
      int64 `[classes, classes]`.

    Raises:
      UserError: the shapes do not fit, or a label is not a class.
    """
    probabilities, labels = _checked(probabilities, labels)
    counts = metrics.confusion_counts(
        labels, probabilities.argmax(axis=1), num_classes=probabilities.shape[1]
    )
    return np.asarray(counts, np.int64)


def report(probabilities: Any, labels: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """Scores a classifier's predictions of a whole dataset.

    Args:
      probabilities: `[examples, classes]`.
      labels: integers `[examples]`.
      class_names: one per class.

    Returns:
      Plain Python values, ready for JSON, None where a score is not defined (such as the ROC AUC
      of a class without examples): `examples`, `accuracy`, `expected_calibration_error` (15 bins),
      `macro` and `micro` (`precision`, `recall`, `f1`; `macro` also `roc_auc`, the mean of one
      class against the rest), `classes` (a list of `name`, `precision`, `recall`, `f1`, `roc_auc`,
      `examples`) and `confusion` (rows are true classes). `cnnjax.metrics` defines each.

    Raises:
      UserError: the shapes do not fit, or a label is not a class.
    """
    probabilities, labels = _checked(probabilities, labels)
    if len(class_names) != probabilities.shape[1]:
        raise UserError(
            f"{len(class_names)} class names for {probabilities.shape[1]} columns of "
            "probabilities: give one name a class."
        )
    counts = confusion(probabilities, labels)
    by_class = {key: np.asarray(v) for key, v in metrics.precision_recall_f1(counts).items()}
    areas = np.asarray(metrics.roc_auc_one_vs_rest(probabilities, labels))
    defined_areas = areas[np.isfinite(areas)]
    calibration_error = metrics.expected_calibration_error(probabilities, labels)
    return {
        "examples": len(labels),
        "accuracy": float(counts.trace() / len(labels)),
        "expected_calibration_error": _plain(calibration_error),
        "macro": {name: _plain(value) for name, value in metrics.macro_average(counts).items()}
        | {"roc_auc": float(defined_areas.mean()) if defined_areas.size else None},
        "micro": {name: _plain(value) for name, value in metrics.micro_average(counts).items()},
        "classes": [
            {
                "name": name,
                "precision": _plain(by_class["precision"][index]),
                "recall": _plain(by_class["recall"][index]),
                "f1": _plain(by_class["f1"][index]),
                "roc_auc": _plain(areas[index]),
                "examples": int(by_class["support"][index]),
            }
            for index, name in enumerate(class_names)
        ],
        "confusion": counts.tolist(),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Sets what `report` returned as a text table, one row a class, without a line end."""
    columns = {"precision": "precision", "recall": "recall", "f1": "F1", "roc_auc": "ROC AUC"}
    rows = [
        *report["classes"],
        {"name": "macro average", "examples": report["examples"], **report["macro"]},
        {"name": "micro average", "examples": report["examples"], **report["micro"]},
    ]
    width = max(len(row["name"]) for row in rows)
    heading = f"{'class':<{width}}" + "".join(f"{title:>11}" for title in columns.values())
    lines = [f"{heading}{'examples':>11}"]
    for row in rows:
        cells = "".join(f"{_cell(row.get(name)):>11}" for name in columns)
        lines.append(f"{row['name']:<{width}}{cells}{row['examples']:>11,}")
    lines.insert(-2, "")
    right = round(report["accuracy"] * report["examples"])
    return "\n".join(
        [
            f"accuracy                    {_cell(report['accuracy'])}  "
            f"({right:,} of {report['examples']:,} right)",
            f"expected calibration error  {_cell(report['expected_calibration_error'])}",
            "",
            *lines,
        ]
    )


def _fetched(results: Iterable[PyTree]) -> Iterator[PyTree]:
    """Yields results as NumPy arrays, in order, each a few dispatches after its own."""
    waiting: deque[PyTree] = deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > _BATCHES_IN_FLIGHT:
            yield processes.fetch(waiting.popleft())
    while waiting:
        yield processes.fetch(waiting.popleft())


def _widen(array: Any) -> np.ndarray:
    array = np.asarray(array)
    is_float = np.issubdtype(array.dtype, np.inexact) or array.dtype == "bfloat16"
    return array.astype(np.float64 if is_float else np.int64)


def _checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not labels.size:
        raise UserError(
            f"probabilities {list(probabilities.shape)} and labels {list(labels.shape)} do not "
            "fit: give [examples, classes] and [examples], with at least one example."
        )
    outside = (labels < 0) | (labels >= probabilities.shape[1])
    if outside.any():
        raise UserError(
            f"label {labels[outside][0]} is not one of the {probabilities.shape[1]} classes "
            "0, 1, ...: the labels belong to another dataset than the model."
        )
    return probabilities, labels


def _no_batches() -> UserError:
    return UserError("there are no batches to evaluate: the dataset or split is empty.")


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
