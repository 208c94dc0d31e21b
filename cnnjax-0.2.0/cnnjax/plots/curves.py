"""Learning curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.plots.canvas import BLUE, GRAY, GREEN, RED, new_figure, plain, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the axis of a score below its lowest value.
LEAST_ROOM = 0.002


def learning_curves(
    records: Sequence[Mapping[str, Any]],
    path: Path | str,
    *,
    steps_per_epoch: int | None = None,
    score: str = "accuracy",
) -> Path:
    """Draws loss, score and learning rate of a run, training and validation.

    The loss axis is logarithmic where all losses are positive. The axis of a score in [0, 1] leaves
    out what is far below the lowest validation and the median training score, so that a network
    that is nearly perfect is not a line at the top; the best validation score is marked.

    Args:
      records: what `cnnjax.run.logs.read_metrics` returns: dicts with `step`, `kind` (`train`,
        `validation` or `test`) and any of `loss`, `learning_rate` and the score.
      path: where the PNG goes.
      steps_per_epoch: turns steps into epochs; without it the axis counts steps, unless every
        record has an `epoch`.

      score: the metric drawn besides the loss; the accuracy where that is the loss itself.

    Raises:
      UserError: there are no records.
    """
    score = "accuracy" if score == "loss" else score
    if not records:
        raise UserError("there are no metrics to draw: the run has recorded nothing yet.")
    figure = new_figure(12.0, 3.8)
    loss_axes, score_axes, rate_axes = figure.subplots(1, 3)
    position, unit = _time_axis(records, steps_per_epoch)
    for axes, name in ((loss_axes, "loss"), (score_axes, score)):
        for kind, color in (("train", BLUE), ("validation", RED)):
            _curve(axes, *_series(records, kind, name, position), label=kind, color=color)
        test_positions, test_values = _series(records, "test", name, position)
        if test_values.size:
            label = f"test {test_values[-1]:{'.2%' if name == 'accuracy' else '.4g'}}"
            axes.plot(test_positions, test_values, "*", color="black", markersize=9, label=label)
    rate_positions, rates = _series(records, "train", "learning_rate", position)
    rate_axes.plot(rate_positions, rates, color=GREEN)
    _finish_loss(loss_axes)
    _finish_score(score_axes, records, position, score)
    rate_axes.set_title("learning rate")
    if np.isfinite(rates).any():
        rate_axes.set_ylim(0.0, 1.05 * np.nanmax(rates) or None)
    rate_axes.ticklabel_format(axis="y", scilimits=(-3, 3), useMathText=True)
    for axes in (loss_axes, score_axes, rate_axes):
        axes.set_xlabel(unit)
        tidy(axes)
    return save(figure, path)


def interval_chart(
    names: Sequence[str],
    means: Sequence[float],
    half_widths: Sequence[float],
    label: str,
    path: Path | str,
) -> Path:
    """Draws a mean with its interval for each name, the first on top; the first is the yardstick.

    Args:
      names: what was compared.
      means: one per name.
      half_widths: half the width of each interval; NaN for a mean without one.
      label: of the axis.
      path: where the PNG goes.
    """
    figure = new_figure(6.4, 0.6 + 0.34 * len(names))
    axes = figure.add_subplot()
    positions = np.arange(len(names))
    axes.errorbar(means, positions, xerr=np.nan_to_num(half_widths), fmt="o", color=BLUE, capsize=4)
    axes.axvline(means[0], color=GRAY, linestyle=":", linewidth=1)
    axes.set_yticks(positions, [plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    tidy(axes)
    return save(figure, path)


def _time_axis(
    records: Sequence[Mapping[str, Any]], steps_per_epoch: int | None
) -> tuple[Any, str]:
    """Returns the function from a record to its place on the axis, and the axis's unit."""
    if steps_per_epoch is not None:
        return (lambda record: record["step"] / steps_per_epoch), "epoch"
    if all("epoch" in record for record in records):
        return (lambda record: record["epoch"]), "epoch"
    return (lambda record: record["step"]), "step"


def _series(
    records: Sequence[Mapping[str, Any]], kind: str, name: str, position: Any
) -> tuple[np.ndarray, np.ndarray]:
    found = [record for record in records if record["kind"] == kind and name in record]
    positions = np.array([position(record) for record in found], np.float64)
    return positions, np.array([record[name] for record in found], np.float64)


def _curve(
    axes: Axes, positions: np.ndarray, values: np.ndarray, *, label: str, color: str
) -> None:
    """Draws a curve; one of many points pale, with its running mean over it."""
    if not values.size:
        return
    window = len(values) // 50
    marker = "o" if len(values) <= 30 else None
    if window < 2:
        axes.plot(positions, values, color=color, label=label, marker=marker, markersize=3.5)
        return
    axes.plot(positions, values, color=color, alpha=0.25, linewidth=0.8)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(positions[window - 1 :], smooth, color=color, label=f"{label} (mean of {window})")


def _finish_loss(axes: Axes) -> None:
    values = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines] or [np.zeros(1)])
    if (values[np.isfinite(values)] > 0).all():
        axes.set_yscale("log")
    axes.set_title("loss")
    if axes.lines:
        axes.legend(frameon=False)


def _finish_score(
    axes: Axes, records: Sequence[Mapping[str, Any]], position: Any, score: str
) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_title(plain(score.replace("_", " ")))
    positions, values = _series(records, "validation", score, position)
    finite = values[np.isfinite(values)]
    if finite.size and not (0 <= finite.min() <= finite.max() <= 1):
        # Its scale is its own, and whether more of it is better is not known here.
        axes.legend(frameon=False)
        return
    if finite.size:
        best = int(np.nanargmax(values))
        axes.plot(
            positions[best],
            values[best],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=RED,
            label=f"best {values[best]:.2%}",
        )
        _, train_values = _series(records, "train", score, position)
        finite = train_values[np.isfinite(train_values)]
        typical = float(np.median(finite)) if finite.size else 1.0
        lowest = min(float(np.nanmin(values)), typical)
        # Below a perfect score too there must be an axis.
        axes.set_ylim(bottom=max(0.0, lowest - max(0.35 * (1 - lowest), LEAST_ROOM)))
    low, high = axes.get_ylim()
    axes.set_ylim(top=min(high, 1 + 0.02 * (1 - low)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if axes.lines:
        axes.legend(loc="lower right", frameon=False)
