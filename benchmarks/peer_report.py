"""The rows of `peers.py`, as a Markdown table and as a figure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TORCH, FLAX = "torch", "flax-loop"
TITLES = {"train": "training step", "infer": "inference"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender in one mode; a measurement per round, in milliseconds per step.

    Attributes:
      variant: the contender's fastest way, which was measured; `trials` holds the seconds per step
        that each way took when it was chosen, or why it failed.
      start_secs: from the start of the process until the network and its data are there.
      first_secs: preparation, compilation and the first step after that.
      compile_secs: of these, tracing, lowering and compiling.
      peak_mib: the largest memory that the process has held so far, on the host.
      trouble: why there are no measurements.
    """

    workload: str
    mode: str
    precision: str
    batch_size: int
    contender: str
    num_parameters: int = 0
    variant: str = ""
    start_secs: float = 0.0
    first_secs: float = 0.0
    compile_secs: float = 0.0
    peak_mib: float = 0.0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    trials: dict[str, float | str] = dataclasses.field(default_factory=dict)
    ms: list[float] = dataclasses.field(default_factory=list)
    cpu_ms: list[float] = dataclasses.field(default_factory=list)
    trouble: str = ""

    def with_facts(self, facts: dict[str, Any], mode: str) -> Row:
        """Returns the row with what its worker said when it was ready."""
        return dataclasses.replace(
            self,
            num_parameters=facts["num_parameters"],
            versions=facts["versions"],
            **facts["modes"][mode],
        )

    def with_measurement(self, answer: dict[str, Any]) -> Row:
        """Returns the row with one measurement more."""
        return dataclasses.replace(
            self,
            ms=[*self.ms, 1e3 * answer["wall_secs"]],
            cpu_ms=[*self.cpu_ms, 1e3 * answer["cpu_secs"]],
            peak_mib=answer["peak_mib"],
        )


def speed_ratio(row: Row, reference: Row | None) -> float:
    """How many times as fast as the reference: the median of the rounds' ratios; nan without."""
    if reference is None or not row.ms or not reference.ms:
        return math.nan
    return statistics.median(
        there / here for here, there in zip(row.ms, reference.ms, strict=False)
    )


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def markdown(rows: Sequence[Row]) -> str:
    """Returns the table of one workload in one mode and precision, with a heading."""
    first = rows[0]
    references = {row.contender: row for row in rows}
    counts = sorted({row.num_parameters for row in rows if row.num_parameters})
    parameters = f", {counts[0]:,} parameters in each" if counts else ""
    lines = [
        f"### {first.workload}: {TITLES[first.mode]}, batch {first.batch_size}, "
        f"{first.precision}{parameters}",
        "",
        "| contender | ms | min | spread | CPU ms | images/s | x PyTorch eager | x plain Flax "
        "| first step, s | peak MiB | way |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.trouble:
            lines.append(f"| {row.contender} |" + " - |" * 9 + f" {row.trouble} |")
            continue
        median = statistics.median(row.ms)
        cells = [
            row.contender,
            figure(median),
            figure(min(row.ms)),
            figure(spread(row.ms)),
            figure(statistics.median(row.cpu_ms)),
            f"{row.batch_size / median * 1e3:,.0f}",
            figure(speed_ratio(row, references.get(TORCH))),
            figure(speed_ratio(row, references.get(FLAX))),
            figure(row.first_secs),
            f"{row.peak_mib:,.0f}",
            row.variant,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def figure(value: float) -> str:
    """Writes a number with three significant digits, without an exponent; nan as a dash."""
    if math.isnan(value):
        return "-"
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws speed relative to PyTorch eager (without it, to plain Flax): one panel a table."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.workload, row.mode, row.precision), []).append(row)
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    tallest = max(map(len, panels.values()))
    canvas = Figure(figsize=(6.5 * columns, (0.32 * tallest + 1.0) * lines), layout="constrained")
    axes = canvas.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_visible(False)
    for axis, ((workload, mode, precision), group) in zip(axes, panels.items(), strict=False):
        axis.set_visible(True)
        by_name = {row.contender: row for row in group}
        measured = [name for name in (TORCH, FLAX) if name in by_name and by_name[name].ms]
        reference = by_name[measured[0]] if measured else None
        ratios = [speed_ratio(row, reference) for row in group]
        names = [row.contender + (" (not run)" if row.trouble else "") for row in group]
        colors = ["C0" if row.contender.startswith("cnnjax") else "0.65" for row in group]
        heights = [0.0 if math.isnan(ratio) else ratio for ratio in ratios]
        bars = axis.barh(names, heights, color=colors)
        axis.bar_label(bars, [figure(ratio) for ratio in ratios], padding=3, fontsize=8)
        axis.axvline(1.0, color="0.3", linewidth=0.8)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        batch = group[0].batch_size
        axis.set_title(f"{workload}, batch {batch}: {TITLES[mode]}, {precision}", fontsize=9)
        base = reference.contender if reference else "nothing measured"
        axis.set_xlabel(f"times as fast as {base} (longer is faster)", fontsize=8)
    canvas.suptitle(title, fontsize=9)
    canvas.savefig(path, dpi=150)
