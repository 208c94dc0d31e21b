"""What pruning each layer of a network costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cnnjax.plots.canvas import new_figure, plain, save, tidy


def sensitivity(
    scan: Mapping[str, Sequence[float]],
    sparsities: Sequence[float],
    path: Path | str,
    *,
    score: str = "accuracy",
) -> Path:
    """Draws a line for each layer: the score of the network against the layer's sparsity.

    Args:
      scan: layer -> the score at each sparsity.
      sparsities: from 0 on.
      path: where the PNG goes.
      score: what was scored.
    """
    figure = new_figure(8.5, 4.5)
    axes = figure.subplots()
    for number, (name, values) in enumerate(scan.items()):
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(sparsities, values, style, marker="o", markersize=3, label=plain(name))
    axes.set_xlabel("sparsity of this layer alone")
    axes.set_ylabel(score)
    if len(scan) <= 20:
        axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes)
    return save(figure, path)
