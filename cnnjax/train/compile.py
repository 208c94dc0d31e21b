"""Compile modes of one training step: jit over a mesh, pmap, or a chunk of steps in one call.

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

from cnnjax.data.pipelines import Pipeline, ResidentPipeline, gather
from cnnjax.devices import processes
from cnnjax.devices.sharding import (
    batch_sharding,
    batch_spec,
    check_batch_size,
    describe,
    make_mesh,
    placed_form,
    replicated,
    splits_parameters,
    state_shardings,
)
from cnnjax.errors import UserError, unknown_name
from cnnjax.train.state import TrainState
from cnnjax.train.step import TrainStep

__all__ = [
    "METHODS",
    "batch_sharding",
    "check_batch_size",
    "choose_mesh",
    "choose_method",
    "compile_eval",
    "compile_predict",
    "compile_train",
    "lower_train",
    "make_mesh",
    "replicated",
    "state_shardings",
]

PyTree = Any
# The axis over which `pmap` and `shard_map` map a step.
AXIS = "data"
# Multiply-accumulates of a batch, forward, that the cores of a CPU share as devices. Measured on 2
# cores: LeNet-5 with 3e7 is then 1.4 times as fast, residual networks of 20 and 56 layers for small
# images, with 4e9 and 1.2e10, 1.3 and 1.09 times, ResNet-18 with 4e10 slower and less steady.
MOST_DIVIDED_MACS = 15 * 10**9
METHODS = ("auto", "jit", "pmap", "scan")
StackedMetrics = dict[str, tuple[np.ndarray, np.ndarray]]
Train = Callable[[TrainState, int, Iterable[int]], Iterator[tuple[TrainState, StackedMetrics]]]


def choose_mesh(asked: str | int, multiply_accumulates: int) -> Mesh:
    """Returns the mesh that is asked for, as `make_mesh` takes it; else the fastest known.

    That is all devices, but of a CPU's only one, with all its threads, for large networks.

    Args:
      asked: axes and their sizes, or the number of devices; "" and 0 leave the choice.
      multiply_accumulates: of the forward pass of a batch.
    """
    large = multiply_accumulates > MOST_DIVIDED_MACS
    if not asked and large and jax.default_backend() == "cpu" and processes.count() == 1:
        return make_mesh(1)
    return make_mesh(asked or None)


def choose_method(method: str, data: Pipeline, mesh: Mesh) -> str:
    """Resolves `auto` to the fastest way known, and checks that data and mesh suit the way.

    A whole chunk of steps in one compiled call costs no Python between the steps, which is what
    bounds small networks; it needs the data on the device. Networks whose parameters are divided
    over the mesh are not small.
    """
    if method not in METHODS:
        raise unknown_name("compile mode", method, METHODS)
    resident = isinstance(data, ResidentPipeline)
    if method == "scan" and not resident:
        raise UserError("'scan' needs resident data, but this pipeline streams: use 'jit'.")
    if method == "pmap" and mesh.is_multi_process:
        raise UserError("'pmap' works within one process: use 'jit', which spans any number.")
    if method == "pmap" and splits_parameters(mesh):
        raise UserError(
            f"'pmap' divides the batch alone, but the mesh is {describe(mesh)}: use 'jit', or the "
            f"mesh data={mesh.size}."
        )
    if method != "auto":
        return method
    return "scan" if resident and not splits_parameters(mesh) else "jit"


def compile_train(
    make_step: Callable[[str | None], TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    method: str,
    mesh: Mesh,
    compiler_options: dict[str, str | bool] | None = None,
) -> Train:
    """Compiles a training step for `data` and returns its trainer; the compiler runs here.

    Args:
      make_step: axis name -> step: `make_step` with all but `axis_name` bound.
      state: a state of arrays or `jax.ShapeDtypeStruct`s that lie on the mesh as `state_shardings`
        says, or whole on each device; training keeps them there. No values are used.
      data: the pipeline that the trainer will read.
      method: `jit` (one call per step), `scan` (one call per chunk of steps), `pmap` (one call per
        step, by `jax.pmap`), or `auto`. Where the mesh divides the batch alone, each device
        has a program of its own; where it divides parameters too (`jit` only), XLA divides it.
      mesh: the devices.
      compiler_options: XLA's, such as those of `cnnjax.devices.backend.compiler_options`.
    """
    method = choose_method(method, data, mesh)
    lowered = lower_train(make_step, state, data, method=method, mesh=mesh)
    compiled = lowered.compile(compiler_options)
    if method == "scan":
        assert isinstance(data, ResidentPipeline)
        return _chunk_trainer(compiled, data, mesh)
    if method == "pmap":
        return _pmap_trainer(compiled, data, mesh)
    return _step_trainer(compiled, data, mesh)


def lower_train(
    make_step: Callable[[str | None], TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    method: str,
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Returns the program of a step (of a chunk of steps for `scan`), for the compiler.

    Arguments as for `compile_train`. No array is made and no batch is read.
    """
    check_batch_size(data.batch_size, mesh)
    method = choose_method(method, data, mesh)
    state = _abstract(state, mesh)
    if method == "scan":
        assert isinstance(data, ResidentPipeline)
        return _lower_scan(make_step, state, data, mesh)
    if method == "pmap":
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype), state
        )
        batch = jax.eval_shape(lambda batch: _split(batch, mesh), data.batch_shapes)
        return _mapped(make_step, mesh).lower(arguments, batch)
    places = _places(state), replicated(mesh)
    step = make_step(_axis(mesh))
    if not splits_parameters(mesh):
        step = _on_each_device(step, mesh, (PartitionSpec(), batch_spec(mesh)))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=places)
    return compiled.lower(state, data.batch_shapes)


