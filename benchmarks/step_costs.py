"""Costs of one compiled training step: its batch, its memory, its time. For step_memory.py and
fine_tuning.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from workloads import Workload, load_data

from cnnjax.errors import UserError
from cnnjax.studies.trials import peak_bytes
from cnnjax.train.state import TrainState
from cnnjax.train.step import Batch

SMOKE = Workload(
    "resnet18",
    {"stem": "cifar", "stage_sizes": (1, 1), "features": 8, "stem_features": 8},
    (16, 16, 3),
    10,
    8,
    8,
)


class Program(NamedTuple):
    """A compiled step; bytes are the compiler's."""

    call: Callable[[TrainState, Batch], tuple[TrainState, Any]]
    compile_secs: float
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int


def check_options(options: argparse.Namespace) -> None:
    """Raises a UserError for numbers below 1, and for --json in a directory that is not there."""
    for flag, value in (("--rounds", options.rounds), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give 1 or more")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"{options.json}: there is no directory {options.json.parent}")


def choose_batch_size(workload: Workload, given: int | None) -> int:
    """Returns the number given, or else the workload's own for this device."""
    on_cpu = jax.default_backend() == "cpu"
    return given or (workload.cpu_batch_size if on_cpu else workload.gpu_batch_size)


def first_batch(workload: Workload, batch_size: int) -> Batch:
    """Returns the first batch of a workload's data."""
    image, label = load_data(workload, batch_size)
    return {
        "image": jnp.asarray(image[:batch_size]),
        "label": jnp.asarray(label[:batch_size]),
        "mask": jnp.ones(batch_size, bool),
    }


def compile_step(
    step: Callable,
    state: TrainState,
    batch: Batch,
    *,
    donate: bool = True,
    compiler_options: dict[str, str | bool] | None = None,
) -> Program:
    """Compiles a step and asks the compiler for its memory."""
    started = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0 if donate else ()).lower(state, batch)
    program = lowered.compile(compiler_options)
    compile_secs = time.perf_counter() - started
    memory: Any = program.memory_analysis()
    return Program(
        program,
        compile_secs,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak_bytes(program),
    )


def time_by_turns(
    programs: Sequence[Program], states: list[TrainState], batch: Batch, rounds: int
) -> list[list[float]]:
    """Runs a step of each program, one after another, N times; returns their milliseconds."""
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for index, program in enumerate(programs):
            started = time.perf_counter()
            states[index], metrics = program.call(states[index], batch)
            jax.block_until_ready((states[index], metrics))
            times[index].append(1e3 * (time.perf_counter() - started))
    return times
