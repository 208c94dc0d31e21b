"""One training step, one evaluation step, one prediction: pure functions, not compiled.

A factory closes over what never changes (model, optimizer, loss) and returns a function of arrays.
`cnnjax.parallel` compiles it; `jax.jit` does too. Under `pmap` or `shard_map` give the factory the
name of the mapped axis: losses, gradients and metrics are then those of the whole batch, and so
are BatchNorm's statistics.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from cnnjax import metrics as metrics_lib
from cnnjax.averaging import Averaging, exponential, mix_in
from cnnjax.dropout import by_example
from cnnjax.gradients import ascend, in_parts
from cnnjax.models.fields import fields, with_fields
from cnnjax.precision import all_finite, skip_overflow
from cnnjax.rng import stream_key
from cnnjax.state import TrainState

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFunction = Callable[[jax.Array, jax.Array], jax.Array]
# `(params, image, *, train) -> (logits, batch_stats)`: the model as a step applies it.
Forward = Callable[..., tuple[jax.Array, PyTree]]
# `(forward, params, key, part, update) -> (losses [batch], logits, batch_stats)`.
Objective = Callable[
    [Forward, PyTree, jax.Array, Batch, jax.Array], tuple[jax.Array, jax.Array, PyTree]
]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, Batch], dict[str, Any]]

# Of a leaf that is summed over devices together with others.
MAX_PACKED_BYTES = 2**18


def as_float(image: jax.Array) -> jax.Array:
    """Maps uint8 images to float32 in [0, 1] and leaves float images as they are."""
    return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    normalise: Callable[[jax.Array], jax.Array] = as_float,
    augment: Callable[[jax.Array, Batch, jax.Array], Batch] | None = None,
    penalty: Callable[[PyTree], jax.Array] | None = None,
    pull: Callable[[PyTree, PyTree], jax.Array] | None = None,
    objective: Objective | None = None,
    ema_decay: float = 0.0,
    averaging: Averaging | None = None,
    sam_radius: float = 0.0,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns `step(state, batch) -> (state, metrics)`.

    The objective is the mean of `loss_fn` over the unmasked examples of the whole batch, plus the
    penalties. Only `state.params` are differentiated, and no further down than they reach. Every
    random draw is a function of (`state.key`, the stream's name, `state.step`, the example's
    position in the batch), so a resumed run draws the same numbers, on any number of devices. A
    state with a `loss_scale` is trained in float16: see `cnnjax.precision`.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      optimizer: an Optax transformation; `optimizer.init(params)` made `state.opt_state`.
      loss_fn: `(logits [batch, classes], label) -> loss [batch]`.
      schedule: step -> learning rate, the one that the optimizer uses; here for the metrics only.
      normalise: `image [batch, height, width, channels]`, as stored, or float in [0, 1] where there
        is an `augment` -> what the model expects.
      augment: `(key, batch, first_index) -> batch`, before `normalise`, such as
        `cnnjax.data.make_augment` returns; it gets images as `as_float` makes them and may mix
        labels. `first_index` is the position of the first image within the whole batch, so that
        each example's draw does not depend on the number of devices.
      penalty: `params -> scalar` added to the objective, such as an L2 term.
      pull: `(params, state.frozen) -> scalar` added likewise, such as `cnnjax.finetune.l2_sp`.
      objective: `(forward, params, key, part, update) -> (losses [batch], logits, batch_stats)` in
        place of `loss_fn` on the model's logits, for losses that apply the model otherwise, such as
        those of `cnnjax.robust`. `forward(params, image, train=...)` is the model, `key` the step's
        key of the stream `objective`, `part` a batch whose `example` are the positions in the
        whole, and `update` the number of updates so far, for what changes as training goes on.
      ema_decay: decay of the parameters' moving average, see `averaging.exponential`; used where
        `state.ema` is not None.
      averaging: another average for `state.ema`, such as `averaging.stochastic` returns.
      sam_radius: `rho` of sharpness-aware minimisation, see `gradients.ascend`: the update's
        gradient is taken at parameters that far uphill, which costs a second pass. 0 does not.
      accumulate: the batch is computed in so many equal parts, one after another, whose gradients
        are summed for one update: the objective is the same, the activations in memory are those of
        one part. BatchNorm's statistics are sequential, not pooled: each part (over all devices) is
        normalised by its own, and updates the running ones in its turn. See `gradients.in_parts`
        for which examples are a part.
      axis_name: the mapped axis under `pmap` or `shard_map`; None under `jit`.

    Returns:
      The step. Its metrics are `(sum, count)` pairs: `loss` and `accuracy` over examples;
      `learning_rate`, `gradient_norm` and `update_norm` (global L2 norms) with count 1; with a
      loss scale also what `precision.skip_overflow` adds.
    """
    model = with_axis(model, axis_name)
    objective = plain_objective(loss_fn) if objective is None else objective

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        device = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name)
        num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        first_index = device * batch["image"].shape[0]
        if augment is not None:
            batch = {**batch, "image": as_float(batch["image"])}
            batch = augment(stream_key(state.key, "augment", state.step), batch, first_index)
        examples = first_index + jnp.arange(batch["image"].shape[0], dtype=jnp.int32)
        batch = {**batch, "image": normalise(batch["image"]), "example": examples}
        batch_size = num_devices * batch["image"].shape[0]
        dropout_key = stream_key(state.key, "dropout", state.step)
        key, update = stream_key(state.key, "objective", state.step), state.num_updates
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

        def part_gradient(
            params: PyTree, batch_stats: PyTree, part: Batch
        ) -> tuple[PyTree, PyTree]:
            label, mask = part["label"], part["mask"]
            forward = make_forward(model, batch_stats, dropout_key, frozen=state.frozen)

            def total(params: PyTree) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
                with by_example(part["example"]):
                    losses, logits, updated = objective(forward, params, key, part, update)
                # This part's share of the mean over the batch: the shares are summed.
                share = jnp.sum(jnp.where(mask, losses, 0.0)) / batch_size
                metrics = {
                    "loss": metrics_lib.mean(losses, mask),
                    "accuracy": metrics_lib.accuracy(logits, label, mask),
                }
                return share * scale, (metrics, updated)

            gradient, (metrics, batch_stats) = jax.grad(total, has_aux=True)(params)
            return (gradient, metrics), batch_stats

        def whole_gradient(params: PyTree) -> tuple[PyTree, Metrics, PyTree]:
            compute = functools.partial(part_gradient, params)
            sums, batch_stats = in_parts(compute, state.batch_stats, batch, accumulate)
            gradient, metrics = sum_over_devices(sums, axis_name)
            # The mean is over the examples that are not masked. How many there are on all devices
            # is known only now: to ask before the gradient would be one more wait for the others.
            _, num_examples = metrics["loss"]
            gradient = jax.tree.map(
                lambda leaf: leaf * (batch_size / num_examples.astype(leaf.dtype)) / scale, gradient
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


def plain_objective(
    loss_fn: LossFunction, normalise: Callable[[jax.Array], jax.Array] = lambda image: image
) -> Objective:
    """Returns the objective `loss_fn(logits, label)` of the images, normalised if need be."""

    def objective(
        forward: Forward, params: PyTree, key: jax.Array, part: Batch, update: jax.Array
    ) -> tuple[jax.Array, jax.Array, PyTree]:
        logits, batch_stats = forward(params, normalise(part["image"]), train=True)
        return loss_fn(logits, part["label"]), logits, batch_stats

    return objective


def make_forward(
    model: nn.Module,
    batch_stats: PyTree,
    dropout_key: jax.Array,
    *,
    frozen: PyTree | None = None,
) -> Forward:
    """Returns `forward(params, image, train=...) -> (logits, batch_stats)`.

    In training mode layers draw from `dropout_key` and the new running statistics are returned;
    otherwise the old ones are. Logits are float32 at least, whatever the layers compute in.
    `frozen` is that of the state (see `cnnjax.finetune`).
    """

    def forward(params: PyTree, image: jax.Array, *, train: bool) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, "batch_stats": batch_stats}
        if frozen:
            variables["frozen"] = frozen
        if not train:
            return predicted_logits(model, variables, image), batch_stats
        logits, updated = model.apply(
            variables, image, train=True, mutable=["batch_stats"], rngs={"dropout": dropout_key}
        )
        return _float32_at_least(logits), updated.get("batch_stats", batch_stats)

    return forward


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
    average = averaging or exponential(ema_decay)
    new_state = _updated(state, updates, opt_state, batch_stats, average)
    one = jnp.ones((), jnp.int32)
    metrics = metrics | {
        "learning_rate": (jnp.asarray(learning_rate, jnp.float32), one),
        "gradient_norm": (optax.tree.norm(gradient), one),
        "update_norm": (optax.tree.norm(updates), one),
    }
    if state.loss_scale is None:
        return new_state, metrics
    return skip_overflow(state, new_state, metrics, all_finite(gradient))


