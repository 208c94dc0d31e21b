"""Scores of a classifier's predictions of a whole dataset, by class, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax import metrics
from cnnjax.errors import UserError

# Of more classes the counts of all pairs are too many to look at, and take gigabytes.
MOST_PAIRED_CLASSES = 1000


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
    count = jax.jit(metrics.confusion_counts, static_argnames="num_classes")
    predictions = probabilities.argmax(axis=1)
    return np.asarray(count(labels, predictions, num_classes=probabilities.shape[1]), np.int64)


def report(probabilities: Any, labels: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """Scores a classifier's predictions of a whole dataset.

    Args:
      probabilities: `[examples, classes]`.
      labels: integers `[examples]`.
      class_names: one a class.

    Returns:
      Plain Python values, ready for JSON, None where a score is not defined (such as the ROC AUC
      of a class without examples): `examples`, `accuracy`, `expected_calibration_error` (15 bins),
      `macro` and `micro` (`precision`, `recall`, `f1`; `macro` also `roc_auc`, the mean of one
      class against the rest), `classes` (a list of `name`, `precision`, `recall`, `f1`, `roc_auc`,
      `examples`) and, of up to 1,000 classes, `confusion` (rows are true classes).
      `cnnjax.metrics` defines each.

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
    # As one program: a hundred operations, each compiled for itself, take five times as long.
    areas, calibration_error, by_class, macro, micro = jax.device_get(
        jax.jit(_scores)(probabilities, labels, counts)
    )
    defined_areas = areas[np.isfinite(areas)]
    return {
        "examples": len(labels),
        "accuracy": float(counts.trace() / len(labels)),
        "expected_calibration_error": _plain(calibration_error),
        "macro": {name: _plain(value) for name, value in macro.items()}
        | {"roc_auc": float(defined_areas.mean()) if defined_areas.size else None},
        "micro": {name: _plain(value) for name, value in micro.items()},
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
        **({"confusion": counts.tolist()} if len(counts) <= MOST_PAIRED_CLASSES else {}),
    }


def _scores(probabilities: jax.Array, labels: jax.Array, counts: jax.Array) -> tuple[Any, ...]:
    return (
        metrics.roc_auc_one_vs_rest(probabilities, labels),
        metrics.expected_calibration_error(probabilities, labels),
        metrics.precision_recall_f1(counts),
        metrics.macro_average(counts),
        metrics.micro_average(counts),
    )


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


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
