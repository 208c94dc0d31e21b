"""Figures that compare: fine-tuning methods by number of labels, corruptions by severity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.plots.canvas import PALETTE, new_figure, plain, save, tidy

LINES = ("-", "--", ":")


def accuracy_by_labels(
    curves: Mapping[str, Sequence[tuple[int, float, float]]], path: Path | str
) -> Path:
    """Draws accuracy against the number of labels of each class, one line a method.

    Args:
      curves: method -> (labels per class, mean accuracy, half width of its interval); a width that
        is NaN is not drawn.
      path: where the PNG goes.

    Raises:
      UserError: there are no curves.
    """
    from matplotlib.ticker import NullFormatter, PercentFormatter

    if not any(curves.values()):
        raise UserError("there are no accuracies to draw: nothing was trained yet.")
    figure = new_figure(7.5, 4.5)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        labels, means, widths = zip(*sorted(points), strict=True)
        # Side by side, so that the bars of one number of labels can be told apart.
        places = [number * 1.02 ** (index - len(curves) / 2) for number in labels]
        axes.errorbar(
            places,
            means,
            yerr=[0.0 if math.isnan(width) else width for width in widths],
            label=plain(name),
            color=PALETTE[index % len(PALETTE)],
            linestyle=LINES[index // len(PALETTE) % len(LINES)],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
        )
    ticks = sorted({number for points in curves.values() for number, _, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(number) for number in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 1.0))
    axes.set_xlabel("labels of each class")
    axes.set_ylabel("test accuracy")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes)
    return save(figure, path)


def best_so_far(curves: Mapping[str, Sequence[Sequence[float]]], path: Path | str) -> Path:
    """Draws the least error after each trial of searches: thin lines, and their mean for each way.

    Args:
      curves: way of searching -> for each repetition the least error after each trial, in percent.
      path: where the PNG goes.

    Raises:
      UserError: there are no curves.
    """
    from matplotlib.ticker import MaxNLocator

    if not any(curves.values()):
        raise UserError("there are no searches to draw: none is complete.")
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for index, (name, repetitions) in enumerate(curves.items()):
        color = PALETTE[index % len(PALETTE)]
        for curve in repetitions:
            axes.step(range(1, len(curve) + 1), curve, where="post", color=color, alpha=0.3, lw=0.8)
        shortest = min(map(len, repetitions))
        mean = np.mean([curve[:shortest] for curve in repetitions], axis=0)
        axes.step(range(1, shortest + 1), mean, where="post", color=color, lw=2, label=plain(name))
    # The first trials are drawn blindly; what matters is below them.
    start = np.median([curve[min(2, len(curve) - 1)] for each in curves.values() for curve in each])
    low = min(curve[-1] for each in curves.values() for curve in each)
    axes.set_ylim(low - 0.05 * max(start - low, 0.1), start + 0.3 * max(start - low, 0.1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trials")
    axes.set_ylabel("least validation error, %")
    axes.legend(frameon=False)
    tidy(axes)
    return save(figure, path)


def corruption_errors(
    errors: Any, names: Sequence[str], clean: float, counted: int, path: Path | str
) -> Path:
    """Draws the error under each corruption (row) at each severity (column), and its mean.

    Args:
      errors: `[corruptions, severities]`, in [0, 1].
      names: of the corruptions.
      clean: the error on images as they are.
      counted: how many of the first corruptions count in the mean; a line is under them.
      path: where the PNG goes.
    """
    errors = np.asarray(errors)
    shown = np.concatenate([errors, errors.mean(1, keepdims=True)], 1)
    figure = new_figure(6.4, 0.27 * len(names) + 1.3)
    axes = figure.add_subplot()
    image = axes.imshow(shown, cmap="magma_r", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        text = f"{value:.1%}" if value < 0.1 else f"{value:.0%}"
        color = "white" if value > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    severities = range(1, errors.shape[1] + 1)
    axes.set_xticks(range(shown.shape[1]), [*map(str, severities), "mean"])
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=9)
    axes.axvline(errors.shape[1] - 0.5, color="black", linewidth=1)
    if counted < len(names):
        axes.axhline(counted - 0.5, color="black", linewidth=1)
    axes.set_xlabel("severity")
    axes.set_title(
        f"error under corruptions: mean of the first {counted} {errors[:counted].mean():.2%}, "
        f"clean {clean:.2%}",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label="error")
    return save(figure, path)