def make_eval_step(
    model: nn.Module,
    loss_fn: LossFunction,
    *,
    num_classes: int,
    normalise: Callable[[jax.Array], jax.Array] = as_float,
    axis_name: str | None = None,
) -> EvalStep:
    """Returns `eval_step(variables, batch) -> metrics`.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      loss_fn: `(logits [batch, classes], label) -> loss [batch]`.
      num_classes: the number of classes; 2 for a model with one logit.
      normalise: as for `make_train_step`.
      axis_name: the mapped axis under `pmap` or `shard_map`; None under `jit`.

    Returns:
      The step. `loss` and `accuracy` are `(sum, count)` pairs over unmasked examples; `confusion`
      is int32 `[num_classes, num_classes]`, true class by row, predicted class by column.
    """

    def eval_step(variables: PyTree, batch: Batch) -> dict[str, Any]:
        label, mask = batch["label"], batch["mask"]
        logits = predicted_logits(model, variables, normalise(batch["image"]))
        predicted = metrics_lib.predicted_label(logits)
        return sum_over_devices(
            {
                "loss": metrics_lib.mean(loss_fn(logits, label), mask),
                "accuracy": metrics_lib.accuracy(logits, label, mask),
                "confusion": metrics_lib.confusion_counts(label, predicted, mask, num_classes),
            },
            axis_name,
        )

    return eval_step


