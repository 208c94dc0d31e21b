"""Figures of receptive fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnjax.plots.canvas import ORANGE, new_figure, plain, save

MOST_COLUMNS = 4


class FieldPicture(NamedTuple):
    """The receptive field of a unit.

    Attributes:
      effective: how much each pixel moves it, `[height, width]`, the largest 1.
      box: ((top, bottom), (left, right)) of the theoretical field, ends exclusive.
      text: what is said of it.
    """

    effective: Any
    box: tuple[tuple[int, int], tuple[int, int]]
    text: str


def effective_fields(fields: Mapping[str, FieldPicture], path: Path | str) -> Path:
    """Draws the effective receptive field of each layer in its theoretical one, a frame.

    The scale is the square root of the derivative: else only the middle is seen.

    Args:
      fields: layer -> its field.
      path: where the PNG goes.
    """
    from matplotlib.patches import Rectangle

    columns = min(MOST_COLUMNS, len(fields))
    rows = math.ceil(len(fields) / columns)
    figure = new_figure(2.6 * columns, 3.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, field) in zip(grid.flat, fields.items(), strict=False):
        axes.axis("on")
        axes.imshow(np.sqrt(np.asarray(field.effective)), cmap="magma", vmin=0, vmax=1)
        (top, bottom), (left, right) = field.box
        frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top)
        frame.set(fill=False, edgecolor=ORANGE, linewidth=1.5)
        axes.add_patch(frame)
        height, width = np.shape(field.effective)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(plain(f"{name}\n{field.text}"), fontsize=8)
    return save(figure, path)
