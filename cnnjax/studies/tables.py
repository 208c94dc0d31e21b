"""Methods of fine-tuning side by side: means and intervals of many small runs, as tables.

A trial is a dict: `method`, `labels` (a class), `seed`, `learning_rate`, `accuracy` on the new
task, `source_accuracy` on the old one afterwards (None from scratch), `trained_parameters`,
`checkpoint_bytes`, `step_secs` and `peak_bytes`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Trial = Mapping[str, Any]
COST_TITLES = (
    "method",
    "learning rate",
    "trained",
    "of all",
    "checkpoint kB",
    "ms per step",
    "peak MB",
)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns the mean and the half width of its confidence interval, by Student's t.

    The values count as independent draws of one normal distribution. One value alone has no
    interval: NaN.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_text(first: Sequence[float], second: Sequence[float], what: str, name: str) -> str:
    """Says whether two settings differ over the same seeds, in a sentence.

    Args:
      first, second: a score for each seed.
      what: the difference, such as "Found minus default".
      name: of the score; accuracies are told in percent.
    """
    from cnnjax.evaluation import comparison

    scale, digits = (100, 3) if name == "accuracy" else (1, 4)
    result = comparison.paired(first, second)
    needed = (
        ""
        if result.seeds_needed is None
        else f"; {result.seeds_needed} seeds find a difference as large as this in 4 of 5 cases"
    )
    median = statistics.median(b - a for a, b in zip(first, second, strict=True))
    return (
        f"{what}, paired over {len(first)} seeds: {scale * result.difference:+.{digits}f} "
        f"± {scale * result.half_interval:.{digits}f} (median {scale * median:+.{digits}f}), "
        f"p = {result.p_value:.3g}{needed}."
    )


def summarize(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Returns one row for each method and number of labels, in the order in which they come.

    Accuracies are means with the half widths of their intervals, the time of a step is the median
    over the seeds, and the rest is the same for all seeds.
    """
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial["method"], trial["labels"]), []).append(trial)
    rows = []
    for (method, labels), found in groups.items():
        accuracy, interval = mean_interval([trial["accuracy"] for trial in found])
        row = {
            "method": method,
            "labels": labels,
            "seeds": len(found),
            "learning_rate": found[0]["learning_rate"],
            "accuracy": accuracy,
            "accuracy_interval": interval if math.isfinite(interval) else None,
            "source_accuracy": None,
            "step_secs": statistics.median(trial["step_secs"] for trial in found),
        }
        if found[0]["source_accuracy"] is not None:
            row["source_accuracy"] = statistics.fmean(t["source_accuracy"] for t in found)
        for name in ("trained_parameters", "checkpoint_bytes", "peak_bytes"):
            row[name] = found[0][name]
        rows.append(row)
    return rows


def markdown(
    rows: Sequence[Mapping[str, Any]], *, source_accuracy: float | None, all_parameters: int
) -> str:
    """Sets the rows of `summarize` as three tables: accuracy, forgetting, cost.

    Args:
      rows: the rows.
      source_accuracy: of the base on its own task, before; None leaves out forgetting.
      all_parameters: of the whole network.
    """
    labels = sorted({row["labels"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_place = {(row["method"], row["labels"]): row for row in rows}

    def cells(method: str, cell: Any) -> list[str]:
        found = [by_place.get((method, number)) for number in labels]
        return [cell(row) if row else "" for row in found]

    counts = [f"{number} {'label' if number == 1 else 'labels'}" for number in labels]
    seeds = max(row["seeds"] for row in rows)
    accuracy = [
        [f"`{method}`", *cells(method, lambda row: _accuracy(row, seeds))] for method in methods
    ]
    forgetting = ""
    if source_accuracy is not None:
        source = [[f"`{method}`", *cells(method, _source_accuracy)] for method in methods]
        forgetting = (
            "\nAccuracy on the old task afterwards in %, with the old head (before: "
            f"{100 * source_accuracy:.2f}):\n\n" + table(["method", *counts], source)
        )
    costs = [_costs(by_place, method, labels, all_parameters) for method in methods]
    return (
        "Test accuracy in % (mean ± half of the 95% interval over "
        f"{seeds} seeds), by labels per class:\n\n"
        + table(["method", *counts], accuracy)
        + forgetting
        + f"\nCosts, with {labels[-1]} labels per class:\n\n"
        + table(
            COST_TITLES,
            costs,
        )
    )


def sweep_markdown(trials: Sequence[Trial], labels: int) -> str:
    """Sets the validation accuracies of a sweep as a table: a method a row, a rate a column."""
    rates = sorted({trial["learning_rate"] for trial in trials})
    means = sweep_means(trials)
    rows = []
    for method, found in means.items():
        best = max(found, key=lambda rate: found[rate])
        texts = [f"{100 * found[rate]:.2f}" if rate in found else "" for rate in rates]
        marked = [
            f"**{text}**" if rate == best else text for rate, text in zip(rates, texts, strict=True)
        ]
        rows.append([f"`{method}`", *marked])
    seeds = len({trial["seed"] for trial in trials})
    return (
        f"Validation accuracy in % by learning rate, {labels} labels per class, mean over {seeds} "
        "seeds; the best in bold:\n\n" + table(["method", *map("{:g}".format, rates)], rows)
    )


def sweep_means(trials: Iterable[Trial]) -> dict[str, dict[float, float]]:
    """Returns method -> learning rate -> mean accuracy."""
    found: dict[str, dict[float, list[float]]] = {}
    for trial in trials:
        by_rate = found.setdefault(trial["method"], {})
        by_rate.setdefault(trial["learning_rate"], []).append(trial["accuracy"])
    return {
        method: {rate: statistics.fmean(values) for rate, values in by_rate.items()}
        for method, by_rate in found.items()
    }


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Sets a Markdown table; all columns but the first are to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _accuracy(row: Mapping[str, Any], seeds: int) -> str:
    interval = row["accuracy_interval"]
    half = "" if interval is None else f" ± {100 * interval:.2f}"
    fewer = "" if row["seeds"] == seeds else f" (seeds: {row['seeds']})"
    return f"{100 * row['accuracy']:.2f}{half}{fewer}"


def _source_accuracy(row: Mapping[str, Any]) -> str:
    return "" if row["source_accuracy"] is None else f"{100 * row['source_accuracy']:.2f}"


def _costs(by_place: Mapping, method: str, labels: Sequence[int], all_parameters: int) -> list[str]:
    row = next(by_place[method, n] for n in reversed(labels) if (method, n) in by_place)
    return [
        f"`{method}`",
        f"{row['learning_rate']:g}",
        f"{row['trained_parameters']:,}",
        f"{row['trained_parameters'] / all_parameters:.1%}",
        f"{row['checkpoint_bytes'] / 1e3:,.0f}",
        f"{1e3 * row['step_secs']:.2f}",
        f"{row['peak_bytes'] / 1e6:.1f}",
    ]
