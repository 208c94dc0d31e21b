"""Memory of a training step on each device, as the compiler reports it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from cnnjax.data.pipelines import Pipeline, ResidentPipeline
from cnnjax.devices import host, processes
from cnnjax.devices.sharding import describe
from cnnjax.errors import UserError
from cnnjax.train.compile import choose_method, lower_train
from cnnjax.train.state import TrainState
from cnnjax.train.step import TrainStep

PyTree = Any
# Beside the batch in use: two that wait, and one on its way.
STREAMED_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device of a mesh.

    Attributes:
      parameters, optimizer, averages, statistics: of the state: parameters with all that is frozen,
        the optimizer's state, averaged parameters, and BatchNorm's running statistics.
      data: the batches that lie on the device, or all resident examples.
      workspace: what the compiled step needs at its peak besides these: activations, gradients and
        temporary arrays.
      available: the device's memory; of CPU devices their fraction of the host's. None if unknown.
      title: devices, mesh and compile mode, in words.
    """

    parameters: int
    optimizer: int
    averages: int
    statistics: int
    data: int
    workspace: int
    available: int | None
    title: str

    @property
    def total(self) -> int:
        """All of these together."""
        state = self.parameters + self.optimizer + self.averages + self.statistics
        return state + self.data + self.workspace

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory, as far as that is known."""
        return self.available is None or self.total <= self.available


def memory_plan(
    make_step: Callable[[str | None], TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    method: str,
    mesh: Mesh,
    compiler_options: dict[str, str | bool] | None = None,
) -> MemoryPlan:
    """Compiles a training step and returns what it takes of each device's memory.

    Arguments as for `cnnjax.train.compile.compile_train`; the state may be one of
    `jax.ShapeDtypeStruct`s. Nothing is put on a device.
    """
    method = choose_method(method, data, mesh)
    lowered = lower_train(make_step, state, data, method=method, mesh=mesh)
    compiler = lowered.compile(compiler_options).memory_analysis()
    if compiler is None:
        raise UserError(f"the compiler for {mesh.devices.flat[0].platform} tells no memory sizes.")
    if isinstance(data, ResidentPipeline):
        stored = device_bytes(data.arrays)
        # Chunks of steps draw their batches from the examples within the step.
        stored += 0 if method == "scan" else device_bytes(data.batch_shapes)
    else:
        stored = STREAMED_BATCHES * device_bytes(data.batch_shapes)
    # What is donated is counted as an argument and as an output.
    outputs = compiler.output_size_in_bytes - compiler.alias_size_in_bytes
    device = mesh.devices.flat[0]
    return MemoryPlan(
        parameters=device_bytes((state.params, state.frozen)),
        optimizer=device_bytes(state.opt_state),
        averages=device_bytes(state.ema),
        statistics=device_bytes(state.batch_stats),
        data=stored,
        workspace=compiler.temp_size_in_bytes + max(0, outputs),
        available=available_bytes(mesh),
        title=f"{mesh.size} x {device.device_kind}, {describe(mesh)}, step by {method}",
    )


def device_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree of arrays or `jax.ShapeDtypeStruct`s on one device."""

    def count(leaf: Any) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for length in shape:
            size *= length
        return size

    return sum(count(leaf) for leaf in jax.tree.leaves(tree))


def available_bytes(mesh: Mesh) -> int | None:
    """Returns the memory of a device of the mesh; of CPU devices their fraction of the host's."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        total = host.memory_bytes()
        return None if total is None else total // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def format_plan(plan: MemoryPlan) -> str:
    """Sets a plan as a text table, without a line end."""
    rows = {
        "parameters": plan.parameters,
        "optimizer state": plan.optimizer,
        "averaged parameters": plan.averages,
        "running statistics": plan.statistics,
        "data": plan.data,
        "activations, gradients, workspace": plan.workspace,
        "total": plan.total,
    }
    lines = [f"memory of each device ({plan.title})"]
    lines += [f"  {name:<34}{_megabytes(size):>14}" for name, size in rows.items()]
    if plan.available is None:
        return "\n".join([*lines, "  available                                unknown"])
    share = plan.total / plan.available
    verdict = f"{'fits' if plan.fits else 'does not fit'}, {share:.1%} used"
    return "\n".join([*lines, f"  {'available':<34}{_megabytes(plan.available):>14}  {verdict}"])


def show(
    make_step: Callable[[str | None], TrainStep], state: TrainState, data: Pipeline, **how: Any
) -> None:
    """Prints the plan; a UserError if it does not fit. Arguments as for `memory_plan`."""
    plan = memory_plan(make_step, state, data, **how)
    processes.say(format_plan(plan))
    check_fits(plan)


def check_fits(plan: MemoryPlan) -> None:
    """Raises a UserError unless the step fits."""
    if not plan.fits:
        assert plan.available is not None
        raise UserError(
            f"a step needs {_megabytes(plan.total)} on each device, and "
            f"{_megabytes(plan.available)} are available: use a smaller batch, --accumulate, "
            "--remat, more devices, or divide the parameters over the axis fsdp of the mesh."
        )


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.2f} MB"
