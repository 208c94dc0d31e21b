"""Memory and time of a training step: accumulation, remat, donation, precision, lowerings.

    python benchmarks/step_memory.py
    python benchmarks/step_memory.py --workloads resnet18 --variants plain remat --json memory.json
    python benchmarks/step_memory.py --smoke

Every variant trains the same network on the same batch with SGD and momentum, one compiled step a
call, on one device. Memory is what the compiler reserves for a step: arguments (state and batch),
outputs that cannot reuse the arguments' memory, and temporaries, which are activations and scratch.
Times are medians of rounds in which the variants take turns; compilation is apart, without a cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from workloads import LEARNING_RATE, MOMENTUM, WORKLOADS, Workload

from cnnjax import models, ops
from cnnjax.devices import backend
from cnnjax.devices.environment import versions
from cnnjax.errors import unknown_name
from cnnjax.paths import expand_flags
from cnnjax.run import load
from cnnjax.run.exits import one_line_errors
from cnnjax.tasks.classification import classification
from cnnjax.train import step as steps
from cnnjax.train.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a step is computed; the defaults are those of the experiments."""

    accumulate: int = 1
    remat: bool = False
    donate: bool = True
    precision: str = "float32"
    lowering: str = "auto"


VARIANTS = {
    "plain": Variant(),
    "no donation": Variant(donate=False),
    "accumulate 4": Variant(accumulate=4),
    "remat": Variant(remat=True),
    "accumulate 4, remat": Variant(accumulate=4, remat=True),
    "bfloat16": Variant(precision="bfloat16"),
    "bfloat16, remat": Variant(precision="bfloat16", remat=True),
    "bfloat16, accumulate 4, remat": Variant(accumulate=4, remat=True, precision="bfloat16"),
    "float16": Variant(precision="float16"),
    "all im2col": Variant(lowering="im2col"),
    "all lax": Variant(lowering="lax"),
}


@dataclasses.dataclass
class Row:
    """One variant of one workload; bytes are the compiler's, a step's time is in milliseconds."""

    workload: str
    batch_size: int
    variant: str
    compile_secs: float
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    first_loss: float
    ms: list[float] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    facts = machine("cpu" if jax.default_backend() == "cpu" else "gpu")
    print(f"{facts['processor']}; {facts['system']}\n", flush=True)
    record: dict[str, Any] = {"machine": facts, "versions": versions(), "rows": []}
    workloads = {"smoke": SMOKE} if options.smoke else {n: WORKLOADS[n] for n in options.workloads}
    for name, workload in workloads.items():
        rows = measure(name, workload, options)
        print(markdown(rows), flush=True)
        record["rows"] += [dataclasses.asdict(row) for row in rows]
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workloads", nargs="+", default=["resnet18", "resnet50"], help=", ".join(WORKLOADS))
    add("--variants", nargs="+", default=list(VARIANTS), help="default: all of the table")
    add("--batch-size", type=int, help="instead of each workload's own")
    add("--rounds", type=int, default=5, help="measurements of each variant (default 5)")
    add("--json", type=Path, help="write all measurements here, after each workload")
    add("--smoke", action="store_true", help="a tiny network, to see that everything works")
    options = parser.parse_args(expand_flags(argv))
    with one_line_errors():
        for kind, given, valid in (
            ("workload", options.workloads, WORKLOADS),
            ("variant", options.variants, VARIANTS),
        ):
            for name in given:
                if name not in valid:
                    raise unknown_name(kind, name, valid)
        check_options(options)
    return options


def measure(name: str, workload: Workload, options: argparse.Namespace) -> list[Row]:
    """Compiles every variant of one workload and times them by turns."""
    batch_size = choose_batch_size(workload, options.batch_size)
    batch = first_batch(workload, batch_size)
    rows, programs, states = [], [], []
    for name_of_variant in options.variants:
        variant = VARIANTS[name_of_variant]
        state, step = make_step(workload, variant)
        with ops.lowering(variant.lowering):
            program = compile_step(
                step,
                state,
                batch,
                donate=variant.donate,
                compiler_options=backend.compiler_options(remat=variant.remat),
            )
        state, metrics = program.call(state, batch)
        total, count = jax.device_get(metrics["loss"])
        rows.append(
            Row(
                name,
                batch_size,
                name_of_variant,
                program.compile_secs,
                program.argument_bytes,
                program.temporary_bytes,
                program.peak_bytes,
                float(total / count),
            )
        )
        programs.append(program)
        states.append(state)
    for row, ms in zip(rows, time_by_turns(programs, states, batch, options.rounds), strict=True):
        row.ms = ms
    return rows


def make_step(workload: Workload, variant: Variant) -> tuple[TrainState, steps.TrainStep]:
    """Returns the state of step 0 and the step, not compiled."""
    fields = load.computation(
        workload.model, workload.arguments, precision=variant.precision, remat=variant.remat
    )
    model = models.create(workload.model, num_classes=workload.num_classes, **fields)
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    image = jnp.zeros((1, *workload.image_shape))
    variables = jax.jit(lambda key: model.init(key, image, train=False))(jax.random.key(0))
    state = create_state(variables, optimizer, jax.random.key(1), precision=variant.precision)
    step = steps.make_step(
        model,
        optimizer,
        classification(10),
        schedule=optax.constant_schedule(LEARNING_RATE),
        accumulate=variant.accumulate,
    )
    return state, step


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a table; ratios are to the first."""
    first = rows[0]
    lines = [
        f"### {first.workload}, batch {first.batch_size}",
        "",
        f"| variant | ms per step | x {first.variant} | state and batch MB | temporaries MB "
        f"| peak MB | x {first.variant} | compiled in s |",
        "|---|" + "---:|" * 7,
    ]
    for row in rows:
        ms = statistics.median(row.ms)
        lines.append(
            f"| {row.variant} | {ms:,.1f} | {ms / statistics.median(first.ms):.2f} "
            f"| {row.argument_bytes / 1e6:,.1f} | {row.temporary_bytes / 1e6:,.1f} "
            f"| {row.peak_bytes / 1e6:,.1f} | {row.peak_bytes / first.peak_bytes:.2f} "
            f"| {row.compile_secs:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
