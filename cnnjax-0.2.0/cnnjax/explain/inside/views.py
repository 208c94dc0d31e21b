"""The pictures of a network's layers, of arrays: sheets of maps, crops and made images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cnnjax.explain.inside import maximal
from cnnjax.explain.inside.maximal import Maximal
from cnnjax.explain.inside.receptive import ReceptiveField

# Between tiles, in light and dark.
GAP = 150
# Smaller tiles are enlarged to about as many pixels.
TILE_SIDE = 64


class Channel(NamedTuple):
    """What is known of one channel.

    Attributes:
      number: of the channel.
      text: what its activations are.
      crops: PNG of what it responds to most; None where no images were searched.
      made: PNG of the image that was optimized for it; None where none was.
    """

    number: int
    text: str
    crops: bytes | None = None
    made: bytes | None = None


class Layer(NamedTuple):
    """What is shown of one layer.

    Attributes:
      name: of the layer.
      facts: lines of text.
      pictures: (caption, PNG) of filters, effective field and feature maps.
      channels: some of its channels.
    """

    name: str
    facts: Sequence[str]
    pictures: Sequence[tuple[str, bytes]]
    channels: Sequence[Channel] = ()


class Points(NamedTuple):
    """Images as points.

    Attributes:
      maps: method -> `[images, 2]`.
      label: class of each image.
      predicted: what the network answers; None where its classes are others.
      class_names: one a class.
      thumbnails: uint8 `[images, height, width, 1 or 3]`, small.
    """

    maps: dict[str, np.ndarray]
    label: np.ndarray
    predicted: np.ndarray | None
    class_names: Sequence[str]
    thumbnails: np.ndarray


def sheet(tiles: Sequence[np.ndarray] | np.ndarray, columns: int) -> np.ndarray:
    """Returns tiles side by side, `columns` a row; small ones are enlarged, without smoothing.

    Args:
      tiles: uint8 `[tiles, height, width, 1 or 3]`.
      columns: tiles in a row.

    Returns:
      uint8 `[height, width, 1 or 3]`; what is left of the last row is as the gaps are.
    """
    tiles = np.asarray(tiles)
    factor = max(1, TILE_SIDE // max(tiles.shape[1:3]))
    return _joined(tiles.repeat(factor, 1).repeat(factor, 2), columns, gap=2)


def _joined(tiles: np.ndarray, columns: int, gap: int) -> np.ndarray:
    count, height, width, depth = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    down, across = height + gap, width + gap
    whole = np.full((rows * down - gap, columns * across - gap, depth), GAP, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * down, index % columns * across
        whole[top : top + height, left : left + width] = tile
    return whole


def channel_sheet(crops: Sequence[Sequence[np.ndarray]], made: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a row for each channel: what it responds to most, and the image made for it.

    Args:
      crops: of each channel, uint8 `[height, width, 1 or 3]`.
      made: the image of each channel; none for none.
    """
    owns = [[image] for image in made] or [[]] * len(crops)
    rows = [[*each, *own] for each, own in zip(crops, owns, strict=True)]
    side = max(TILE_SIDE, *(max(tile.shape[:2]) for row in rows for tile in row))
    columns = max(map(len, rows))
    tiles = []
    for row in rows:
        # Fewer crops than other channels have: the made image stays the last.
        blanks = [np.full_like(row[0], GAP)] * (columns - len(row))
        place = len(row) - bool(made)
        tiles += [_framed(tile, side) for tile in (*row[:place], *blanks, *row[place:])]
    return sheet(tiles, columns)


def _framed(tile: np.ndarray, side: int) -> np.ndarray:
    """Returns a tile enlarged by a whole factor, in the middle of a square."""
    factor = side // max(tile.shape[:2])
    tile = tile.repeat(factor, 0).repeat(factor, 1)
    whole = np.full((side, side, tile.shape[-1]), GAP, np.uint8)
    top, left = ((side - size) // 2 for size in tile.shape[:2])
    whole[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return whole


def sprites(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Returns tiles side by side without gaps, for a page that shows one of them at a time."""
    return _joined(tiles, columns, gap=0)


def stretched(maps: np.ndarray) -> np.ndarray:
    """Returns each map on a scale of its own from black to white; a constant one is black.

    Args:
      maps: float `[maps, height, width]`.

    Returns:
      uint8 `[maps, height, width, 1]`.
    """
    maps = np.nan_to_num(np.asarray(maps, np.float64))
    low, high = (f(maps, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    scaled = (maps - low) / np.where(high > low, high - low, 1)
    return np.round(255 * scaled).astype(np.uint8)[..., None]


def feature_sheet(activation: np.ndarray, channels: Sequence[int], columns: int = 8) -> np.ndarray:
    """Returns the feature maps of one image, `activation [height, width, channels]`, as a sheet."""
    return sheet(stretched(np.moveaxis(activation, -1, 0)[list(channels)]), columns)


def crops(
    images: np.ndarray, best: Maximal, channel: int, width: int, field: ReceptiveField
) -> list[np.ndarray]:
    """Returns what the highest activations of a channel saw, the highest first.

    Args:
      images: uint8 `[images, height, width, channels]` that were searched.
      best: of the layer.
      channel: of the layer.
      width: of the layer's activation.
      field: of the layer.
    """
    found = []
    values, places = (np.asarray(each[channel]) for each in (best.value, best.position))
    for value, image, place in zip(values, np.asarray(best.image[channel]), places, strict=True):
        if not np.isneginf(value):
            row, column = divmod(int(place), width)
            found.append(maximal.crop(images[int(image)], field, row, column))
    return found


def thumbnails(images: np.ndarray, side: int = 48) -> np.ndarray:
    """Returns uint8 images brought to at most `side` pixels, averaged where they are larger."""
    step = -(-max(images.shape[1:3]) // side)
    if step == 1:
        return images
    height, width = (size // step * step for size in images.shape[1:3])
    cut = images[:, :height, :width].astype(np.float32)
    blocks = cut.reshape(len(images), height // step, step, width // step, step, images.shape[-1])
    return np.round(blocks.mean((2, 4))).astype(np.uint8)


def most_varying(deviation: np.ndarray, count: int) -> list[int]:
    """Returns the numbers of the channels that vary most, in their own order."""
    order = np.argsort(-np.nan_to_num(deviation), kind="stable")[:count]
    return sorted(int(number) for number in order)
