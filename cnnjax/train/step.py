"""One training step: a pure function, not compiled.

A factory closes over what never changes (model, optimizer, task) and returns a function of arrays.
`cnnjax.train.compile` compiles it; `jax.jit` does too. Under `pmap` or `shard_map` give the factory
the name of the mapped axis: losses, gradients and metrics are then those of the whole batch, and so
are BatchNorm's statistics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cnnjax import metrics as metrics_lib
from cnnjax.devices.sums import sum_over_devices
from cnnjax.errors import UserError
from cnnjax.models.fields import fields, with_fields
from cnnjax.rng import stream_key
from cnnjax.tasks.task import Forward, Task
from cnnjax.train.averaging import Averaging, exponential, mix_in
from cnnjax.train.dropout import by_example
from cnnjax.train.gradients import ascend, in_parts
from cnnjax.train.precision import all_finite, skip_overflow
from cnnjax.train.predict import (
    Normalize,
    as_float,
    changed,
    float32_at_least,
    image_keys,
    positions,
    predicted,
)
from cnnjax.train.state import TrainState

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    normalize: Normalize = as_float,
    augment: Callable[[jax.Array, Batch, jax.Array], Batch] | None = None,
    penalty: Callable[[PyTree], jax.Array] | None = None,
    pull: Callable[[PyTree, PyTree], jax.Array] | None = None,
    ema_decay: float = 0.0,
    averaging: Averaging | None = None,
    sam_radius: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns `step(state, batch) -> (state, metrics)`.

    What is minimized is the mean of the task's loss, weighted by the task's weights over the whole
    batch, plus the penalties. Only `state.params` are differentiated, and no further down than they
    reach. Every random draw is a function of (`state.key`, the stream's name, `state.step`, the
    example's position in the batch), so a resumed run draws the same numbers, on any number of
    devices. A state with a `loss_scale` is trained in float16: see `cnnjax.train.precision`.

    >>> import optax
    >>> from cnnjax.tasks.classification import classification
    >>> from cnnjax.train.state import create_state
    >>> from cnnjax import models
    >>> model, optimizer = models.create("mlp", num_classes=2), optax.sgd(0.1)
    >>> image, label = jnp.ones((4, 2, 2, 1)), jnp.array([0, 1, 1, 1])
    >>> batch = {"image": image, "label": label, "mask": jnp.ones(4, bool)}
    >>> state = create_state(model.init(jax.random.key(0), image), optimizer, jax.random.key(1))
    >>> step = make_step(model, optimizer, classification(2), schedule=lambda step: 0.1)
    >>> state, metrics = jax.jit(step)(state, batch)
    >>> total, count = metrics["loss"]
    >>> int(state.step), bool(total / count > 0), int(count)
    (1, True, 4)

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      optimizer: an Optax transformation; `optimizer.init(params)` made `state.opt_state`.
      task: what the network is to find.
      schedule: step -> learning rate, the one that the optimizer uses; here for the metrics only.
      normalize: of every key that is an image: `[batch, height, width, channels]`, as stored, or
        float in [0, 1] where there is an `augment` -> what the model expects.
      augment: `(key, batch, first_index) -> batch`, before `normalize`, such as
        `cnnjax.augment.make_augment` returns; it gets images as `as_float` makes them and may mix
        labels. `first_index` is the position of the first example within the whole batch, so that
        each example's draw does not depend on the number of devices.
      penalty: `params -> scalar` added to the loss, such as an L2 term.
      pull: `(params, state.frozen) -> scalar` added likewise, such as `cnnjax.finetune.l2_sp`.
      ema_decay: decay of the parameters' moving average, see `averaging.exponential`; used where
        `state.ema` is not None.
      averaging: another average for `state.ema`, such as `averaging.stochastic` returns.
      sam_radius: `rho` of sharpness-aware minimization, see `gradients.ascend`: the update's
        gradient is taken at parameters that far uphill, which costs a second pass. 0 does not.
      accumulate: the number of microbatches that the batch is computed in, one after another, whose
        gradients are summed for one update: the loss is the same, the activations in memory are
        those of one microbatch. BatchNorm's statistics are sequential, not pooled: each microbatch
        (over all devices) is normalized by its own, and updates the running ones in its turn. See
        `gradients.in_parts` for which examples are in one.
      axis_name: the mapped axis under `pmap` or `shard_map`; None under `jit`.

    Returns:
      The step. Its metrics are `(sum, count)` pairs: `loss` (of the task, in training) and the
      task's other pairs; `learning_rate`, `gradient_norm` and `update_norm` (global L2 norms) with
      count 1; with a loss scale also what `precision.skip_overflow` adds.

    Raises:
      UserError: microbatches for a task whose loss needs the whole batch.
    """
    if accumulate > 1 and task.needs_whole_batch:
        raise UserError(
            f"accumulate {accumulate}: the loss of this task needs all examples of a batch at "
            "once; use 1, a smaller batch or more devices."
        )
    model = with_axis(model, axis_name)
    images = image_keys(task)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        examples, batch_size = positions(batch, axis_name)
        if augment is not None:
            batch = changed(batch, images, as_float)
            batch = augment(stream_key(state.key, "augment", state.step), batch, examples[0])
        batch = {**changed(batch, images, normalize), "example": examples}
        key, dropout_key = (stream_key(state.key, x, state.step) for x in ("objective", "dropout"))
        update = state.num_updates
        # Of the loss, per example: known when the loss has been traced.
        values_per_example: list[int] = []
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

        def part_gradient(
            params: PyTree, batch_stats: PyTree, part: Batch
        ) -> tuple[PyTree, PyTree]:
            apply = make_apply(model, batch_stats, dropout_key, frozen=state.frozen)

            def total(params: PyTree) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
                forward = Forward(apply, params, state.ema, key, update, axis_name)
                with by_example(part["example"]):
                    outputs, updated = task.apply(forward, part, train=True)
                values, weights = task.loss(outputs, part)
                values_per_example[:] = [values.size // values.shape[0]]
                loss = metrics_lib.mean(values, weights)
                # This microbatch's term of the mean over the batch: the terms are summed.
                term = loss[0] / (batch_size * values_per_example[0])
                pairs = metrics_lib.pairs(task.metrics(outputs, part))
                return term * scale, ({**pairs, "loss": loss}, updated)

            gradient, (metrics, batch_stats) = jax.grad(total, has_aux=True)(params)
            return (gradient, metrics), batch_stats

        def whole_gradient(params: PyTree) -> tuple[PyTree, Metrics, PyTree]:
            compute = functools.partial(part_gradient, params)
            sums, batch_stats = in_parts(compute, state.batch_stats, batch, accumulate)
            gradient, metrics = sum_over_devices(sums, axis_name)
            # The mean is over the weights on all devices, which are known only now: to ask before
            # the gradient would be one more all-reduce. Where all are 0, nothing is learned.
            size, weight = batch_size * values_per_example[0], _or_one(metrics["loss"][1])
            gradient = jax.tree.map(
                lambda leaf: leaf * (size / weight.astype(leaf.dtype)) / scale, gradient
            )
            if penalty is not None:
                gradient = jax.tree.map(jnp.add, gradient, jax.grad(penalty)(params))
            if pull is not None:
                gradient = jax.tree.map(jnp.add, gradient, jax.grad(pull)(params, state.frozen))
            return gradient, metrics, batch_stats

        gradient, metrics, batch_stats = whole_gradient(state.params)
        if sam_radius:
            gradient, _, _ = whole_gradient(ascend(state.params, gradient, sam_radius))
        return finish_step(
            state, optimizer, gradient, batch_stats, metrics, schedule(update), ema_decay, averaging
        )

    return step


def make_apply(
    model: nn.Module,
    batch_stats: PyTree,
    dropout_key: jax.Array,
    *,
    frozen: PyTree | None = None,
) -> Callable[[PyTree, Any, bool], tuple[Any, PyTree]]:
    """Returns `(params, x, train) -> (outputs, batch_stats)`, for a `Forward`.

    In training mode layers draw from `dropout_key` and the new running statistics are returned;
    otherwise the old ones are. Outputs are float32 at least, whatever the layers compute in.
    `frozen` is that of the state (see `cnnjax.finetune`).
    """

    def apply(params: PyTree, x: Any, train: bool) -> tuple[Any, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        if frozen:
            variables["frozen"] = frozen
        if not train:
            return predicted(model, variables, x), batch_stats
        outputs, updated = model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
        )
        return float32_at_least(outputs), updated.get("batch_stats", batch_stats)

    return apply


def finish_step(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    batch_stats: PyTree,
    metrics: Metrics,
    learning_rate: jax.Array,
    ema_decay: float,
    averaging: Averaging | None = None,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one update, and the metrics with those of the update."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, updates), state.ema
    if average is not None:
        decay = averaging or exponential(ema_decay)
        average = mix_in(average, params, decay(state.num_updates))
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=average,
    )
    one = jnp.ones((), jnp.int32)
    metrics = metrics | {
        "learning_rate": (jnp.asarray(learning_rate, jnp.float32), one),
        "gradient_norm": (optax.tree.norm(gradient), one),
        "update_norm": (optax.tree.norm(updates), one),
    }
    if state.loss_scale is None:
        return new_state, metrics
    return skip_overflow(state, new_state, metrics, all_finite(gradient))


def with_axis(model: nn.Module, axis_name: str | None) -> nn.Module:
    """Tells a model with BatchNorm over which axis to average its statistics."""
    if axis_name is None or "axis_name" not in fields(model):
        return model
    return with_fields(model, axis_name=axis_name)


def _or_one(weight: jax.Array) -> jax.Array:
    return jnp.where(weight == 0, 1, weight)
