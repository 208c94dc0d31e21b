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
from cnnjax.data.fields import Image, Label
from cnnjax.tasks import nt_xent
from cnnjax.tasks.task import Batch, Forward, Metrics, PyTree, Report, Task, example_weights


def contrastive(*, temperature: float, class_names: Sequence[str]) -> Task:
    """Returns the task of a model such as `cnnjax.models.projection.Projected`.

    `image` and `view` are the two views: in training as `cnnjax.augment.two_views` makes them; in
    evaluation the image as it is, whose representation is what is predicted, and a view that was
    made once (see `paired`). Both go through the model as one batch, so that BatchNorm normalizes
    them together, and a Dropout draws one mask for all. The loss of an evaluation compares within
    each of its batches.

    The loss compares each embedding with those of the whole batch on all devices (the paper's
    algorithm 1), so the batch cannot be computed in microbatches. `label` is for the report only.

    Args:
      temperature: of the loss, see `cnnjax.tasks.nt_xent`.
      class_names: one a class.
    """
    return Task(
        inputs={"image": Image(), "view": Image(), "label": Label(len(class_names))},
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

    In validation and test `view` is a draw of `augment`, a function of the seed and the image's
    place; in training it is the image, of which each step draws both views.
    """

    def split(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
        view = arrays.image
        if name != "train":
            view = fixed_views(view, augment, seed=seed)
        return {"image": arrays.image, "view": view, "label": arrays.label}

    splits = {name: split(getattr(dataset, name), name) for name in ("train", "validation", "test")}
    fields = {"image": Image(), "view": Image(), "label": Label(dataset.num_classes)}
    return ArrayDataset(dataset.name, fields, **splits)


def _apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[dict[str, Any], PyTree]:
    """Returns `features [batch, ...]` of the images, and what `nt_xent` compares."""
    # The views of an example stay side by side, and with them on its device.
    both = jnp.stack([batch["image"], batch["view"]], axis=1)
    outputs, batch_stats = forward(both.reshape(-1, *both.shape[2:]), train=train)
    features, projection = (
        outputs[name].reshape(*both.shape[:2], -1) for name in ("features", "projection")
    )
    mask = batch.get("mask")
    device = 0 if forward.axis_name is None else jax.lax.axis_index(forward.axis_name)
    return {
        "features": features[:, 0],
        "views": projection,
        "compared": {
            "all_views": forward.gather(projection),
            "mask": None if mask is None else forward.gather(mask),
            "first_index": device * both.shape[0],
        },
    }, batch_stats


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
