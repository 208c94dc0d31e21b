"""Figures of images: grids, the worst classified, one prediction, and filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.plots.canvas import BLUE, GRAY, GREEN, new_figure, percent, plain, save, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grid(images: Any, titles: Sequence[str], path: Path | str) -> Path:
    """Draws images in a grid that is about square, each under its title.

    Args:
      images: `[images, height, width, channels]` with one channel or three; uint8, or float, which
        is taken to lie in [0, 1] and stretched to its range, all images alike, where it does not.
      titles: one an image, of one line or more; `()` for none.
      path: where the PNG goes.
    """
    images = _displayable(np.asarray(images))
    if titles and len(titles) != len(images):
        raise UserError(f"{len(titles)} titles for {len(images)} images: give one an image.")
    return save(_grid_of_images(images, titles), path)


def image_sheet(images: Any, path: Path | str, *, columns: int = 8, heading: str = "") -> Path:
    """Draws images without titles side by side, `columns` a row, each pixel as large as another.

    Args:
      images: as for `image_grid`.
      path: where the PNG goes.
      columns: images in a row.
      heading: of the figure, if any.
    """
    images = _displayable(np.asarray(images))
    sheet = mosaic(images, min(columns, len(images)))
    inches_per_pixel = 6.0 / sheet.shape[1]
    figure = new_figure(6.0, sheet.shape[0] * inches_per_pixel + (0.35 if heading else 0.0))
    if heading:
        figure.suptitle(heading, fontsize=11)
    axes = figure.add_subplot()
    axes.axis("off")
    gray = axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    gray.set_cmap(gray.get_cmap().with_extremes(bad="#BDBDBD"))
    return save(figure, path)


def worst_classified(
    images: Any,
    labels: Any,
    probabilities: Any,
    class_names: Sequence[str],
    path: Path | str,
    *,
    count: int = 25,
) -> Path:
    """Draws the images with the highest cross-entropy, the worst first.

    Each title tells the true class and the predicted one with their probabilities; those of images
    that are right all the same are green and say so.

    Args:
      images: `[examples, height, width, channels]`, as for `image_grid`.
      labels: integers `[examples]`.
      probabilities: `[examples, classes]`.
      class_names: one per class.
      path: where the PNG goes.
      count: how many images at most.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    names = short_names(class_names, probabilities.shape[1])
    of_label = probabilities[np.arange(len(labels)), labels]
    worst = worst_indices(labels, probabilities, count)
    titles, colors = [], []
    for index in worst:
        label, predicted = labels[index], probabilities[index].argmax()
        true = f"true {names[label]}: {percent(of_label[index])}"
        if label == predicted:
            titles.append(f"{true}\n(right)")
            colors.append(GREEN)
        else:
            titles.append(
                f"{true}\npredicted {names[predicted]}: {percent(probabilities[index].max())}"
            )
            colors.append("black")
    wrong = int((probabilities.argmax(axis=1) != labels).sum())
    heading = f"highest loss of {len(labels):,} images, {wrong:,} of them wrong"
    shown = _displayable(np.asarray(images)[worst])
    return save(_grid_of_images(shown, titles, colors, heading), path)


def worst_indices(labels: Any, probabilities: Any, count: int) -> np.ndarray:
    """Returns the numbers of the examples with the highest cross-entropy, the worst first.

    Args:
      labels: integers `[examples]`.
      probabilities: `[examples, classes]`.
      count: how many at most.
    """
    of_label = np.asarray(probabilities)[np.arange(len(labels)), np.asarray(labels)]
    return np.argsort(of_label, kind="stable")[:count]


