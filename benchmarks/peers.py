"""Times training step and inference of cnnjax against plain Flax, PyTorch and Keras.

    python benchmarks/peers.py
    python benchmarks/peers.py --workloads lenet5 --contenders cnnjax torch --rounds 9
    python benchmarks/peers.py --json bench.json --figure bench.png

Every contender runs in a process of its own, with the same network (numbers of parameters are
compared), batch, optimizer (SGD with momentum) and data, the inputs in memory. The processes stay
alive and take turns; those that wait are stopped, so that no idle thread disturbs. A round asks
each for as many steps as fit into --seconds; ratios are medians of the rounds' own ratios, so that
a slow minute hits all alike. The first step, with compilation, is reported apart; compilation
caches are off. Where a framework has several ways (memory formats, thread counts, fit or
train_on_batch), the fastest is measured, and named in the table.

The peers are optional: `pip install -e '.[bench]'`. One that is missing is reported as missing.
On a GPU the same command compares float32, TF32 and bfloat16, and adds the time to 99% on MNIST.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer_processes import Worker, WorkerError, gpu_name, machine, seconds_to_mnist
from peer_report import Row, draw, markdown
from workloads import (
    CONTENDERS,
    MODES,
    PRECISIONS,
    WORKLOADS,
    Task,
    Workload,
    check_directories,
    check_numbers,
)

from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import expand_flags
from cnnjax.run.exits import one_line_errors

MNIST_ACCURACY = 0.99


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    facts = machine(options.device)
    print(f"{facts['processor']}; {facts['system']}\n", flush=True)
    for name in options.contenders:
        print(f"- {name}: {CONTENDERS[name].meaning}")
    print(
        "\nms: elapsed a step, the median of the rounds; spread: between the quartiles; CPU ms: of "
        "all threads;\nx: times as fast; first step: preparing, compiling and the first step; way: "
        "the one measured.\n",
        flush=True,
    )
    rows: list[Row] = []
    record: dict[str, Any] = {"machine": facts, "options": printable(options), "rows": []}
    for name in options.workloads:
        for precision in options.precisions:
            new = compare(name, WORKLOADS[name], precision, options)
            rows += new
            for mode in options.modes:
                table = [row for row in new if row.mode == mode]
                if table:
                    print(markdown(table), flush=True)
            record["rows"] = [dataclasses.asdict(row) for row in rows]
            save(record, options.json)
    if options.mnist:
        record["mnist"] = report_mnist(options.device)
        save(record, options.json)
    versions = {name: version for row in rows for name, version in row.versions.items()}
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    if options.figure:
        draw(rows, options.figure, facts["processor"])
        print(f"figure: {options.figure}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workloads", nargs="+", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    add("--contenders", nargs="+", default=list(CONTENDERS), help=", ".join(CONTENDERS))
    add("--modes", nargs="+", default=list(MODES), help="train, infer or both (default)")
    add("--precisions", nargs="+", help="float32 (default on a CPU), tf32, bf16; on a GPU all")
    add("--batch-size", type=int, help="instead of each workload's own")
    add("--rounds", type=int, default=7, help="measurements of each contender (default 7)")
    add("--seconds", type=float, default=2.0, help="length of a measurement (default 2)")
    add("--patience", type=float, default=900.0, help="seconds that a process may take (900)")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto", help="default: GPU if any")
    add("--mnist", action=argparse.BooleanOptionalAction, help="time to 99%% on MNIST (GPU: yes)")
    add("--json", type=Path, help="write all measurements here, after each workload")
    add("--figure", type=Path, help="write a bar chart of speeds relative to PyTorch eager here")
    options = parser.parse_args(expand_flags(argv))
    with one_line_errors():
        check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Resolves what depends on the device; raises UserError for names and numbers of no use."""
    if options.device == "auto":
        options.device = "cpu" if gpu_name() is None else "gpu"
    elif options.device == "gpu" and gpu_name() is None:
        raise UserError("--device gpu: nvidia-smi shows no GPU; use --device cpu")
    if options.mnist is None:
        options.mnist = options.device == "gpu"
    if options.precisions is None:
        options.precisions = list(PRECISIONS) if options.device == "gpu" else ["float32"]
    for kind, given, valid in (
        ("workload", options.workloads, WORKLOADS),
        ("contender", options.contenders, CONTENDERS),
        ("mode", options.modes, MODES),
        ("precision", options.precisions, PRECISIONS),
    ):
        for name in given:
            if name not in valid:
                raise unknown_name(kind, name, valid)
    if "tf32" in options.precisions and options.device == "cpu":
        raise UserError("precision tf32 exists on a GPU only: use float32 or bf16")
    check_numbers(options)
    check_directories(options.json, options.figure)


