"""Figures of class maps: images with the classes of their pixels painted over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.plots.canvas import new_figure, save, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Opacity of a painted pixel.
_PAINT = 0.75
_IGNORED = (1.0, 1.0, 1.0)
_WRONG = (1.0, 0.27, 0.13)
_TILE_INCHES = 1.5


def class_maps(
    images: Any,
    truth: Any,
    predicted: Any,
    class_names: Sequence[str],
    path: Path | str,
    *,
    ignore: int = 255,
    background: int | None = 0,
    count: int = 8,
) -> Path:
    """Draws images, their true and predicted classes painted over, and which pixels are wrong.

    Each image is a column: as it is, the truth, the prediction, and the errors, under which stands
    the fraction of its pixels that are wrong. Pixels that are ignored are white in the truth, and
    in the errors neither right nor wrong.

    Args:
      images: `[images, height, width, channels]`, one channel or three; uint8, or float in [0, 1].
      truth: class numbers `[images, height, width]`, or `ignore`.
      predicted: class numbers `[images, height, width]`.
      class_names: one a class.
      path: where the PNG goes.
      ignore: marks pixels without a class.
      background: the class that is not painted; None paints all.
      count: how many images at most.
    """
    from matplotlib.patches import Patch

    images, truth, predicted = (np.asarray(array)[:count] for array in (images, truth, predicted))
    _check(images, truth, predicted)
    names = short_names(class_names, len(class_names))
    gray = _rgb(images)
    colors = class_colors(len(names) - (background is not None))
    if background is not None:
        colors = np.insert(colors, background, 0, axis=0)
    rows = {
        "image": gray,
        "truth": _painted(gray, truth, colors, ignore, background),
        "prediction": _painted(gray, predicted, colors, ignore, background),
        "wrong": _errors(gray, truth, predicted, ignore),
    }
    tile_height = _TILE_INCHES * images.shape[1] / images.shape[2]
    columns = len(images)
    figure = new_figure(
        max(4.8, columns * _TILE_INCHES + 1.1), 4 * tile_height + 0.75, pad_inches=0.02
    )
    grid = figure.subplots(4, columns, squeeze=False)
    for axes_row, (title, tiles) in zip(grid, rows.items(), strict=True):
        for axes, tile in zip(axes_row, tiles, strict=True):
            _show(axes, tile)
        axes_row[0].set_ylabel(title, fontsize=10)
    wrong = _fractions_wrong(truth, predicted, ignore)
    for axes, fraction in zip(grid[-1], wrong, strict=True):
        axes.set_xlabel(f"{fraction:.1%}", fontsize=9, labelpad=3)
    handles = [
        Patch(facecolor=color, label=name)
        for number, (name, color) in enumerate(zip(names, colors, strict=True))
        if number != background
    ]
    if (truth == ignore).any():
        handles.append(Patch(facecolor=_IGNORED, edgecolor="black", lw=0.5, label="ignored"))
    figure.legend(
        handles=handles,
        loc="outside right upper",
        fontsize=9,
        frameon=False,
        handlelength=1,
        handleheight=1,
    )
    return save(figure, path)


def class_colors(count: int) -> np.ndarray:
    """Returns colors, RGB in [0, 1] `[count, 3]`, none of them gray, neighbors far apart in hue."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb

    # The full tones first, then the pale ones; grays are what images are made of.
    table = np.delete(colormaps["tab20"](range(20))[:, :3], (14, 15), axis=0)
    if count <= len(table):
        return np.concatenate([table[::2], table[1::2]])[:count]
    number = np.arange(count)
    hue = number * 0.618034 % 1
    return hsv_to_rgb(np.stack([hue, 0.9 - 0.3 * (number % 3 == 1), 1 - 0.3 * (number % 2)], -1))


def _painted(
    images: np.ndarray, classes: np.ndarray, colors: np.ndarray, ignore: int, background: int | None
) -> np.ndarray:
    ignored = classes == ignore
    paint = colors[np.where(ignored, 0, classes)]
    paint[ignored] = _IGNORED
    bare = (classes == background) & ~ignored if background is not None else np.zeros_like(ignored)
    mixed = (1 - _PAINT) * images + _PAINT * paint
    return np.where(bare[..., None], images, mixed)


def _errors(
    images: np.ndarray, truth: np.ndarray, predicted: np.ndarray, ignore: int
) -> np.ndarray:
    wrong = (truth != predicted) & (truth != ignore)
    return np.where(wrong[..., None], _WRONG, 0.5 * images)


def _fractions_wrong(truth: np.ndarray, predicted: np.ndarray, ignore: int) -> np.ndarray:
    counted = truth != ignore
    wrong = np.sum((truth != predicted) & counted, axis=(1, 2))
    return wrong / np.maximum(counted.sum(axis=(1, 2)), 1)


def _rgb(images: np.ndarray) -> np.ndarray:
    """Returns float images in [0, 1] `[images, height, width, 3]`."""
    scaled = images / np.float32(255) if images.dtype == np.uint8 else images
    return np.broadcast_to(scaled, (*images.shape[:3], 3)).astype(np.float32)


def _show(axes: Axes, tile: np.ndarray) -> None:
    axes.imshow(np.clip(tile, 0, 1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _check(images: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
    shapes = f"images {list(images.shape)}, truth {list(truth.shape)} and predicted classes "
    shapes += f"{list(predicted.shape)}"
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"{shapes}: give images [n, height, width, channels] of 1 or 3 channels.")
    if not truth.shape == predicted.shape == images.shape[:3]:
        raise UserError(f"{shapes}: give one class a pixel of each image.")
