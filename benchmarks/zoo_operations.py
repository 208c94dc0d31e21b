"""`zoo.py --operations`: where a network loses time against PyTorch, layer by layer."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import peers
import zoo_networks
from operations import Operation, mode_of
from peer_processes import Worker, WorkerError
from peer_report import TITLES, figure
from workloads import OPERATION_CONTENDERS, Task, Workload

OURS, TORCH = OPERATION_CONTENDERS
HEADINGS = {"train": "forward and backward", "infer": "forward"}
LEGEND = """\
ms: one call of the layer alone, with its gradients in training, the fastest of many; lost: calls
times (ours minus PyTorch's). Within a network the compiler fuses what is apart here, so the sums
are no time of a step; sums by kind leave out what one side could not run."""


class Measured(NamedTuple):
    """An operation in one mode: how often it is called, and milliseconds per call and round."""

    operation: Operation
    mode: str
    calls: int
    ours: Sequence[float]
    theirs: Sequence[float]
    trouble: str = ""

    @property
    def ms(self) -> tuple[float, float]:
        """The least milliseconds per call: ours and PyTorch's; nan where there are none."""
        return min(self.ours, default=math.nan), min(self.theirs, default=math.nan)

    @property
    def lost_ms(self) -> float:
        """Milliseconds lost in all calls; nan where one side has none."""
        ours, theirs = self.ms
        return self.calls * (ours - theirs)

    def record(self) -> dict[str, Any]:
        """Returns all of it, for JSON."""
        return self.operation._asdict() | {
            "label": self.operation.label,
            "mode": self.mode,
            "calls": self.calls,
            "ours_ms": list(self.ours),
            "torch_ms": list(self.theirs),
            "trouble": self.trouble,
        }


def report(name: str, options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Times the operations of a network and prints a table for each mode."""
    from operations_jax import collect

    workload = zoo_networks.workload(name)
    batch_size = options.batch_size or workload.cpu_batch_size
    found, _ = collect(workload, batch_size, "train")
    record: dict[str, Any] = {
        "machine": facts,
        "options": peers.printable(options),
        "operations": [],
    }
    measured: list[Measured] = []
    with contextlib.ExitStack() as stack:
        pair = {
            side: stack.enter_context(Side(side, workload, batch_size, options))
            for side in (OURS, TORCH)
        }
        for number, (operation, count) in enumerate(found.values(), 1):
            peers.note(f"{name}: {number} of {len(found)}, {operation.label}")
            for mode in options.modes:
                measured.append(measure(operation, mode, count, pair, options))
                record["operations"].append(measured[-1].record())
            peers.save(record, options.json)
    for mode in options.modes:
        chosen = [each for each in measured if each.mode == mode]
        print(f"\n### {name}: {TITLES[mode]}, batch {batch_size}, {HEADINGS[mode]}\n")
        print(operations_table(chosen))
        print(kinds_table(chosen), flush=True)
    print(LEGEND)


class Side:
    """One framework's worker, started again after an operation that ended it."""

    def __init__(
        self, contender: str, workload: Workload, batch_size: int, options: argparse.Namespace
    ):
        self._task = Task(workload, contender, "float32", "cpu", batch_size)
        self._options = options
        self._worker: Worker | None = None
        self._gone = ""

    def measure(self, mode: str, *, last: bool) -> float:
        """Returns milliseconds per call; raises WorkerError."""
        if self._gone:
            raise WorkerError(self._gone)
        if self._worker is None:
            self._worker = self._start()
        try:
            answer = self._worker.measure(mode, self._options.seconds, last=last)
        except WorkerError:
            self._worker.close()
            self._worker = None
            raise
        return 1e3 * answer["wall_secs"]

    def _start(self) -> Worker:
        worker = Worker(self._task, [], self._options.seconds, self._options.patience, least=True)
        try:
            worker.ready()
        except WorkerError as error:
            worker.close()
            self._gone = str(error)
            raise
        return worker

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._worker is not None:
            self._worker.close()


def measure(
    operation: Operation, mode: str, count: int, pair: dict[str, Side], options: argparse.Namespace
) -> Measured:
    """Times an operation on both sides by turns."""
    ms: dict[str, list[float]] = {side: [] for side in pair}
    trouble: dict[str, str] = {}
    for number in range(options.rounds):
        for side in pair if number % 2 == 0 else reversed(pair):
            if side in trouble:
                continue
            try:
                key = mode_of(operation, mode)
                last = number == options.rounds - 1
                ms[side].append(pair[side].measure(key, last=last))
            except WorkerError as error:
                trouble[side], ms[side] = str(error), []
    text = "; ".join(f"{side}: {words}" for side, words in trouble.items())
    return Measured(operation, mode, count, ms[OURS], ms[TORCH], text)


def operations_table(measured: Sequence[Measured]) -> str:
    """Returns the operations of one mode, what loses most first."""
    lines = [
        "| kind | input | details | calls | ms | PyTorch, ms | x PyTorch | lost, ms | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = [each for each in measured if not math.isnan(each.lost_ms)]
    unknown = [each for each in measured if math.isnan(each.lost_ms)]
    for each in [*sorted(known, key=lambda each: -each.lost_ms), *unknown]:
        ours, theirs = each.ms
        shapes = " + ".join("x".join(map(str, shape)) for shape in each.operation.shapes)
        cells = [
            each.operation.label,
            shapes,
            each.operation.details,
            str(each.calls),
            figure(ours),
            figure(theirs),
            figure(theirs / ours),
            signed(each.lost_ms),
            each.trouble,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def kinds_table(measured: Sequence[Measured]) -> str:
    """Returns the sums by kind of one mode, what loses most first, and their sum."""
    lines = [
        "| kind | calls | ms | PyTorch, ms | x PyTorch | lost, ms |",
        "|---|---|---|---|---|---|",
    ]
    for kind, calls, ours, theirs in sums_by_kind(measured):
        cells = [kind, str(calls), figure(ours), figure(theirs)]
        cells += [figure(theirs / ours) if ours else "-", signed(ours - theirs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def sums_by_kind(measured: Sequence[Measured]) -> Iterator[tuple[str, int, float, float]]:
    """Yields (kind, calls, ms, PyTorch's ms), what loses most first, then all kinds together."""
    sums: dict[str, tuple[int, float, float]] = {}
    for each in measured:
        if math.isnan(each.lost_ms):
            continue
        ours, theirs = (each.calls * ms for ms in each.ms)
        for label in (each.operation.label, "all"):
            calls, our_sum, their_sum = sums.get(label, (0, 0.0, 0.0))
            sums[label] = calls + each.calls, our_sum + ours, their_sum + theirs
    total = sums.pop("all", None)
    for kind, (calls, ours, theirs) in sorted(
        sums.items(), key=lambda item: item[1][2] - item[1][1]
    ):
        yield kind, calls, ours, theirs
    if total is not None:
        yield "all", *total


def signed(value: float) -> str:
    """Writes a number that may be negative with three significant digits; nan as a dash."""
    return f"-{figure(-value)}" if value < 0 else figure(value)