def compare(
    name: str, workload: Workload, precision: str, options: argparse.Namespace
) -> list[Row]:
    """Measures one workload with all contenders: one row for each and each mode."""
    default = workload.cpu_batch_size if options.device == "cpu" else workload.gpu_batch_size
    batch_size = options.batch_size or default
    rows = {
        (contender, mode): Row(name, mode, precision, batch_size, contender)
        for contender in options.contenders
        for mode in modes_of(contender, options)
    }
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def drop(contender: str, error: WorkerError) -> None:
            workers.pop(contender).close()
            for mode in modes_of(contender, options):
                row = rows[contender, mode]
                rows[contender, mode] = dataclasses.replace(
                    row, trouble=str(error), ms=[], cpu_ms=[]
                )

        for contender in options.contenders:
            if not modes_of(contender, options):
                continue
            note(f"{name}, {precision}: preparing {contender}")
            task = Task(workload, contender, precision, options.device, batch_size)
            workers[contender] = stack.enter_context(
                Worker(task, modes_of(contender, options), options.seconds, options.patience)
            )
            try:
                facts = workers[contender].ready()
                check_comparable(facts, options.device, [rows[key] for key in rows])
            except WorkerError as error:
                drop(contender, error)
                continue
            for mode in modes_of(contender, options):
                rows[contender, mode] = rows[contender, mode].with_facts(facts, mode)
        for number in range(options.rounds):
            for mode in options.modes:
                note(f"{name}, {precision}: round {number + 1} of {options.rounds}, {mode}")
                # Forth and back, so that none always follows the same neighbor.
                for contender in list(workers) if number % 2 == 0 else list(workers)[::-1]:
                    if (contender, mode) not in rows:
                        continue
                    try:
                        answer = workers[contender].measure(mode, options.seconds)
                    except WorkerError as error:
                        drop(contender, error)
                        continue
                    rows[contender, mode] = rows[contender, mode].with_measurement(answer)
    return list(rows.values())


def modes_of(contender: str, options: argparse.Namespace) -> list[str]:
    """The modes asked for in which the contender differs from every other."""
    return [mode for mode in options.modes if mode in CONTENDERS[contender].modes]


def check_comparable(facts: dict[str, Any], device: str, rows: Sequence[Row]) -> None:
    """Raises WorkerError for a contender on another device or with another network."""
    if facts["platform"] != device:
        raise WorkerError(f"runs on the {facts['platform']}: its build for a {device} is missing")
    counts = {row.num_parameters for row in rows if row.num_parameters}
    if counts and facts["num_parameters"] not in counts:
        raise WorkerError(
            f"has {facts['num_parameters']:,} parameters, the others {counts.pop():,}: "
            "not the same network"
        )


def report_mnist(device: str) -> dict[str, Any]:
    """Prints how long the LeNet experiment takes, from the command to 99% on validation images.

    Twice: with an empty compilation cache, and with the one that the first run has filled.
    """
    record = {}
    with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "warm"):
            note(f"mnist, {start}: python -m experiments.mnist_lenet")
            seconds, epochs, accuracy = seconds_to_mnist(MNIST_ACCURACY, device, Path(cache))
            record[start] = {"seconds": seconds, "epochs": epochs, "accuracy": accuracy}
            print(
                f"MNIST, {start} compilation cache: `python -m experiments.mnist_lenet` "
                + (
                    f"never reached {MNIST_ACCURACY:.0%} on validation images, but {accuracy:.2%}"
                    if seconds is None
                    else f"reached {accuracy:.2%} on validation images {seconds:.1f} s after it "
                    f"was started, with epoch {epochs}"
                ),
                flush=True,
            )
    print()
    return record


def printable(options: argparse.Namespace) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
    }


def save(record: dict[str, Any], path: Path | None) -> None:
    """Writes the record so that a run broken off leaves a whole file."""
    if path is None:
        return
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(scratch, path)


def note(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