def worst_explained(
    images: Any,
    maps: Sequence[Sequence[Any]],
    labels: Any,
    others: Any,
    probabilities: Any,
    class_names: Sequence[str],
    path: Path | str,
) -> Path:
    """Draws images, and beside each what speaks for its likeliest class and for another one.

    Args:
      images: `[examples, height, width, channels]`, as for `image_grid`.
      maps: for each of the two classes pictures uint8 `[height, width, 3]`, one an example.
      labels: integers `[examples]`, the true classes.
      others: integers `[examples]`, the class of the second map.
      probabilities: `[examples, classes]`.
      class_names: one per class.
      path: where the PNG goes.
    """
    labels, others, probabilities = map(np.asarray, (labels, others, probabilities))
    names = short_names(class_names, probabilities.shape[1])
    shown = _displayable(np.asarray(images))
    colored = shown if shown.ndim == 4 else np.repeat(shown[..., None], 3, -1)
    gap = np.ones((shown.shape[1], max(1, shown.shape[2] // 20), 3))
    strips, titles, colors = [], [], []
    for index, label in enumerate(labels):
        tiles = (colored[index, ..., :3], *(np.asarray(each[index]) / 255 for each in maps))
        strips.append(np.concatenate([tiles[0], gap, tiles[1], gap, tiles[2]], 1))
        predicted = probabilities[index].argmax()
        told = [
            f"{names[number]}: {percent(probabilities[index, number])}"
            for number in (predicted, others[index])
        ]
        right = label == predicted
        titles.append(
            f"right, {told[0]}\nnot {told[1]}" if right else f"predicted {told[0]}\ntrue {told[1]}"
        )
        colors.append(GREEN if right else "black")
    heading = "highest loss: image, and Grad-CAM for the two classes named above it"
    columns = min(3, len(strips))
    figure = _grid_of_images(
        np.stack(strips), titles, colors, heading, columns=columns, smallest_tile=2.6
    )
    return save(figure, path)


def prediction(
    original: Any,
    network_input: Any,
    probabilities: Any,
    class_names: Sequence[str],
    path: Path | str,
    *,
    count: int = 5,
) -> Path:
    """Draws one image of a person's, what the network saw of it, and the likeliest classes.

    Args:
      original: `[height, width]` or `[height, width, channels]`, uint8, or float in [0, 1].
      network_input: `[height, width, channels]`, likewise.
      probabilities: `[classes]`.
      class_names: one per class.
      path: where the PNG goes.
      count: how many classes at most.
    """
    probabilities = np.asarray(probabilities)
    names = short_names(class_names, len(probabilities))
    top = np.argsort(-probabilities, kind="stable")[:count]
    figure = new_figure(10.0, 3.6)
    original_axes, input_axes, bar_axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    original, network_input = np.asarray(original), np.asarray(network_input)
    for axes, image, title in (
        (original_axes, original, "your image"),
        (input_axes, network_input, "what the network saw"),
    ):
        axes.imshow(_displayable(np.atleast_3d(image)[None])[0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{title}\n{image.shape[1]} x {image.shape[0]}", fontsize=11)
        axes.set_anchor("N")
        axes.set_xticks([])
        axes.set_yticks([])
    colors = [BLUE, *[GRAY] * (len(top) - 1)]
    bars = bar_axes.barh(range(len(top)), probabilities[top], color=colors)
    bar_axes.set_yticks(range(len(top)), [names[index] for index in top])
    bar_axes.bar_label(bars, [percent(probabilities[index]) for index in top], padding=4)
    bar_axes.invert_yaxis()
    bar_axes.set_xlim(0, 1.22)
    bar_axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    bar_axes.set_title("probability\n", fontsize=11)
    bar_axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def filters(
    kernel: Any,
    path: Path | str,
    *,
    groups: int = 1,
    in_color: bool | None = None,
    max_out: int = 64,
    max_in: int = 16,
) -> Path:
    """Draws the kernel of a convolution.

    Three input channels are drawn as colors, each filter stretched to its own range. Otherwise a
    tile is one slice, blue below and red above zero on one scale; with a single input channel (a
    depthwise convolution has one for each filter) the filters fill a grid, with more a row is an
    input channel and a column a filter.

    Args:
      kernel: `[height, width, channels_in, channels_out]`, the channels of one group.
      path: where the PNG goes.
      groups: of channels and filters, each for itself.
      in_color: whether the input channels are red, green and blue; None: if they are three.
      max_out: draw at most this many filters.
      max_in: draw at most this many input channels.
    """
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim != 4:
        raise UserError(
            f"a convolution's kernel has four axes [height, width, in, out], not {kernel.shape}."
        )
    height, width, channels_in, channels_out = kernel.shape
    out, into = min(channels_out, max_out), min(channels_in, max_in)
    in_color = channels_in == 3 and groups == 1 if in_color is None else in_color
    if in_color:
        low, high = kernel.min(axis=(0, 1, 2)), kernel.max(axis=(0, 1, 2))
        tiles = np.moveaxis((kernel - low) / np.maximum(high - low, 1e-12), -1, 0)[:out]
        into = channels_in
    else:
        tiles = kernel[:, :, :into, :out].transpose(2, 3, 0, 1).reshape(-1, height, width)
    sheet = mosaic(tiles, _full_columns(out) if in_color or into == 1 else out)
    inches_per_pixel = min(0.9 / width, 11.0 / sheet.shape[1])
    figure = new_figure(
        max(4.6, sheet.shape[1] * inches_per_pixel + 1.0), sheet.shape[0] * inches_per_pixel + 0.6
    )
    axes = figure.add_subplot()
    axes.axis("off")
    limit = float(np.nanmax(np.abs(kernel), initial=0.0)) or 1.0
    image = axes.imshow(sheet, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    if not in_color:
        # The map is white at zero: tiles are told apart by a gray pixel between them.
        image.set_cmap(image.get_cmap().with_extremes(bad="#BDBDBD"))
        figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    title = f"{channels_out} filter{'s' * (channels_out > 1)} of {height}x{width}"
    if out < channels_out:
        title = f"{out} of {title}"
    if groups > 1:
        title += f", {groups} groups"
    if channels_in > 1:
        title += f", {channels_in} input channels" + (
            f" ({into} shown)" if into < channels_in else ""
        )
    axes.set_title(title, fontsize=10)
    return save(figure, path)


def _displayable(images: np.ndarray) -> np.ndarray:
    """Returns float images in [0, 1], `[images, height, width]` if gray, else `[..., 3]`."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"images must be [images, height, width, channels] with 1, 3 or 4 channels, not "
            f"{list(images.shape)}."
        )
    is_bytes = images.dtype == np.uint8
    images = images.astype(np.float32) / (255 if is_bytes else 1)
    if images.size and (images.min() < 0 or images.max() > 1):
        images = (images - images.min()) / (np.ptp(images) or 1.0)
    return images[..., 0] if images.shape[-1] == 1 else images


def _grid_of_images(
    images: np.ndarray,
    titles: Sequence[str],
    colors: Sequence[str] = (),
    heading: str = "",
    *,
    columns: int = 0,
    smallest_tile: float = 1.0,
) -> Figure:
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    title_lines = max((title.count("\n") + 1 for title in titles), default=0)
    longest = max((len(line) for title in titles for line in title.split("\n")), default=0)
    tile_inches = max(smallest_tile, 0.068 * longest + 0.1)
    aspect = images.shape[1] / images.shape[2]
    figure = new_figure(
        max(4.0, columns * tile_inches + 0.2),
        rows * (tile_inches * aspect + 0.15 * title_lines + 0.06) + (0.35 if heading else 0.03),
        pad_inches=0.03,
    )
    if heading:
        figure.suptitle(heading, fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for index, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        if titles:
            axes.set_title(
                plain(titles[index]), fontsize=8, color=colors[index] if colors else "black", pad=3
            )
    return figure


def _full_columns(count: int) -> int:
    """Returns the number of columns that fills a grid twice as wide as high with fewest blanks."""
    ideal = math.sqrt(2 * count)
    candidates = range(math.ceil(math.sqrt(count)), min(count, math.ceil(1.5 * ideal)) + 1)
    return min(candidates, key=lambda columns: (-count % columns, abs(columns - ideal)))


def mosaic(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Sets tiles `[tiles, height, width, ...]` into rows, a pixel apart: NaN, white if colored."""
    rows = math.ceil(len(tiles) / columns)
    _, height, width, *channels = tiles.shape
    gap = 1.0 if channels else np.nan
    mosaic = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, *channels), gap)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        mosaic[top : top + height, left : left + width] = tile
    return mosaic
