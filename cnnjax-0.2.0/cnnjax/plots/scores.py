"""Figures of a classifier's scores: confusion, calibration, ROC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnjax.plots.canvas import GRAY, ORANGE, PALETTE, SKY, new_figure, save, short_names, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE_STYLES = ("-", "--")
_PAIRS_INCHES = 3.4


def confusion_matrix(confusion: Any, class_names: Sequence[str], path: Path | str) -> Path:
    """Draws counts by true class (row) and predicted class (column).

    A cell's color is its fraction of the row, on a scale that lets rare confusions be seen; its
    number is the count, written where it is legible (up to 25 classes). Beside more than 25 classes
    stand the pairs that are confused most.

    Args:
      confusion: counts `[classes, classes]`.
      class_names: one per class.
      path: where the PNG goes.
    """
    from matplotlib.colors import PowerNorm

    counts = np.asarray(confusion)
    num_classes = len(counts)
    names = short_names(class_names, num_classes)
    with_numbers = num_classes <= 25
    # Room for the longest name on two sides and, where there is one, for the list of pairs.
    name_inches = 0.09 * max(map(len, names))
    side = min(14.0, max(3.6, 0.5 * num_classes if with_numbers else 0.15 * num_classes))
    width, height = side + name_inches + 1.7, side + name_inches + 0.9
    if with_numbers:
        figure = new_figure(width, height)
        axes = figure.add_subplot()
    else:
        figure = new_figure(width + _PAIRS_INCHES, height)
        axes, pairs_axes = figure.subplots(1, 2, width_ratios=(width, _PAIRS_INCHES))
        _write_confused_pairs(pairs_axes, counts, names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, vmin=0.0, vmax=1.0))
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, ticks=[0, 0.01, 0.1, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1%", "10%", "50%", "100%"])
    bar.set_label("fraction of the true class")
    if with_numbers:
        _write_counts(axes, counts, shares)
    _name_ticks(axes, names, side)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    wrong, total = int(counts.sum() - counts.trace()), int(counts.sum())
    axes.set_title(f"{wrong:,} wrong of {total:,}  (accuracy {1 - wrong / max(total, 1):.2%})")
    return save(figure, path)


def reliability_diagram(
    probabilities: Any, labels: Any, path: Path | str, *, num_bins: int = 15
) -> Path:
    """Draws accuracy against confidence, with the number of examples of each bin below.

    A calibrated classifier's bars end on the diagonal (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", figure 1); the title holds their expected calibration error.

    Args:
      probabilities: `[examples, classes]`.
      labels: integers `[examples]`.
      path: where the PNG goes.
      num_bins: number of bins of equal width.
    """
    from cnnjax.metrics import expected_calibration_error

    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    # Bins are open below and closed above, as in the paper and in `expected_calibration_error`.
    edges = np.arange(1, num_bins + 1) / num_bins
    bins = np.minimum(np.searchsorted(edges, confidence), num_bins - 1)
    examples = np.bincount(bins, minlength=num_bins)
    filled = examples > 0
    share_right = np.bincount(bins, right, num_bins)[filled] / examples[filled]
    mean_confidence = np.bincount(bins, confidence, num_bins)[filled] / examples[filled]
    centers = (np.arange(num_bins) + 0.5) / num_bins

    figure = new_figure(5.2, 6.0)
    axes, count_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 0.92 / num_bins
    axes.bar(centers[filled], share_right, width, color=SKY, label="accuracy")
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="perfect calibration")
    axes.plot(
        mean_confidence,
        share_right,
        "o",
        color=ORANGE,
        markeredgecolor="black",
        clip_on=False,
        label="mean confidence",
    )
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    error = float(expected_calibration_error(probabilities, labels, num_bins=num_bins))
    axes.set_title(
        f"expected calibration error {error:.2%}\n"
        f"accuracy {right.mean():.2%}, mean confidence {confidence.mean():.2%}",
        fontsize=11,
    )
    count_axes.bar(centers, examples, width, color=GRAY)
    count_axes.set_yscale("log")
    count_axes.set_ylim(bottom=0.8)
    count_axes.set_ylabel("examples")
    count_axes.set_xlabel("confidence")
    count_axes.set_xlim(0, 1)
    for each in (axes, count_axes):
        tidy(each)
    return save(figure, path)


def roc_curves(
    probabilities: Any, labels: Any, class_names: Sequence[str], path: Path | str
) -> Path:
    """Draws each class's receiver operating characteristic against all others.

    The axis of false positives is logarithmic, because that of a good classifier has its curves in
    the corner. With more than 16 classes those of the 8 lowest areas are colored, the rest gray.
    Classes without examples are left out.

    Args:
      probabilities: `[examples, classes]`.
      labels: integers `[examples]`.
      class_names: one per class.
      path: where the PNG goes.
    """
    from cnnjax.metrics import roc_auc_one_vs_rest

    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    names = short_names(class_names, probabilities.shape[1])
    areas = np.asarray(roc_auc_one_vs_rest(probabilities, labels))
    drawn = np.flatnonzero(np.isfinite(areas))
    few = len(drawn) <= len(PALETTE) * len(_LINE_STYLES)
    named = drawn if few else drawn[np.argsort(areas[drawn], kind="stable")][: len(PALETTE)]
    figure = new_figure(7.6, 4.8)
    axes = figure.add_subplot()
    lowest = 0.5 / max(len(labels), 1)
    for index in np.setdiff1d(drawn, named):
        axes.plot(
            *_roc_points(probabilities[:, index], labels == index, lowest),
            color="#D0D0D0",
            linewidth=0.8,
        )
    for number, index in enumerate(named):
        axes.plot(
            *_roc_points(probabilities[:, index], labels == index, lowest),
            color=PALETTE[number % len(PALETTE)],
            linestyle=_LINE_STYLES[number // len(PALETTE)],
            linewidth=1.2,
            label=f"{names[index]}  {areas[index]:.4f}",
        )
    chance = np.geomspace(lowest, 1)
    axes.plot(chance, chance, ":", color="black", linewidth=1, label="chance  0.5")
    axes.set_xscale("log")
    axes.set_xlim(lowest, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("false positive rate (left edge: zero)")
    axes.set_ylabel("true positive rate")
    title = "class and area" if few else f"{len(named)} lowest areas of {len(drawn)}"
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    mean_area = areas[drawn].mean() if drawn.size else math.nan
    axes.set_title(f"one class against the rest, mean area {mean_area:.4f}")
    tidy(axes)
    return save(figure, path)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(
            column,
            row,
            f"{counts[row, column]}",
            ha="center",
            va="center",
            fontsize=8,
            # The scale's exponent puts the middle of the map at 0.5 ** (1 / 0.4) = 0.18.
            color="white" if shares[row, column] > 0.18 else "black",
        )


def _write_confused_pairs(axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    """Lists the largest counts off the diagonal."""
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:20]
    pairs = [np.unravel_index(cell, wrong.shape) for cell in largest if wrong.flat[cell]]
    lines = [f"{wrong[pair]:>5}  {names[pair[0]]} as {names[pair[1]]}" for pair in pairs]
    axes.axis("off")
    text = "\n".join(["most confused: true as predicted", "", *lines])
    axes.text(0, 1, text, va="top", fontsize=9, linespacing=1.5)


def _name_ticks(axes: Axes, names: list[str], side_inches: float) -> None:
    """Names each class, or numbers some of them where the names would not be legible."""
    points_per_class = 72 * side_inches / len(names)
    if points_per_class < 6:
        return
    size = min(10.0, 0.8 * points_per_class)
    rotation = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(range(len(names)), names, fontsize=size, rotation=rotation)
    axes.set_yticks(range(len(names)), names, fontsize=size)


def _roc_points(
    scores: np.ndarray, positives: np.ndarray, lowest: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns false and true positive rates at each threshold, from (`lowest`, ...) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    # Examples of equal score pass the threshold together.
    last_of_score = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(positives[order])[last_of_score]
    false = np.cumsum(~positives[order])[last_of_score]
    true_rate = np.append(0, true / max(positives.sum(), 1))
    false_rate = np.append(0, false / max((~positives).sum(), 1))
    return np.maximum(false_rate, lowest), true_rate
