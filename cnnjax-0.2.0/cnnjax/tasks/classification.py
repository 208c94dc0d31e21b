"""Classification: one label an image, or one logit for two classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax import metrics, plots
from cnnjax.data.fields import Image, Label
from cnnjax.losses import LossFunction, softmax_cross_entropy
from cnnjax.tasks import class_scores
from cnnjax.tasks.task import Batch, Forward, Metrics, PyTree, Report, Task, example_weights

Measure = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]


def classification(
    num_classes: int,
    *,
    loss: LossFunction = softmax_cross_entropy,
    training_loss: LossFunction | None = None,
    class_names: Sequence[str] = (),
    monitor: tuple[str, str] = ("accuracy", "max"),
) -> Task:
    """Returns the task of telling to which of the classes an image belongs.

    The model's outputs are logits `[batch, classes]`, or `[batch, 1]` for two classes; the keys are
    `image` and `label` (int32, or the soft labels `[batch, classes]` of mixed images).

    Args:
      num_classes: 2 for a model with one logit.
      loss: `(logits, label) -> loss [batch]`; it is what validation and test call the loss.
      training_loss: what is minimized instead, such as one with smoothed or weighted labels.
      class_names: for tables and figures; the numbers by default.
      monitor: see `Task`.
    """
    names = tuple(class_names) or tuple(map(str, range(num_classes)))
    minimized = training_loss or loss
    return Task(
        inputs={"image": Image(), "label": Label(num_classes)},
        apply=apply,
        loss=lambda logits, batch: weigh(minimized(logits, batch["label"]), batch),
        metrics=functools.partial(measure, loss=loss, num_classes=num_classes),
        predict=metrics.probabilities,
        report=functools.partial(report, class_names=names),
        monitor=monitor,
        name="classification",
    )


def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[jax.Array, PyTree]:
    """Returns the logits of the images."""
    return forward(batch["image"], train=train)


def weigh(losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the losses with the weights 1, and 0 for padding."""
    return losses, example_weights(batch, losses)


def measure(logits: jax.Array, batch: Batch, *, loss: LossFunction, num_classes: int) -> Metrics:
    """Returns `loss` and `accuracy`, pairs over the examples that are no padding, and `confusion`:
    int32 `[classes, classes]`, true class by row, predicted class by column, of up to 1,000."""
    label, mask = batch["label"], batch.get("mask")
    pairs = {
        "loss": metrics.mean(loss(logits, label), mask),
        "accuracy": metrics.accuracy(logits, label, mask),
    }
    if num_classes > class_scores.MOST_PAIRED_CLASSES:
        return pairs
    predicted = metrics.predicted_label(logits)
    return pairs | {"confusion": metrics.confusion_counts(label, predicted, mask, num_classes)}


def report(
    probabilities: np.ndarray, examples: Mapping[str, Any], *, class_names: tuple[str, ...]
) -> Report:
    """Returns the scores by class, and confusion, worst images, reliability and ROC curves.

    Args:
      probabilities: `[examples, classes]`.
      examples: `label [examples]`; `image` of the first of them, or of none.
      class_names: one per class.
    """
    label = examples["label"]
    scores = class_scores.report(probabilities, label, class_names)
    images = examples.get("image", ())
    shown = label[: len(images)], probabilities[: len(images)]
    figures: dict[str, Callable[[Any], Any]] = {
        "reliability": lambda path: plots.reliability_diagram(probabilities, label, path),
        "roc_curves": lambda path: plots.roc_curves(probabilities, label, class_names, path),
    }
    if "confusion" in scores:
        figures["confusion_matrix"] = lambda path: plots.confusion_matrix(
            scores["confusion"], class_names, path
        )
    if len(images):
        figures["worst_classified"] = lambda path: plots.worst_classified(
            images, *shown, class_names, path
        )
    return Report(scores, class_scores.format_report(scores), figures)
