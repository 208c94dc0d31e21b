"""A whole dataset -> metrics and predictions.

Sums and counts are added up on the host, counts as integers and sums in float64, so that the
result does not depend on how the data were cut into batches. Batches are dispatched ahead of the
device: the host never waits for the batch that it has just sent.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cnnjax import metrics, ops
from cnnjax.devices import processes
from cnnjax.devices.sharding import (
    batch_sharding,
    batch_spec,
    bound_queue,
    on_each_device,
    replicated,
    splits_parameters,
    summed_axis,
)
from cnnjax.errors import UserError

PyTree = Any

# Enough to keep a device busy, few enough for large results to fit into memory.
_BATCHES_IN_FLIGHT = 8


def evaluate(
    eval_step: Callable[[PyTree, Any], Mapping[str, Any]],
    variables: PyTree,
    batches: Iterable[Any],
    scores_of: Callable[[Mapping[str, Any]], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Evaluates all batches.

    Args:
      eval_step: `(variables, batch) -> metrics`, of which each is a pair (sum, count) or an array
        of counts, as from `cnnjax.train.predict.make_eval_step`.
      variables: what `model.apply` takes.
      batches: batches of one dataset, the last one padded and masked.
      scores_of: what the task computes from the sums and counts (its `scores`).

    Returns:
      For each pair its quotient, a float (NaN where nothing was counted); for each array of counts,
      such as `confusion`, their int64 sum.

    Raises:
      UserError: there are no batches.
    """
    total: PyTree = None
    for result in _fetched(dict(eval_step(variables, batch)) for batch in batches):
        wide = jax.tree.map(_widen, result)
        total = wide if total is None else metrics.merge(total, wide)
    if total is None:
        raise _no_batches()
    counts = {name: value for name, value in total.items() if isinstance(value, np.ndarray)}
    return metrics.finalize(total) | counts | (scores_of(total) if scores_of else {})


def scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the plain numbers of what `evaluate` returned: all but the arrays of counts."""
    return {name: value for name, value in result.items() if isinstance(value, float)}


def predict_all(
    predict: Callable[[PyTree, Any], Any],
    variables: PyTree,
    batches: Iterable[Mapping[str, Any]],
    *,
    keep: Sequence[str] = ("label",),
) -> tuple[Any, dict[str, np.ndarray]]:
    """Predicts all examples, without the padding.

    Args:
      predict: `(variables, batch) -> arrays [batch, ...]`, such as `make_predict` returns.
      variables: what `model.apply` takes.
      batches: dicts of arrays, with `mask`.
      keep: the keys of the batches to return too.

    Returns:
      The predictions and the kept keys, NumPy arrays `[examples, ...]` in the order of the batches.

    Raises:
      UserError: there are no batches.
    """
    sent = (
        (predict(variables, batch), {name: batch[name] for name in keep}, batch["mask"])
        for batch in batches
    )
    parts = [
        jax.tree.map(lambda array, mask=mask: np.asarray(array)[mask], (predictions, kept))
        for predictions, kept, mask in _fetched(sent)
    ]
    if not parts:
        raise _no_batches()
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _fetched(results: Iterable[PyTree]) -> Iterator[PyTree]:
    """Yields results as NumPy arrays, in order, each a few dispatches after its own."""
    waiting: deque[PyTree] = deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > _BATCHES_IN_FLIGHT:
            yield processes.fetch(waiting.popleft())
    while waiting:
        yield processes.fetch(waiting.popleft())


def _widen(array: Any) -> np.ndarray:
    array = np.asarray(array)
    is_float = np.issubdtype(array.dtype, np.inexact) or array.dtype == "bfloat16"
    return array.astype(np.float64 if is_float else np.int64)


def _no_batches() -> UserError:
    return UserError("there are no batches to evaluate: the dataset or split is empty.")


def compile_eval(
    make_step: Callable[[str | None], Callable], mesh: Mesh
) -> Callable[[PyTree, dict[str, jax.Array]], PyTree]:
    """Compiles an evaluation step; batches are split over the mesh and the results are summed."""
    if splits_parameters(mesh):
        return _one_at_a_time(jax.jit(make_step(None), out_shardings=replicated(mesh)), mesh)
    in_specs = PartitionSpec(), batch_spec(mesh)
    return jax.jit(on_each_device(make_step(summed_axis(mesh)), mesh, in_specs))


def compile_predict(
    predict: Callable[[PyTree, Any], PyTree], mesh: Mesh
) -> Callable[[PyTree, Any], PyTree]:
    """Compiles `(variables, batch) -> arrays [batch, ...]`; batches are split over the mesh."""

    def once(variables: PyTree, batch: Any) -> PyTree:
        # Small programs of several CPU devices run one after another if their convolutions are
        # XLA's own.
        with ops.outside_loops() if mesh.size == 1 else contextlib.nullcontext():
            return predict(variables, batch)

    if splits_parameters(mesh):
        return _one_at_a_time(jax.jit(once, out_shardings=batch_sharding(mesh)), mesh)
    whole, split = PartitionSpec(), batch_spec(mesh)
    return jax.jit(
        jax.shard_map(once, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False)
    )


def _one_at_a_time(function: Callable, mesh: Mesh) -> Callable:
    """Returns the function, which waits for its result where `bound_queue` does."""

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        bound_queue(result, mesh)
        return result

    return call