def make_predict(
    model: nn.Module, *, normalise: Callable[[jax.Array], jax.Array] = as_float
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Returns `predict(variables, image [batch, h, w, c]) -> probabilities [batch, classes]`.

    A model with one logit yields two columns: the probabilities of class 0 and of class 1.
    """

    def predict(variables: PyTree, image: jax.Array) -> jax.Array:
        return metrics_lib.probabilities(predicted_logits(model, variables, normalise(image)))

    return predict


def predicted_logits(model: nn.Module, variables: PyTree, image: jax.Array) -> jax.Array:
    """Returns a model's logits for images as it expects them, float32 at least."""
    logits = model.apply(variables, image, train=False)
    assert not isinstance(logits, tuple)
    return _float32_at_least(logits)


def _float32_at_least(logits: jax.Array) -> jax.Array:
    """Losses and metrics are not computed in the 16 bits of the layers."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def with_axis(model: nn.Module, axis_name: str | None) -> nn.Module:
    """Tells a model with BatchNorm over which axis to average its statistics."""
    if axis_name is None or "axis_name" not in fields(model):
        return model
    return with_fields(model, axis_name=axis_name)


def sum_over_devices(tree: PyTree, axis_name: str | None) -> PyTree:
    """Returns the sum over the mapped axis of each leaf; the tree as it is for no axis.

    Small leaves are summed as one array: the devices of a CPU wait for each other once an array,
    which for a small network's many would take longer than its gradient. Integers among them, which
    count examples of a batch, are exact up to 2^24.
    """
    if axis_name is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    small = [leaf.size * leaf.dtype.itemsize <= MAX_PACKED_BYTES for leaf in leaves]
    packed, unpack = ravel_pytree(list(itertools.compress(leaves, small)))
    large = [leaf for leaf, packs in zip(leaves, small, strict=True) if not packs]
    packed_leaves = iter(unpack(jax.lax.psum(packed, axis_name)))
    # Each by itself, so that a compiler may begin with the first while it computes the next.
    large_leaves = iter([jax.lax.psum(leaf, axis_name) for leaf in large])
    totals = [next(packed_leaves if packs else large_leaves) for packs in small]
    return jax.tree.unflatten(structure, totals)


def _updated(
    state: TrainState, updates: PyTree, opt_state: PyTree, batch_stats: PyTree, average: Averaging
) -> TrainState:
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = mix_in(ema, params, average(state.num_updates))
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
    )
