"""Semantic segmentation: one class a pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import metrics, plots
from cnnjax.data.fields import ClassMap, Image
from cnnjax.errors import UserError
from cnnjax.losses import dice_loss, pixel_cross_entropy
from cnnjax.tasks.task import Batch, Forward, Metrics, PyTree, Report, Task, example_weights


def segmentation(
    num_classes: int,
    *,
    ignore: int = 255,
    dice_weight: float = 0.0,
    class_names: Sequence[str] = (),
    background: int | None = 0,
    monitor: tuple[str, str] = ("mean_iou", "max"),
) -> Task:
    """Returns the task of finding the class of each pixel.

    The model's outputs are logits `[batch, height, width, classes]`; the keys are `image` and
    `class_map`, uint8 `[batch, height, width]`. Minimized is the mean cross-entropy over the pixels
    that count, whichever images they are of; every other pixel has weight 0.

    Args:
      num_classes: from 2 to 255, the background being one of them.
      ignore: the value of pixels without a class, which neither train nor count in scores.
      dice_weight: factor of `losses.dice_loss`, added to the cross-entropy.
      class_names: for tables and figures; the numbers by default.
      background: the class that figures leave bare; None paints all.
      monitor: see `Task`; `mean_iou`, `mean_dice` and `pixel_accuracy` are its scores.

    Raises:
      UserError: a number of classes that does not fit a map of bytes, or an `ignore` among them.
    """
    if not 2 <= num_classes <= 255:
        raise UserError(f"num_classes is {num_classes}: a class map holds from 2 to 255 classes.")
    if 0 <= ignore < num_classes:
        raise UserError(
            f"ignore={ignore} is one of the {num_classes} classes: take a number above."
        )
    names = tuple(class_names) or tuple(map(str, range(num_classes)))
    return Task(
        inputs={"image": Image(), "class_map": ClassMap(num_classes, ignore)},
        apply=apply,
        loss=functools.partial(pixel_losses, ignore=ignore, dice_weight=dice_weight),
        metrics=functools.partial(measure, ignore=ignore, num_classes=num_classes),
        predict=predicted_classes,
        report=functools.partial(report, ignore=ignore, class_names=names, background=background),
        monitor=monitor,
        name="segmentation",
        scores=scores,
    )


def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[jax.Array, PyTree]:
    """Returns the logits of the images' pixels."""
    return forward(batch["image"], train=train)


def pixel_losses(
    logits: jax.Array, batch: Batch, *, ignore: int, dice_weight: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns each pixel's loss `[batch, height, width]`, and whether it counts.

    An image's Dice loss is added to each of its pixels: its weight is the number that count.
    """
    losses, counted = pixel_cross_entropy(logits, batch["class_map"], ignore=ignore)
    if dice_weight:
        of_image = dice_loss(logits, batch["class_map"], ignore=ignore)
        losses = losses + dice_weight * of_image[..., None, None]
    return losses, example_weights(batch, losses) & counted


def measure(logits: jax.Array, batch: Batch, *, ignore: int, num_classes: int) -> Metrics:
    """Returns `loss` (cross-entropy) and `pixel_accuracy`, pairs over the pixels that count, and
    `confusion`: int32 `[classes, classes]`, pixels by true class (row) and predicted class."""
    losses, weights = pixel_losses(logits, batch, ignore=ignore)
    class_map = batch["class_map"].astype(jnp.int32)
    return {
        "loss": metrics.mean(losses, weights),
        "pixel_accuracy": metrics.accuracy(logits, class_map, weights),
        "confusion": metrics.confusion_counts(
            class_map, metrics.predicted_label(logits), weights, num_classes
        ),
    }


def scores(totals: Mapping[str, Any]) -> dict[str, float]:
    """Returns the means over the classes of what the summed confusion says of each."""
    confusion = totals["confusion"]
    return {
        "mean_iou": metrics.class_mean(metrics.iou(confusion)),
        "mean_dice": metrics.class_mean(metrics.dice(confusion)),
    }


def predicted_classes(logits: jax.Array) -> jax.Array:
    """Returns the likeliest class of each pixel, uint8 `[batch, height, width]`."""
    return metrics.predicted_label(logits).astype(jnp.uint8)


def report(
    predicted: np.ndarray,
    examples: Mapping[str, Any],
    *,
    ignore: int,
    class_names: tuple[str, ...],
    background: int | None,
) -> Report:
    """Returns the scores by class, and their confusion and the first images as figures.

    Args:
      predicted: uint8 `[examples, height, width]`.
      examples: `class_map`, likewise; `image` of the first of them, or of none.
      ignore, class_names, background: as for `segmentation`.
    """
    truth = examples["class_map"]
    confusion = pixel_confusion(truth, predicted, len(class_names))
    by_class = {
        "iou": metrics.iou(confusion),
        "dice": metrics.dice(confusion),
        "pixels": confusion.sum(axis=1),
    }
    total = confusion.sum()
    numbers: dict[str, Any] = {
        **scores({"confusion": confusion}),
        "pixel_accuracy": confusion.trace() / total if total else float("nan"),
        "confusion": confusion.tolist(),
        "classes": {
            name: {key: _number(values[index]) for key, values in by_class.items()}
            for index, name in enumerate(class_names)
        },
    }
    figures: dict[str, Callable[[Any], Any]] = {
        "confusion_matrix": lambda path: plots.confusion_matrix(confusion, class_names, path),
    }
    images = examples.get("image", ())
    if len(images):
        figures["overlays"] = lambda path: plots.class_maps(
            images,
            truth[: len(images)],
            predicted[: len(images)],
            class_names,
            path,
            ignore=ignore,
            background=background,
        )
    return Report(numbers, format_scores(numbers), figures)


def pixel_confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns int64 `[classes, classes]`, pixels by true and predicted class, on the host.

    Pixels whose true class is not one of the classes, such as ignored ones, count nowhere.
    """
    confusion = np.zeros(num_classes**2, np.int64)
    # An image at a time: cells are eight times as large as the maps.
    for one_truth, one_predicted in zip(truth, predicted, strict=True):
        counted = one_truth < num_classes
        cells = one_truth[counted].astype(np.intp) * num_classes + one_predicted[counted]
        confusion += np.bincount(cells, minlength=num_classes**2)
    return confusion.reshape(num_classes, num_classes)


def format_scores(numbers: Mapping[str, Any]) -> str:
    """Returns the table of a report: a line a class, and their means."""
    width = max(8, *map(len, numbers["classes"]))
    lines = [f"{'class':{width}}  {'IoU':>7}  {'Dice':>7}  {'pixels':>12}"]
    for name, row in numbers["classes"].items():
        lines.append(
            f"{name:{width}}  {_percent(row['iou'])}  {_percent(row['dice'])}  {row['pixels']:12,}"
        )
    pixels = sum(row["pixels"] for row in numbers["classes"].values())
    means = _percent(numbers["mean_iou"]), _percent(numbers["mean_dice"])
    lines.append(f"{'mean':{width}}  {means[0]}  {means[1]}  {pixels:12,}")
    lines.append(f"pixel accuracy {numbers['pixel_accuracy']:.2%}")
    return "\n".join(lines)


def _percent(score: float | None) -> str:
    """A class that is neither there nor predicted has no score."""
    return f"{'-':>7}" if score is None or np.isnan(score) else f"{score:7.2%}"


def _number(value: Any) -> float | int | None:
    """Returns what JSON holds; None for what is no number."""
    number = value.item()
    return None if number != number else number
