"""The forward pass as training and evaluation share it, and evaluation's steps: pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.devices.sums import sum_over_devices
from cnnjax.rng import stream_key
from cnnjax.tasks.task import Batch, Forward, PyTree, Task

Normalize = Callable[[jax.Array], jax.Array]


EvalStep = Callable[[PyTree, Batch], dict[str, Any]]


def as_float(image: jax.Array) -> jax.Array:
    """Maps uint8 images to float32 in [0, 1] and leaves float images as they are."""
    return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image


def make_eval_step(
    model: nn.Module,
    task: Task,
    *,
    normalize: Normalize = as_float,
    axis_name: str | None = None,
) -> EvalStep:
    """Returns `eval_step(variables, batch) -> metrics`, those of the task, summed over devices.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      task: what the network is to find.
      normalize: as for `make_step`.
      axis_name: the mapped axis under `pmap` or `shard_map`; None under `jit`.
    """

    def eval_step(variables: PyTree, batch: Batch) -> dict[str, Any]:
        outputs = predicted_outputs(
            model, task, variables, batch, normalize=normalize, axis_name=axis_name
        )
        return sum_over_devices(task.metrics(outputs, batch), axis_name)

    return eval_step


def make_predict(
    model: nn.Module, task: Task, *, normalize: Normalize = as_float
) -> Callable[[PyTree, Batch], Any]:
    """Returns `predict(variables, batch) -> what the task keeps of each example`.

    The batch needs only the keys that the model gets.
    """

    def predict(variables: PyTree, batch: Batch) -> Any:
        return task.predict(predicted_outputs(model, task, variables, batch, normalize=normalize))

    return predict


def predicted_outputs(
    model: nn.Module,
    task: Task,
    variables: PyTree,
    batch: Batch,
    *,
    normalize: Normalize,
    axis_name: str | None = None,
) -> Any:
    """Returns the task's outputs for a batch as it is stored; the model is not in training mode."""
    batch = changed(batch, image_keys(task), normalize)
    examples, _ = positions(batch, axis_name)

    def apply(params: PyTree, x: Any, train: bool) -> tuple[Any, PyTree]:
        own = {**variables, "params": params} if params else variables
        return predicted(model, own, x), variables.get("batch_stats", {})

    key = stream_key(0, "evaluation", 0)
    forward = Forward(apply, variables.get("params", {}), key=key, axis_name=axis_name)
    outputs, _ = task.apply(forward, {**batch, "example": examples}, train=False)
    return outputs


def predicted(model: nn.Module, variables: PyTree, x: Any) -> Any:
    """Returns a model's outputs for inputs as it expects them, float32 at least."""
    outputs = model.apply(variables, x, train=False)
    assert not isinstance(outputs, tuple)
    return float32_at_least(outputs)


def float32_at_least(outputs: Any) -> Any:
    """Losses and metrics are not computed in the 16 bits of the layers."""

    def widen(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(widen, outputs)


def positions(batch: Batch, axis_name: str | None) -> tuple[jax.Array, int]:
    """Returns the positions of these examples within the whole batch, and its size."""
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    device = jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name)
    num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    return device * num_rows + jnp.arange(num_rows, dtype=jnp.int32), num_devices * num_rows


def image_keys(task: Task) -> list[str]:
    """Returns the keys of a task's batches that are images."""
    return [name for name, field in task.inputs.items() if field.moves == "image"]


def changed(batch: Batch, names: Sequence[str], change: Normalize) -> Batch:
    """Returns the batch with some of its keys changed, those of them that it has."""
    return {**batch, **{name: change(batch[name]) for name in names if name in batch}}
