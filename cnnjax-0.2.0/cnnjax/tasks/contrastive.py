"""Contrastive learning: the two views of an example are near each other, all others far away.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (arXiv
2002.05709). What is kept is the representation, which needs few labels to be classified.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import metrics, plots
from cnnjax.augment.policy import BatchAugment
from cnnjax.augment.views import fixed_views
from cnnjax.data.dataset import ArrayDataset, Arrays, Dataset
from cnnjax.data.fields import Field, Image, Label
from cnnjax.tasks import nt_xent
from cnnjax.tasks.task import Batch, Forward, Metrics, PyTree, Report, Task, example_weights


def contrastive(*, temperature: float, class_names: Sequence[str]) -> Task:
    """Returns the task of a model such as `cnnjax.models.projection.Projected`.

    `image` and `view` are the two views: in training as `cnnjax.augment.two_views` makes them, in
    evaluation made once (see `paired`). Both go through the model as one batch, so that BatchNorm
    normalizes them together, and a Dropout draws one mask for all. What is predicted is the
    representation of `original`, the image as it is, which only an evaluation looks at. The loss of
    an evaluation compares within each of its batches.

    The loss compares each embedding with those of the whole batch on all devices (the paper's
    algorithm 1), so the batch cannot be computed in microbatches. `label` is for the report only.

    Args:
      temperature: of the loss, see `cnnjax.tasks.nt_xent`.
      class_names: one a class.
    """
    return Task(
        inputs=_fields(len(class_names)),
        apply=_apply,
        loss=functools.partial(_loss, temperature=temperature),
        metrics=functools.partial(_metrics, temperature=temperature),
        predict=_features,
        report=functools.partial(_report, class_names=class_names),
        monitor=("loss", "min"),
        needs_whole_batch=True,
        name="contrastive",
    )


def paired(dataset: Dataset, augment: BatchAugment, *, seed: int) -> ArrayDataset:
    """Returns a dataset with the keys of the task.

    In validation and test the two views are draws of `augment`, functions of the seed and the
    image's place: the image as it is would be no view, for a network knows it by its sharper
    pixels. In training they are the image, of which each step draws both.
    """

    def split(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
        views = [arrays.image] * 2
        if name != "train":
            views = [fixed_views(arrays.image, augment, seed=seed, draw=draw) for draw in range(2)]
        views_by_name = dict(zip(("image", "view"), views, strict=True))
        return views_by_name | {"original": arrays.image, "label": arrays.label}

    splits = {name: split(getattr(dataset, name), name) for name in ("train", "validation", "test")}
    return ArrayDataset(dataset.name, _fields(dataset.num_classes), **splits)


def _fields(num_classes: int) -> dict[str, Field]:
    images: dict[str, Field] = {name: Image() for name in ("image", "view", "original")}
    return images | {"label": Label(num_classes)}


def _apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[dict[str, Any], PyTree]:
    """Returns what `nt_xent` compares and, in evaluation, `features [batch, ...]` of `original`."""
    names = ("image", "view") if train else ("image", "view", "original")
    # The views of an example stay side by side, and with them on its device.
    stacked = jnp.stack([batch[name] for name in names], axis=1)
    outputs, batch_stats = forward(stacked.reshape(-1, *stacked.shape[2:]), train=train)
    features, projection = (
        outputs[name].reshape(*stacked.shape[:2], -1) for name in ("features", "projection")
    )
    views = projection[:, :2]
    mask = batch.get("mask")
    device = 0 if forward.axis_name is None else jax.lax.axis_index(forward.axis_name)
    compared = {
        "all_views": forward.gather(views),
        "mask": None if mask is None else forward.gather(mask),
        "first_index": device * stacked.shape[0],
    }
    of_original = {} if train else {"features": features[:, 2]}
    return {"views": views, "compared": compared, **of_original}, batch_stats


def _loss(
    outputs: Mapping[str, Any], batch: Batch, *, temperature: float
) -> tuple[jax.Array, jax.Array]:
    values = nt_xent.nt_xent(outputs["views"], **outputs["compared"], temperature=temperature)
    return values, example_weights(batch, values)


def _metrics(outputs: Mapping[str, Any], batch: Batch, *, temperature: float) -> Metrics:
    """Returns the loss, and how often the nearest of all other embeddings is the other view."""
    values, mask = _loss(outputs, batch, temperature=temperature)
    cosines, other = nt_xent.view_cosines(outputs["views"], **outputs["compared"])
    return {
        "loss": metrics.mean(values, mask),
        "contrastive_accuracy": metrics.accuracy(cosines, other, mask),
    }


def _features(outputs: Mapping[str, Any]) -> jax.Array:
    return outputs["features"]


def _report(features: Any, examples: Mapping[str, Any], *, class_names: Sequence[str]) -> Report:
    """Scores representations `[examples, features]` by the class of their nearest neighbors."""
    labels = np.asarray(examples["label"])
    accuracy = neighbor_accuracy(features, labels)
    return Report(
        scores={"examples": len(labels), "neighbor_accuracy": accuracy},
        text=f"nearest neighbor of the same class  {accuracy:.4f}  ({len(labels):,} examples)",
        figures={"embedding": functools.partial(plots.embedding, features, labels, class_names)},
    )


def neighbor_accuracy(features: Any, labels: Any) -> float:
    """Returns how often an example's nearest other, by the cosine, has its class.

    Args:
      features: `[examples, features]`.
      labels: integers `[examples]`.
    """
    from sklearn.neighbors import NearestNeighbors

    labels = np.asarray(labels)
    if len(labels) < 2:
        return float("nan")
    index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(np.asarray(features))
    # Without a query the neighbors of an example are the others.
    nearest = index.kneighbors(return_distance=False)[:, 0]
    return float(np.mean(labels[nearest] == labels))
