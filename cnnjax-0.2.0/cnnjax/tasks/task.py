"""A task: loss, metrics, predictions and report of one kind of problem, as plain functions.

The training step, the evaluation step, the loop and the report know no label, accuracy or confusion
matrix: they ask the task. A new task is one file in this room, its model, its experiment, its test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.data.fields import Field

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The model as a step applies it, and what the step knows besides.

    `forward(x, train=..., params=None)` returns `(outputs, batch_stats)`: the model's outputs,
    float32 at least, and BatchNorm's running statistics after it (in training mode; else those
    before). `params` are other parameters than those that are trained, such as `forward.average`
    for a teacher: no gradient flows into what is not `forward.params`.

    Attributes:
      apply: `(params, x, train) -> (outputs, batch_stats)`.
      params: the parameters that the step differentiates.
      average: their moving average (`state.ema`), or None where the state keeps none.
      key: typed key of this step for whatever a task draws; the example's position in the whole
        batch is `batch["example"]`, so that draws do not depend on the number of devices.
      update: the number of updates made so far, for what changes as training goes on.
      axis_name: the mapped axis, or None.
    """

    apply: Callable[[PyTree, jax.Array, bool], tuple[Any, PyTree]]
    params: PyTree
    average: PyTree | None = None
    key: jax.Array | None = None
    update: jax.Array | int = 0
    axis_name: str | None = None

    def __call__(self, x: Any, *, train: bool, params: PyTree | None = None) -> tuple[Any, PyTree]:
        return self.apply(self.params if params is None else params, x, train)

    def gather(self, values: jax.Array) -> jax.Array:
        """Returns the rows `[batch, ...]` of all devices, in the order of the whole batch.

        Gradients flow back to the device that each row came from. Only for tasks with
        `needs_whole_batch`.
        """
        if self.axis_name is None:
            return values
        return jax.lax.all_gather(values, self.axis_name, axis=0, tiled=True)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a task says of its predictions of a whole split, on the host.

    Attributes:
      scores: name -> number (or whatever JSON holds).
      text: a table for people, without a line end.
      figures: name -> `draw(path)`, which writes a PNG.
    """

    scores: dict[str, Any]
    text: str
    figures: dict[str, Callable[[Path], Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network is to find.

    Attributes:
      inputs: key of a batch -> its field: how it is checked, padded and augmented.
      apply: `(forward, batch, *, train) -> (outputs, batch_stats)`: calls `forward` on the keys
        that the model gets.
      loss: `(outputs, batch) -> (values, weights)`, both `[batch, ...]` of one shape: what training
        minimizes is the sum of `values * weights` over the sum of `weights`, both over the whole
        batch on all devices. `batch["mask"]` is False for examples that are padding, which must
        get the weight 0 (see `example_weights`).
      metrics: `(outputs, batch) -> {name: (sum, count) or an array of counts}` over the examples
        that are no padding. Training logs the pairs; evaluation adds up all. `loss` among them is
        what evaluation calls the loss, of labels as they are.
      predict: `outputs -> arrays [batch, ...]`: what evaluation keeps of each example.
      report: `(predictions, examples) -> Report`, on the host: NumPy arrays of all examples;
        `examples` are the keys of `inputs`, those that the model gets for the first examples only.
      monitor: the metric that says which parameters are best, and "max" or "min".
      needs_whole_batch: whether the loss of an example depends on the others of its batch, so that
        a batch cannot be computed in microbatches.
      name: what `model.json` calls it, for commands that are for some tasks only.
      scores: what `metrics` add up to over a whole split -> further numbers computed from it, such
        as a mean IoU from counts: logged, shown and monitored like the quotients of pairs.
    """

    inputs: Mapping[str, Field]
    apply: Callable[..., tuple[Any, PyTree]]
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    metrics: Callable[[Any, Batch], Metrics]
    predict: Callable[[Any], Any]
    report: Callable[[Any, Mapping[str, Any]], Report]
    monitor: tuple[str, str]
    needs_whole_batch: bool = False
    name: str = ""
    scores: Callable[[Mapping[str, Any]], dict[str, float]] = lambda totals: {}


def example_weights(batch: Batch, values: jax.Array) -> jax.Array:
    """Returns weights of the shape of `values [batch, ...]`: 1, and 0 for padding examples."""
    mask = batch.get("mask", jnp.ones(values.shape[:1], bool))
    return jnp.broadcast_to(mask.reshape(-1, *[1] * (values.ndim - 1)), values.shape)
