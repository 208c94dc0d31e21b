"""Figures of representations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.plots.canvas import new_figure, save, short_names, tidy

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
    from matplotlib import colormaps
    from sklearn.decomposition import PCA

    features, labels = np.asarray(features), np.asarray(labels)
    names = short_names(class_names, len(class_names))
    model = PCA(2, svd_solver="covariance_eigh").fit(features)
    points, labels = model.transform(features[:MOST_POINTS]), labels[:MOST_POINTS]
    colors = colormaps["tab10" if len(names) <= 10 else "turbo"].resampled(len(names))
    figure = new_figure(7.2, 5.6)
    axes = figure.add_subplot()
    for label, name in enumerate(names):
        rows = points[labels == label]
        axes.plot(*rows.T, ".", color=colors(label), markersize=3, alpha=0.6)
        # Legible where the points are not.
        axes.plot([], [], "o", color=colors(label), markersize=5, label=name)
    axes.legend(
        frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 + len(names) // 25
    )
    axes.set_xlabel(f"first principal component ({model.explained_variance_ratio_[0]:.0%})")
    axes.set_ylabel(f"second principal component ({model.explained_variance_ratio_[1]:.0%})")
    tidy(axes)
    return save(figure, path)
