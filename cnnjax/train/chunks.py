"""Many steps in one compiled call: the `scan` of `cnnjax.train.compile`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.data.pipelines import ResidentPipeline, gather
from cnnjax.devices import processes
from cnnjax.devices.sharding import (
    batch_sharding,
    batch_spec,
    on_each_device,
    placed_forms,
    places,
    replicated,
    splits_parameters,
    summed_axis,
)
from cnnjax.train.state import TrainState

PyTree = Any


def trainer(compiled: Callable, data: ResidentPipeline, mesh: Mesh) -> Callable:
    """Returns the trainer that calls the compiled program of `lower` once a chunk of steps."""
    capacity = data.steps_per_epoch

    def padded_indices(first_step: int, num_steps: int) -> jax.Array:
        indices = data.indices(first_step, num_steps)
        padding = np.zeros((capacity - num_steps, data.batch_size), indices.dtype)
        return processes.put(np.concatenate([indices, padding]), _by_step(mesh))

    def train(state: TrainState, first_step: int, chunks: Iterable[int]):
        for chunk in chunks:
            history = []
            for length in _pieces(chunk, capacity):
                indices = padded_indices(first_step, length)
                num_steps = processes.put(np.int32(length), replicated(mesh))
                state, metrics = compiled(state, data.arrays, indices, num_steps)
                history.append((metrics, length))
                first_step += length
            fetched = [
                jax.tree.map(lambda leaf, length=length: leaf[:length], metrics)
                for metrics, length in jax.device_get(history)
            ]
            yield state, jax.tree.map(lambda *parts: np.concatenate(parts), *fetched)

    return train


def lower(
    make_step: Callable[..., Callable],
    numbers: dict[str, Any],
    state: TrainState,
    data: ResidentPipeline,
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Returns the program of up to an epoch of steps, whose batches it gathers itself.

    Its last argument is `numbers`, what `make_step` takes by name; their forms are given here.
    """
    capacity = data.steps_per_epoch

    def batch_of(arrays: dict, indices: jax.Array) -> dict:
        batch = gather(arrays, indices)
        if not splits_parameters(mesh):
            return batch
        return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))

    def run(
        state: TrainState,
        arrays: dict,
        indices: jax.Array,
        num_steps: jax.Array,
        numbers: dict[str, Any],
    ) -> tuple[TrainState, PyTree]:
        step = make_step(summed_axis(mesh), **numbers)
        return many_steps(step, batch_of)(state, arrays, indices, num_steps)

    program: Callable = run
    if not splits_parameters(mesh):
        whole = PartitionSpec()
        program = on_each_device(run, mesh, (whole, whole, _by_step(mesh).spec, whole, whole))
    indices = jax.ShapeDtypeStruct((capacity, data.batch_size), np.int32, sharding=_by_step(mesh))
    num_steps = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
    outputs = places(state), replicated(mesh)
    return jax.jit(program, donate_argnums=0, out_shardings=outputs).lower(
        state, placed_forms(data.arrays, mesh), indices, num_steps, numbers
    )


def many_steps(
    step: Callable, batch_of: Callable[[PyTree, jax.Array], PyTree] = gather
) -> Callable:
    """Returns `run(state, arrays, indices, num_steps) -> (state, metrics)`, so many steps.

    Args:
      step: `(state, batch) -> (state, metrics)`.
      batch_of: `(arrays, indices[i]) -> batch`.

    Returns:
      The function: the first axis of `indices` and of every metric are the most steps that it can
      make, of which it makes `num_steps`.
    """

    # Traced once, though what it returns is asked for before the loop.
    step = jax.jit(step, inline=True)

    def run(state: PyTree, arrays: PyTree, indices: jax.Array, num_steps: jax.Array):
        _, shapes = jax.eval_shape(step, state, batch_of(arrays, indices[0]))
        most = len(indices)
        metrics = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)

        def body(i: jax.Array, carry: tuple[PyTree, PyTree]):
            state, metrics = carry
            state, new = step(state, batch_of(arrays, indices[i]))
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, new)

        # A loop of traced length rather than `lax.scan`: one program serves chunks of any length,
        # so the bits of a run do not depend on how its steps are grouped.
        return jax.lax.fori_loop(0, num_steps, body, (state, metrics))

    return run


def _by_step(mesh: Mesh) -> NamedSharding:
    """Divides `[steps, batch]` by examples."""
    return NamedSharding(mesh, PartitionSpec(None, *batch_spec(mesh)))


def _pieces(length: int, capacity: int) -> list[int]:
    """Splits a length into parts of at most `capacity`."""
    whole, rest = divmod(length, capacity)
    return [capacity] * whole + [rest] * (rest > 0)
