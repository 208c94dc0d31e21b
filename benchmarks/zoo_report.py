"""The rows of `zoo.py`: a network in a mode, ours beside PyTorch's, as Markdown and as numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peer_report import TITLES, TORCH, Row, figure, speed_ratio
from zoo_bounds import Bound

OURS, LAX = "cnnjax", "cnnjax-lax"
COLUMNS = (
    "network",
    "batch",
    "ms",
    "PyTorch, ms",
    "x PyTorch",
    "x, least",
    "x lax",
    "compile, s",
    "first step, s",
    "PyTorch's",
    "peak MiB",
    "PyTorch's",
    "FLOP bound, ms",
    "byte bound, ms",
    "x bound",
    "note",
)
LEGEND = """\
ms: a step, the median of the rounds; x: times as fast (above 1: cnnjax is faster), the median of
the rounds' ratios; x, least: the ratio of the fastest rounds, which other work on the machine
disturbs less; load: processes that wanted a core, ours among them, where more than there are;
compile: tracing, lowering and compiling the step, without caches; first step: from the start of the
process to the end of its first step; peak: of the process's memory with its data; bounds: the least
time by operations of products and by bytes moved (see zoo_bounds.py); x bound: ms by the larger
bound."""


class Entry(NamedTuple):
    """One network in one mode: its contenders' rows, by name, and what bounds its step."""

    network: str
    family: str
    mode: str
    rows: Mapping[str, Row]
    bound: Bound
    has_peer: bool
    load: float = 0.0
    cores: int = 1

    @property
    def ratio(self) -> float:
        """How many times as fast as PyTorch; nan where one of the two is missing."""
        ours = self.rows.get(OURS)
        return math.nan if ours is None else speed_ratio(ours, self.rows.get(TORCH))

    @property
    def least_ratio(self) -> float:
        """The same of each one's fastest round."""
        ours, theirs = (self.rows.get(name) for name in (OURS, TORCH))
        if ours is None or theirs is None or not ours.ms or not theirs.ms:
            return math.nan
        return min(theirs.ms) / min(ours.ms)

    def record(self) -> dict[str, Any]:
        """Returns what the table shows beyond the rows, for JSON."""
        return {
            "network": self.network,
            "family": self.family,
            "mode": self.mode,
            "ratio": None if math.isnan(self.ratio) else self.ratio,
            "least_ratio": None if math.isnan(self.least_ratio) else self.least_ratio,
            "load": self.load,
            "flop_bound_ms": self.bound.flop_ms,
            "byte_bound_ms": self.bound.byte_ms,
        }


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the geometric mean of positive numbers; nan of none."""
    logarithms = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan


def family_ratios(entries: Sequence[Entry], mode: str, *, least: bool = False) -> dict[str, float]:
    """Returns the geometric mean of the members' ratios of each family that was measured."""
    members: dict[str, list[float]] = {}
    for entry in entries:
        if entry.mode == mode and not math.isnan(entry.ratio):
            ratio = entry.least_ratio if least else entry.ratio
            members.setdefault(entry.family, []).append(ratio)
    return {family: geometric_mean(ratios) for family, ratios in members.items()}


def markdown(entries: Sequence[Entry], mode: str) -> str:
    """Returns the table of one mode, with a heading."""
    lines = [
        f"### {TITLES[mode]}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(f"| {' | '.join(cells(entry))} |" for entry in entries if entry.mode == mode),
        "",
    ]
    return "\n".join(lines)


def cells(entry: Entry) -> list[str]:
    """Returns the cells of one row of the table."""
    ours, torch = entry.rows.get(OURS), entry.rows.get(TORCH)
    mine = _median(ours)
    notes = [f"bound by {entry.bound.name}"]
    if entry.load > entry.cores + 0.5:
        notes.append(f"load {entry.load:.1f}")
    if not entry.has_peer:
        notes.append("no peer")
    notes += [f"{name}: {row.trouble}" for name, row in entry.rows.items() if row.trouble]
    if torch is not None and torch.variant:
        notes.append(f"PyTorch {torch.variant}")
    return [
        entry.network,
        str(next(iter(entry.rows.values())).batch_size),
        figure(mine),
        figure(_median(torch)),
        figure(entry.ratio),
        figure(entry.least_ratio),
        figure(math.nan if ours is None else speed_ratio(ours, entry.rows.get(LAX))),
        figure(_of(ours, "compile_secs")),
        figure(_first_step(ours)),
        figure(_first_step(torch)),
        figure(_of(ours, "peak_mib")),
        figure(_of(torch, "peak_mib")),
        figure(entry.bound.flop_ms),
        figure(entry.bound.byte_ms),
        figure(mine / entry.bound.ms),
        "; ".join(notes),
    ]


def conclusion(entries: Sequence[Entry], modes: Sequence[str]) -> str:
    """Returns a line for each mode: the mean over families, and the slowest of them."""
    lines = []
    for mode in modes:
        ratios = family_ratios(entries, mode)
        if not ratios:
            lines.append(f"{TITLES[mode]}: no network was measured beside PyTorch.")
            continue
        worst = min(ratios, key=ratios.__getitem__)
        least = geometric_mean(family_ratios(entries, mode, least=True).values())
        lines.append(
            f"{TITLES[mode]}: {figure(geometric_mean(ratios.values()))} times as fast as PyTorch, "
            f"the geometric mean of {len(ratios)} famil{'y' if len(ratios) == 1 else 'ies'}; "
            f"the worst is {worst}, {figure(ratios[worst])}. "
            f"By the fastest rounds: {figure(least)}."
        )
    return "\n".join(lines)


def _median(row: Row | None) -> float:
    return statistics.median(row.ms) if row is not None and row.ms else math.nan


def _of(row: Row | None, field: str) -> float:
    return getattr(row, field) if row is not None and row.ms else math.nan


def _first_step(row: Row | None) -> float:
    return _of(row, "start_secs") + _of(row, "first_secs")
