"""Time and memory of a training step by what is trained of a network.

    python benchmarks/fine_tuning.py
    python benchmarks/fine_tuning.py --workload resnet50 --methods full head --json steps.json
    python benchmarks/fine_tuning.py --smoke

Every method trains the same network on the same batch with Adam, one compiled step a call, on one
device. Measured as by step_memory.py: the compiler's bytes, and medians of rounds in which the
methods take turns; compilation is apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from peer_processes import machine
from step_costs import (
    SMOKE,
    check_options,
    choose_batch_size,
    compile_step,
    first_batch,
    time_by_turns,
)
from workloads import LEARNING_RATE, WORKLOADS, Workload

from cnnjax import finetune, models
from cnnjax.devices.environment import versions
from cnnjax.errors import unknown_name
from cnnjax.paths import expand_flags
from cnnjax.run.exits import one_line_errors
from cnnjax.tasks.classification import classification
from cnnjax.train import step as steps
from cnnjax.train.state import TrainState, create_state
from cnnjax.trees import count_parameters

METHODS = ("full", "last:3", "last:2", "last:1", "head", "bitfit", "norm", "lora:4", "adapter:8")


@dataclasses.dataclass
class Row:
    """One method; bytes are the compiler's, a step's time is in milliseconds."""

    method: str
    trained_parameters: int
    all_parameters: int
    temporary_bytes: int
    peak_bytes: int
    compile_secs: float
    ms: list[float] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    workload = SMOKE if options.smoke else WORKLOADS[options.workload]
    with one_line_errors():
        methods = {
            name: finetune.make_method(name, make_model(workload), workload.image_shape)
            for name in options.methods
        }
    facts = machine("cpu" if jax.default_backend() == "cpu" else "gpu")
    print(f"{facts['processor']}; {facts['system']}\n", flush=True)
    batch_size = choose_batch_size(workload, options.batch_size)
    rows = measure(workload, methods, batch_size, options.rounds)
    print(f"### {workload.model}, batch {batch_size}\n\n{markdown(rows)}")
    if options.json:
        record = {"machine": facts, "versions": versions(), "batch_size": batch_size}
        record["rows"] = [dataclasses.asdict(row) for row in rows]
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", default="resnet18", help=", ".join(WORKLOADS))
    add("--methods", nargs="+", default=list(METHODS), help="as --method of experiments.finetune")
    add("--batch-size", type=int, help="instead of the workload's own")
    add("--rounds", type=int, default=5, help="measurements of each method (default 5)")
    add("--json", type=Path, help="write all measurements here")
    add("--smoke", action="store_true", help="a tiny network, to see that everything works")
    options = parser.parse_args(expand_flags(argv))
    with one_line_errors():
        if options.workload not in WORKLOADS:
            raise unknown_name("workload", options.workload, WORKLOADS)
        check_options(options)
    return options


def measure(
    workload: Workload, methods: dict[str, finetune.Method], batch_size: int, rounds: int
) -> list[Row]:
    """Compiles a step of every method and times them by turns."""
    batch = first_batch(workload, batch_size)
    rows, programs, states = [], [], []
    for name, method in methods.items():
        state, step = make_step(workload, method)
        program = compile_step(step, state, batch)
        rows.append(
            Row(
                name,
                count_parameters(state.params),
                count_parameters(state.all_params),
                program.temporary_bytes,
                program.peak_bytes,
                program.compile_secs,
            )
        )
        programs.append(program)
        states.append(jax.block_until_ready(program.call(state, batch)[0]))
    for row, ms in zip(rows, time_by_turns(programs, states, batch, rounds), strict=True):
        row.ms = ms
    return rows


def make_model(workload: Workload):
    """Returns the network of a workload."""
    return models.create(workload.model, num_classes=workload.num_classes, **workload.arguments)


def make_step(workload: Workload, method: finetune.Method) -> tuple[TrainState, steps.TrainStep]:
    """Returns the state of step 0 and the step, not compiled."""
    tuned = finetune.FineTuned(make_model(workload), method)
    optimizer = optax.adam(LEARNING_RATE)
    image = jnp.zeros((1, *workload.image_shape))
    variables = jax.jit(lambda key: tuned.init(key, image))(jax.random.key(0))
    step = steps.make_step(
        tuned,  # type: ignore[arg-type]
        optimizer,
        classification(10),
        schedule=optax.constant_schedule(LEARNING_RATE),
    )
    return create_state(variables, optimizer, jax.random.key(1)), step


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a table; ratios are to the first."""
    first = rows[0]
    lines = [
        f"| method | trained | of all | ms per step | x {first.method} | peak MB "
        f"| x {first.method} | temporaries MB | compiled in s |",
        "|---|" + "---:|" * 8,
    ]
    for row in rows:
        ms = statistics.median(row.ms)
        lines.append(
            f"| `{row.method}` | {row.trained_parameters:,} "
            f"| {row.trained_parameters / row.all_parameters:.2%} "
            f"| {ms:,.1f} | {ms / statistics.median(first.ms):.2f} "
            f"| {row.peak_bytes / 1e6:,.1f} | {row.peak_bytes / first.peak_bytes:.2f} "
            f"| {row.temporary_bytes / 1e6:,.1f} | {row.compile_secs:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
