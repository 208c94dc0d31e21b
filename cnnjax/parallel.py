"""The ways to compile one training step: jit over a mesh, pmap, or a whole chunk of steps at once.

A compiled trainer is a generator function `train(state, first_step, chunks)`: for each number in
`chunks` it makes that many steps and yields `(state, metrics)`, where every metric is a pair of
`[steps]` NumPy arrays (sum, count). The state that it yields is its own: the next chunk donates
it, so copy what must outlive the chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax import distributed
from cnnjax.data.pipelines import Pipeline, ResidentPipeline, gather
from cnnjax.errors import UserError, unknown_name
from cnnjax.state import TrainState
from cnnjax.steps import TrainStep

PyTree = Any
AXIS = "data"
METHODS = ("auto", "jit", "pmap", "scan")
StackedMetrics = dict[str, tuple[np.ndarray, np.ndarray]]
Train = Callable[[TrainState, int, Iterable[int]], Iterator[tuple[TrainState, StackedMetrics]]]


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a one-dimensional mesh named `data` over the first `num_devices` devices, or all."""
    available = jax.devices()
    num_devices = num_devices or len(available)
    if num_devices > len(available):
        raise UserError(
            f"{num_devices} devices asked for, but JAX sees {len(available)} "
            f"{available[0].platform} device(s): ask for at most that many."
        )
    # Auto axes: with Explicit ones, today's default of `jax.make_mesh`, Optax's losses fail.
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh(
        (num_devices,), (AXIS,), devices=available[:num_devices], axis_types=axis_types
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that splits an array's first axis over the mesh."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy of an array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises a UserError unless the devices can share a batch evenly."""
    if batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise UserError(
            f"batch size {batch_size} is not divisible by the {mesh.size} devices: "
            f"use {nearest}, or another number of devices."
        )


def choose_method(method: str, data: Pipeline, mesh: Mesh) -> str:
    """Resolves `auto` to the fastest way known, and checks that the data can be fed that way.

    A whole chunk of steps in one compiled call costs no Python between the steps, which is what
    bounds small networks; it needs the data on the device.
    """
    if method not in METHODS:
        raise unknown_name("way to compile a step", method, METHODS)
    resident = isinstance(data, ResidentPipeline)
    if method == "scan" and not resident:
        raise UserError("'scan' needs resident data, but this pipeline streams: use 'jit'.")
    if method == "pmap" and mesh.is_multi_process:
        raise UserError("'pmap' works within one process: use 'jit', which spans any number.")
    if method != "auto":
        return method
    return "scan" if resident else "jit"


def compile_train(
    make_step: Callable[[str | None], TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    method: str,
    mesh: Mesh,
) -> Train:
    """Compiles a training step for `data` and returns its trainer; the compiler runs here.

    Args:
      make_step: axis name -> step: `make_train_step` with all but `axis_name` bound.
      state: a state of the right shapes, replicated over `mesh`; its values are not used.
      data: the pipeline that the trainer will read.
      method: `jit` (one call a step, XLA divides the batch), `pmap` (one call a step, one program a
        device) or `scan` (one call a chunk; over several devices one program a device), or `auto`.
      mesh: the devices.
    """
    check_batch_size(data.batch_size, mesh)
    method = choose_method(method, data, mesh)
    if method == "scan":
        assert isinstance(data, ResidentPipeline)
        return _compile_scan(make_step, state, data, mesh)
    compile_one = _compile_pmap if method == "pmap" else _compile_jit
    return compile_one(make_step, state, data, mesh)


def compile_eval(
    make_step: Callable[[str | None], Callable], mesh: Mesh
) -> Callable[[PyTree, dict[str, jax.Array]], PyTree]:
    """Compiles an evaluation step; batches are split over the mesh and the results are summed."""
    if mesh.size == 1:
        return jax.jit(make_step(None))
    return jax.jit(
        jax.shard_map(
            make_step(AXIS),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )


def compile_predict(
    predict: Callable[[PyTree, jax.Array], jax.Array], mesh: Mesh
) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Compiles `(variables, image) -> one row an image`; images are split over the mesh."""
    if mesh.size == 1:
        return jax.jit(predict)
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(predict, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False)
    )


def _compile_jit(make_step, state: TrainState, data: Pipeline, mesh: Mesh) -> Train:
    example = next(data.batches(0))
    step = (
        jax.jit(make_step(None), donate_argnums=0, out_shardings=replicated(mesh))
        .lower(state, example)
        .compile()
    )

    def train(state: TrainState, first_step: int, chunks: Iterable[int]):
        batches = data.batches(first_step)
        for num_steps in chunks:
            history = []
            for _ in range(num_steps):
                state, metrics = step(state, next(batches))
                history.append(metrics)
                _bound_queue(metrics, mesh)
            yield state, _stack(history)

    return train


def _compile_pmap(make_step, state: TrainState, data: Pipeline, mesh: Mesh) -> Train:
    devices = list(mesh.devices.flat)
    step = jax.pmap(make_step(AXIS), axis_name=AXIS, donate_argnums=0, devices=devices)

    @jax.jit
    def split(batch):
        return jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)

    def train(state: TrainState, first_step: int, chunks: Iterable[int]):
        batches = data.batches(first_step)
        state = flax.jax_utils.replicate(state, devices)
        for num_steps in chunks:
            history = []
            for _ in range(num_steps):
                state, metrics = step(state, split(next(batches)))
                history.append(metrics)
                _bound_queue(metrics, mesh)
            first = [flax.jax_utils.unreplicate(metrics) for metrics in history]
            yield jax.device_put(flax.jax_utils.unreplicate(state), replicated(mesh)), _stack(first)

    return train


def _compile_scan(make_step, state: TrainState, data: ResidentPipeline, mesh: Mesh) -> Train:
    axis_name = None if mesh.size == 1 else AXIS
    step = make_step(axis_name)
    capacity = data.steps_per_epoch

    def run(state: TrainState, arrays: dict, indices: jax.Array, num_steps: jax.Array):
        _, shapes = jax.eval_shape(step, state, gather(arrays, indices[0]))
        metrics = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), shapes)

        def body(i: jax.Array, carry: tuple[TrainState, PyTree]):
            state, metrics = carry
            state, new = step(state, gather(arrays, indices[i]))
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, new)

        # A loop of traced length rather than `lax.scan`: one program serves chunks of any length,
        # so the bits of a run do not depend on how its steps are grouped.
        return jax.lax.fori_loop(0, num_steps, body, (state, metrics))

    if mesh.size > 1:
        whole = PartitionSpec()
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(whole, whole, PartitionSpec(None, AXIS), whole),
            out_specs=whole,
            check_vma=False,
        )

    def padded_indices(first_step: int, num_steps: int) -> jax.Array:
        indices = data.indices(first_step, num_steps)
        padding = np.zeros((capacity - num_steps, data.batch_size), indices.dtype)
        sharding = NamedSharding(mesh, PartitionSpec(None, AXIS))
        return distributed.put(np.concatenate([indices, padding]), sharding)

    def scalar(number: int) -> jax.Array:
        return distributed.put(np.int32(number), replicated(mesh))

    arguments = state, data.arrays, padded_indices(0, 1), scalar(1)
    compiled = jax.jit(run, donate_argnums=0).lower(*arguments).compile()

    def train(state: TrainState, first_step: int, chunks: Iterable[int]):
        for chunk in chunks:
            history = []
            for length in _pieces(chunk, capacity):
                indices = padded_indices(first_step, length)
                state, metrics = compiled(state, data.arrays, indices, scalar(length))
                history.append((metrics, length))
                first_step += length
            fetched = [
                jax.tree.map(lambda leaf, length=length: leaf[:length], metrics)
                for metrics, length in jax.device_get(history)
            ]
            yield state, jax.tree.map(lambda *parts: np.concatenate(parts), *fetched)

    return train


def _bound_queue(metrics: PyTree, mesh: Mesh) -> None:
    """Waits for a step that spans CPU devices.

    Steps queued behind it would take the threads with which its devices wait for each other.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(metrics)


def _pieces(length: int, capacity: int) -> list[int]:
    """Splits a length into parts of at most `capacity`."""
    whole, rest = divmod(length, capacity)
    return [capacity] * whole + [rest] * (rest > 0)


def _stack(history: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *values: np.stack(values), *jax.device_get(history))
