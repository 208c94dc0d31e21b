"""Figures of representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnjax.plots.canvas import new_figure, save, short_names, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More points hide each other.
MOST_POINTS = 3000


def embedding(features: Any, labels: Any, class_names: Sequence[str], path: Path | str) -> Path:
    """Draws representations by class, along their two directions of greatest variance.

    Args:
      features: `[examples, features]`, two at least of each; the first examples are drawn.
      labels: integers `[examples]`.
      class_names: one a class.
      path: where the PNG goes.
    """
    from sklearn.decomposition import PCA

    features, labels = np.asarray(features), np.asarray(labels)
    model = PCA(2, svd_solver="covariance_eigh").fit(features)
    points = model.transform(features[:MOST_POINTS])
    figure = new_figure(7.2, 5.6)
    axes = figure.add_subplot()
    _draw(axes, points, labels[:MOST_POINTS], class_names)
    _name_classes(axes, class_names)
    axes.set_xlabel(f"first principal component ({model.explained_variance_ratio_[0]:.0%})")
    axes.set_ylabel(f"second principal component ({model.explained_variance_ratio_[1]:.0%})")
    tidy(axes)
    return save(figure, path)


def point_maps(
    maps: Mapping[str, Any],
    labels: Any,
    class_names: Sequence[str],
    path: Path | str,
    *,
    wrong: Any = None,
) -> Path:
    """Draws images as points by class, in several arrangements side by side.

    Args:
      maps: title -> points `[examples, 2]`.
      labels: integers `[examples]`.
      class_names: one a class.
      path: where the PNG goes.
      wrong: bool `[examples]`: those that are classified wrong, which get a cross.
    """
    labels = np.asarray(labels)
    crosses = np.zeros(len(labels), bool) if wrong is None else np.asarray(wrong)
    figure = new_figure(4.6 * len(maps) + 1.6, 4.6)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, points) in zip(panels, maps.items(), strict=True):
        points = np.asarray(points)
        _draw(axes, points, labels, class_names)
        axes.plot(*points[crosses].T, "x", color="black", markersize=6, markeredgewidth=1.3)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        tidy(axes)
    if wrong is not None:
        panels[-1].plot([], [], "x", color="black", label=f"{int(crosses.sum())} wrong")
    _name_classes(panels[-1], class_names)
    return save(figure, path)


def class_palette(count: int) -> list[tuple[float, ...]]:
    """Returns the color of each class, RGBA in [0, 1]."""
    from matplotlib import colormaps

    colors = colormaps["tab10" if count <= 10 else "turbo"].resampled(count)
    return [colors(label) for label in range(count)]


def _draw(axes: Axes, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    for label, color in enumerate(class_palette(len(class_names))):
        axes.plot(*points[labels == label].T, ".", color=color, markersize=3, alpha=0.6)


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    names = short_names(class_names, len(class_names))
    for name, color in zip(names, class_palette(len(names)), strict=True):
        # Legible where the points are not.
        axes.plot([], [], "o", color=color, markersize=5, label=name)
    axes.legend(
        frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + len(names) // 25
    )