def compile_eval(
    make_step: Callable[[str | None], Callable], mesh: Mesh
) -> Callable[[PyTree, dict[str, jax.Array]], PyTree]:
    """Compiles an evaluation step; batches are split over the mesh and the results are summed."""
    if splits_parameters(mesh):
        return _one_at_a_time(jax.jit(make_step(None), out_shardings=replicated(mesh)), mesh)
    in_specs = PartitionSpec(), batch_spec(mesh)
    return jax.jit(_on_each_device(make_step(_axis(mesh)), mesh, in_specs))


def compile_predict(
    predict: Callable[[PyTree, Any], PyTree], mesh: Mesh
) -> Callable[[PyTree, Any], PyTree]:
    """Compiles `(variables, batch) -> arrays [batch, ...]`; batches are split over the mesh."""
    if splits_parameters(mesh):
        return _one_at_a_time(jax.jit(predict, out_shardings=batch_sharding(mesh)), mesh)
    whole, split = PartitionSpec(), batch_spec(mesh)
    return jax.jit(
        jax.shard_map(predict, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=False)
    )


def _step_trainer(step, data: Pipeline, mesh: Mesh) -> Train:
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


def _pmap_trainer(step, data: Pipeline, mesh: Mesh) -> Train:
    devices = list(mesh.devices.flat)
    split = jax.jit(lambda batch: _split(batch, mesh))

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


def _chunk_trainer(compiled, data: ResidentPipeline, mesh: Mesh) -> Train:
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


def _lower_scan(
    make_step, state: TrainState, data: ResidentPipeline, mesh: Mesh
) -> jax.stages.Lowered:
    step = make_step(_axis(mesh))
    capacity = data.steps_per_epoch

    def batch_of(arrays: dict, indices: jax.Array) -> dict:
        batch = gather(arrays, indices)
        if not splits_parameters(mesh):
            return batch
        return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))

    def run(state: TrainState, arrays: dict, indices: jax.Array, num_steps: jax.Array):
        _, shapes = jax.eval_shape(step, state, batch_of(arrays, indices[0]))
        metrics = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), shapes)

        def body(i: jax.Array, carry: tuple[TrainState, PyTree]):
            state, metrics = carry
            state, new = step(state, batch_of(arrays, indices[i]))
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, new)

        # A loop of traced length rather than `lax.scan`: one program serves chunks of any length,
        # so the bits of a run do not depend on how its steps are grouped.
        return jax.lax.fori_loop(0, num_steps, body, (state, metrics))

    if not splits_parameters(mesh):
        whole = PartitionSpec()
        run = _on_each_device(run, mesh, (whole, whole, _by_step(mesh).spec, whole))
    indices = jax.ShapeDtypeStruct((capacity, data.batch_size), np.int32, sharding=_by_step(mesh))
    num_steps = jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))
    places = _places(state), replicated(mesh)
    return jax.jit(run, donate_argnums=0, out_shardings=places).lower(
        state, _abstract(data.arrays, mesh), indices, num_steps
    )


def _axis(mesh: Mesh) -> str | None:
    """Returns the name of the axis over which each device's step sums, if there is one."""
    return AXIS if mesh.size > 1 and not splits_parameters(mesh) else None


def _on_each_device(function: Callable, mesh: Mesh, in_specs: tuple) -> Callable:
    """Returns the function as each device's program for its part of the arguments.

    Its results are the same on each. Where the compiler divides the batch instead, and as far as
    tracing knows it may on one device too, no layout can be fixed: see `ops.once`.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False
    )


def _abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and places of arrays; those that are not on the mesh go whole to each part."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, "sharding", None)
        if not isinstance(place, NamedSharding) or place.mesh != mesh:
            place = replicated(mesh)
        return placed_form(leaf, place)

    return jax.tree.map(abstract, tree)


def _places(abstract: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _by_step(mesh: Mesh) -> NamedSharding:
    """Divides `[steps, batch]` by examples."""
    return NamedSharding(mesh, PartitionSpec(None, *batch_spec(mesh)))


def _mapped(make_step, mesh: Mesh):
    devices = list(mesh.devices.flat)
    return jax.pmap(make_step(AXIS), axis_name=AXIS, donate_argnums=0, devices=devices)


def _split(batch: PyTree, mesh: Mesh) -> PyTree:
    """Reshapes `[batch, ...]` to `[devices, batch / devices, ...]`."""
    return jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)


def _bound_queue(metrics: PyTree, mesh: Mesh) -> None:
    """Waits for a step that spans CPU devices.

    Steps queued behind it would take the threads with which its devices wait for each other.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(metrics)


def _one_at_a_time(function: Callable, mesh: Mesh) -> Callable:
    """Returns the function, which waits for its result where `_bound_queue` does."""

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        _bound_queue(result, mesh)
        return result

    return call


def _pieces(length: int, capacity: int) -> list[int]:
    """Splits a length into parts of at most `capacity`."""
    whole, rest = divmod(length, capacity)
    return [capacity] * whole + [rest] * (rest > 0)


def _stack(history: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *values: np.stack(values), *jax.device_get(history))
