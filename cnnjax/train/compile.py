"""Compile modes of one training step: jit over a mesh, pmap, or a chunk of steps in one call.

A compiled trainer is a generator function `train(state, first_step, chunks)`: for each number in
`chunks` it makes that many steps and yields `(state, metrics)`, where every metric is a pair of
`[steps]` NumPy arrays (sum, count). The state that it yields is its own: the next chunk donates
it, so copy what must outlive the chunk.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from cnnjax.data.pipelines import Pipeline, ResidentPipeline
from cnnjax.devices import processes
from cnnjax.devices.sharding import (
    batch_spec,
    bound_queue,
    check_batch_size,
    describe,
    make_mesh,
    on_each_device,
    placed_forms,
    places,
    replicated,
    splits_parameters,
    summed_axis,
)
from cnnjax.errors import UserError, unknown_name
from cnnjax.train import chunks, mapped
from cnnjax.train.state import TrainState
from cnnjax.train.step import Batch, Metrics, TrainStep

# Multiply-accumulates of a batch, forward, that the cores of a CPU share as devices. Measured on 2
# cores: LeNet-5 with 3e7 is then 1.4 times as fast, residual networks of 20 and 56 layers for small
# images, with 4e9 and 1.2e10, 1.3 and 1.09 times, ResNet-18 with 4e10 slower and less steady.
MOST_DIVIDED_MACS = 15 * 10**9
METHODS = ("auto", "jit", "pmap", "scan")
StackedMetrics = dict[str, tuple[np.ndarray, np.ndarray]]
# What a factory of steps takes by name.
Numbers = dict[str, Any]
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
    make_step: Callable[..., TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    method: str,
    mesh: Mesh,
    compiler_options: dict[str, str | bool] | None = None,
) -> Train:
    """Compiles a training step for `data` and returns its trainer; the compiler runs here.

    Args:
      make_step: axis name -> step: `make_step` with all but `axis_name` bound. If it is a
        `jax.tree_util.Partial`, the numbers that it binds by name are arguments of the program
        rather than constants in it: programs that differ in them alone are compiled once, and then
        found in JAX's persistent cache.
      state: a state of arrays or `jax.ShapeDtypeStruct`s that lie on the mesh as `state_shardings`
        says, or whole on each device; training keeps them there. No values are used.
      data: the pipeline that the trainer will read.
      method: `jit` (one call per step), `scan` (one call per chunk of steps), `pmap` (one call per
        step, by `jax.pmap`), or `auto`. Where the mesh divides the batch alone, each device
        has a program of its own; where it divides parameters too (`jit` only), XLA divides it.
      mesh: the devices.
      compiler_options: XLA's, such as those of `cnnjax.devices.backend.compiler_options`.
    """
    trainer = start_compiling(
        make_step, state, data, method=method, mesh=mesh, compiler_options=compiler_options
    )
    return trainer()


def start_compiling(
    make_step: Callable[..., TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    method: str,
    mesh: Mesh,
    compiler_options: dict[str, str | bool] | None = None,
    compiled_program: Callable[[jax.stages.Compiled], None] | None = None,
) -> Callable[[], Train]:
    """Traces the step, starts the compiler in a thread, and returns what waits for the trainer.

    Meanwhile the state can be made or read. Arguments as for `compile_train`; `compiled_program` is
    called with the program when it is there.
    """
    method = choose_method(method, data, mesh)
    lowered = lower_train(make_step, state, data, method=method, mesh=mesh)
    numbers = _bound(make_step)
    if method != "pmap":  # It puts them on its devices itself.
        numbers = processes.put(jax.tree.map(_as_array, numbers), replicated(mesh))
    pool = concurrent.futures.ThreadPoolExecutor(1)
    compiling = pool.submit(lowered.compile, compiler_options)
    pool.shutdown(wait=False)

    def trainer() -> Train:
        compiled = compiling.result()
        if compiled_program is not None:
            compiled_program(compiled)

        def run(*arguments: Any) -> Any:
            return compiled(*arguments, numbers)

        if method == "scan":
            assert isinstance(data, ResidentPipeline)
            return chunks.trainer(run, data, mesh)
        if method == "pmap":
            return mapped.trainer(functools.partial(_step_trainer, run), data, mesh)
        return _step_trainer(run, data, mesh)

    return trainer


def lower_train(
    make_step: Callable[..., TrainStep],
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
    state = placed_forms(state, mesh)
    numbers = _forms(_bound(make_step), None if method == "pmap" else replicated(mesh))
    if method == "scan":
        assert isinstance(data, ResidentPipeline)
        return chunks.lower(make_step, numbers, state, data, mesh)
    if method == "pmap":
        return mapped.lower(make_step, numbers, state, data, mesh)

    def step(state: TrainState, batch: Batch, numbers: Numbers) -> tuple[TrainState, Metrics]:
        return make_step(summed_axis(mesh), **numbers)(state, batch)

    program: Callable = step
    if not splits_parameters(mesh):
        whole = PartitionSpec()
        program = on_each_device(step, mesh, (whole, batch_spec(mesh), whole))
    compiled = jax.jit(program, donate_argnums=0, out_shardings=(places(state), replicated(mesh)))
    return compiled.lower(state, data.batch_shapes, numbers)


def _bound(make_step: Callable) -> Numbers:
    """Returns what a `Partial` binds by name, and a call of it may name anew. Itself it is no
    argument of the program: as a part of the arguments' structure its function, with all that it
    holds, would never be freed."""
    return make_step.keywords if isinstance(make_step, Partial) else {}


def _forms(numbers: Numbers, place: NamedSharding | None) -> Numbers:
    """Returns the forms of numbers; Python's take the dtypes of those that they meet."""

    def form(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place, weak_type=leaf.weak_type
        )

    return jax.tree.map(form, jax.eval_shape(lambda numbers: numbers, numbers))


def _as_array(number: Any) -> np.ndarray:
    return np.asarray(number, jax.dtypes.canonicalize_dtype(np.result_type(number)))


def _step_trainer(step: Callable, data: Pipeline, mesh: Mesh) -> Train:
    def train(state: TrainState, first_step: int, chunks: Iterable[int]):
        batches = data.batches(first_step)
        for num_steps in chunks:
            history = []
            for _ in range(num_steps):
                state, metrics = step(state, next(batches))
                history.append(metrics)
                bound_queue(metrics, mesh)
            yield state, jax.tree.map(lambda *values: np.stack(values), *jax.device_get(history))

    return train
