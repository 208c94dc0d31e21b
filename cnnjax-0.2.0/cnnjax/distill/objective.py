"""A task changed so that its network learns of a teacher too."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax import metrics as metrics_lib
from cnnjax.distill import named
from cnnjax.distill.named import Term
from cnnjax.errors import UserError
from cnnjax.tasks.task import Batch, Forward, Metrics, PyTree, Task, example_weights


def distillation(task: Task, terms: tuple[Term, ...], *, label_weight: float | None = None) -> Task:
    """Returns the task of a `Distilled` model: that of the labels, plus the losses of the teacher.

        label_weight * task's loss + sum of weight * loss

    Evaluation is that of the task. The step's metrics have each loss of the teacher, unweighted,
    as `distill_NAME`. Losses of the relations between examples need the whole batch at once.

    Args:
      task: of images: `cnnjax.tasks.classification` or `segmentation`.
      terms: the losses of the model.
      label_weight: of the task's own loss, of labels; None: 1 less the weight of `logits`. With 0
        no label is looked at.

    Raises:
      UserError: a weight that is negative or not finite.
    """
    weight = named.label_weight(terms) if label_weight is None else label_weight
    if not 0 <= weight < float("inf"):
        raise UserError(f"label weight {weight}: give 0 or more.")

    def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[Any, PyTree]:
        outputs, batch_stats = task.apply(forward, batch, train=train)
        if train:
            values = {
                term.name: _values(term, outputs["compared"][term.name], forward, batch)
                for term in terms
            }
            outputs = {"outputs": outputs["outputs"], "values": values}
        return outputs, batch_stats

    def loss(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        values, weights = task.loss(outputs["outputs"], batch)
        total = weight * values if weight else jnp.zeros_like(values)
        for term in terms:
            total = total + term.weight * _like(outputs["values"][term.name], values)
        return total, weights

    def metrics(outputs: Any, batch: Batch) -> Metrics:
        if not (isinstance(outputs, dict) and "values" in outputs):
            return task.metrics(outputs, batch)
        return task.metrics(outputs["outputs"], batch) | {
            f"distill_{name}": metrics_lib.mean(values, example_weights(batch, values))
            for name, values in outputs["values"].items()
        }

    relational = any(term.of == "embeddings" for term in terms)
    return dataclasses.replace(
        task,
        apply=apply,
        loss=loss,
        metrics=metrics,
        needs_whole_batch=task.needs_whole_batch or relational,
    )


def _values(
    term: Term, compared: list[tuple[jax.Array, jax.Array]], forward: Forward, batch: Batch
) -> jax.Array:
    """Returns a term's values of these examples, `[batch, ...]`, summed over its pairs."""
    if term.of != "embeddings":
        return sum((term.loss(*pair) for pair in compared[1:]), start=term.loss(*compared[0]))
    mask = batch.get("mask")
    counts = None if mask is None else forward.gather(mask)
    each = [term.loss(*map(forward.gather, pair), counts) for pair in compared]
    total = sum(each[1:], start=each[0])
    # Of the whole batch on all devices these examples are one run of rows.
    size = compared[0][0].shape[0]
    first = 0 if forward.axis_name is None else jax.lax.axis_index(forward.axis_name) * size
    return jax.lax.dynamic_slice_in_dim(total, first, size)


def _like(values: jax.Array, others: jax.Array) -> jax.Array:
    """Returns values of examples for each of their pixels, where the others have pixels."""
    return values.reshape(*values.shape, *[1] * (others.ndim - values.ndim))
