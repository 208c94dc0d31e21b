"""Times every family of cnnjax's networks against PyTorch: a row for each network and mode.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --networks mobilenet_v2 convnext_tiny --modes train --rounds 3
    python benchmarks/zoo.py --networks resnet50 --precision bf16
    python benchmarks/zoo.py --contenders cnnjax cnnjax-lax torch --json zoo.json
    python benchmarks/zoo.py --operations mobilenet_v2
    python benchmarks/zoo.py --smoke

Other work on the machine disturbs threads that wait for each other, by factors: measure on a quiet
one, or read the column of the fastest rounds.

cnnjax runs as its experiments do, PyTorch eagerly in the better of its two memory formats with all
cores, on networks of torchvision with as many parameters (see zoo_networks.py). The processes, the
steps and the ratios are those of peers.py; each mode has processes of its own, so that
memory and the time to the first step are of that mode alone. Where a contender tried several ways,
these two are taken from a fresh process that knows only the fastest.

Bounds are those of float32 in any precision. `--operations NETWORK` times each distinct layer of a
network alone instead, and sorts them by what is lost against PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import zoo_networks
import zoo_operations
from peer_processes import Worker, WorkerError, machine
from peer_report import TITLES, TORCH, Row
from workloads import CONTENDERS, MODES, Task, Workload, check_directories, check_numbers
from zoo_bounds import Machine, bound, measure_machine, step_cost
from zoo_report import LEGEND, OURS, Entry, conclusion, markdown

from cnnjax.errors import unknown_name
from cnnjax.paths import expand_flags
from cnnjax.run.exits import one_line_errors

CPU_PRECISIONS = ("float32", "bf16")
SMOKE = {"networks": ["lenet5"], "rounds": 1, "seconds": 0.05, "batch_size": 8}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    facts = machine("cpu")
    print(f"{facts['processor']}; {facts['system']}", flush=True)
    if options.operations:
        zoo_operations.report(options.operations, options, facts)
        return
    peaks = measure_machine()
    print(f"at most {peaks.gflops:.0f} GFLOP/s in products, {peaks.gbytes:.1f} GB/s in copies\n")
    record: dict[str, Any] = {
        "machine": facts | peaks._asdict(),
        "options": peers.printable(options),
        "entries": [],
        "rows": [],
    }
    entries: list[Entry] = []
    for name in options.networks:
        for mode in options.modes:
            entry = measure(name, mode, options, peaks)
            entries.append(entry)
            peers.note(f"{name}, {mode}: {entry.ratio:.3g} times as fast as PyTorch")
            record["entries"].append(entry.record())
            record["rows"] += [dataclasses.asdict(row) for row in entry.rows.values()]
            peers.save(record, options.json)
    for mode in options.modes:
        print(markdown(entries, mode))
    print(f"{LEGEND}\n\n{conclusion(entries, options.modes)}")
    print(f"No peer in PyTorch or torchvision: {', '.join(zoo_networks.without_peer())}.")
    versions = {
        name: version
        for entry in entries
        for row in entry.rows.values()
        for name, version in row.versions.items()
    }
    print(", ".join(f"{name} {version}" for name, version in sorted(versions.items())))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", help=f"default: {', '.join(zoo_networks.DEFAULT)}")
    add("--modes", nargs="+", default=list(MODES), help="train, infer or both (default)")
    add("--contenders", nargs="+", default=[OURS, TORCH], help=", ".join(CONTENDERS))
    add("--precision", default="float32", help="float32 (default) or bf16")
    add("--batch-size", type=int, help="default: 64 for images up to 64 pixels, else 8")
    add("--rounds", type=int, help="measurements of each (default 5; of an operation 3)")
    add("--seconds", type=float, help="length of a measurement (default 2; of an operation 0.1)")
    add("--patience", type=float, default=900.0, help="seconds that a process may take (900)")
    add("--json", type=Path, help="write all measurements here, after each network")
    add("--operations", metavar="NETWORK", help="time the layers of this network one by one")
    add("--smoke", action="store_true", help="a tiny network, to see that everything works")
    options = parser.parse_args(expand_flags(argv))
    with one_line_errors():
        check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Fills in defaults; raises UserError for names and numbers of no use."""
    if options.smoke:
        vars(options).update(SMOKE)
    if options.networks is None:
        options.networks = list(zoo_networks.DEFAULT)
    for name in [*options.networks, *filter(None, [options.operations])]:
        zoo_networks.workload(name)
    for kind, given, valid in (
        ("contender", options.contenders, CONTENDERS),
        ("mode", options.modes, MODES),
    ):
        for name in given:
            if name not in valid:
                raise unknown_name(kind, name, valid)
    if options.precision not in CPU_PRECISIONS:
        raise unknown_name("precision", options.precision, CPU_PRECISIONS)
    options.rounds = _default(options.rounds, 3 if options.operations else 5)
    options.seconds = _default(options.seconds, 0.1 if options.operations else 2.0)
    check_numbers(options)
    check_directories(options.json)


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def measure(name: str, mode: str, options: argparse.Namespace, peaks: Machine) -> Entry:
    """Measures one network in one mode with all contenders that have it."""
    workload = zoo_networks.workload(name)
    has_peer = zoo_networks.has_peer(name)
    contenders = [each for each in options.contenders if has_peer or each.startswith(OURS)]
    asked = argparse.Namespace(
        **vars(options) | {"contenders": contenders, "modes": [mode], "device": "cpu"}
    )
    rows = {row.contender: row for row in peers.compare(name, workload, options.precision, asked)}
    for contender, row in rows.items():
        if len(row.trials) > 1 and row.ms:
            peers.note(f"{name}, {TITLES[mode]}: {contender} alone, {row.variant}")
            rows[contender] = with_costs_alone(row, workload, options)
    batch_size = next(iter(rows.values())).batch_size if rows else 1
    cost = step_cost(workload, batch_size, mode)
    family = zoo_networks.family(name)
    load = os.getloadavg()[0]
    return Entry(
        name, family, mode, rows, bound(cost, peaks), has_peer, load, machine("cpu")["cores"]
    )


def with_costs_alone(row: Row, workload: Workload, options: argparse.Namespace) -> Row:
    """Returns the row with the memory and the first step of a process that runs one way only."""
    task = Task(workload, row.contender, row.precision, "cpu", row.batch_size)
    seconds = min(options.seconds, 0.1)
    with Worker(task, [row.mode], seconds, options.patience, row.variant) as worker:
        try:
            facts = worker.ready()["modes"][row.mode]
            answer = worker.measure(row.mode, seconds)
        except WorkerError:
            return row
    return dataclasses.replace(
        row,
        start_secs=facts["start_secs"],
        first_secs=facts["first_secs"],
        compile_secs=facts["compile_secs"],
        peak_mib=answer["peak_mib"],
    )


if __name__ == "__main__":
    main()
