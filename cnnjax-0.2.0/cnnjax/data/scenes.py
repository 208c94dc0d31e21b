"""Scenes composed from real digits on textured ground, with the class of every pixel.

A synthetic arrangement of real handwriting: digits of one split only are scaled, placed on ground
of random stripes and smoothed noise, and painted with a random amount of ink. A pixel that is at
least half ink has the class of its digit plus 1; others are ground, class 0. Where the ink of two
digits overlaps there is no one right class: those pixels are `IGNORE`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cnnjax.data.dataset import Arrays, Dataset
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

IGNORE = 255
CLASS_NAMES = ("ground", *"0123456789")

FEWEST_DIGITS, MOST_DIGITS = 2, 5
SIDES = (20.0, 36.0)
# Of so many random places a digit takes the one farthest from the digits before it.
PLACES = 12
# Gray levels in [0, 1]. The faintest ink is brighter than most of the brightest ground.
GROUND, TEXTURE, INK = (0.05, 0.35), (0.03, 0.12), (0.75, 1.0)
GRAIN = 0.01
# Strokes that are made smaller get fainter: ink covers this much more, up to all of a pixel.
FLOW = 1.5
WAVES = 3
# Scenes drawn at once: each block has a generator of its own.
BLOCK = 256


def digit_scenes(
    digits: Arrays, num_scenes: int, seed: int, *, name: str = "train", size: int = 64
) -> dict[str, np.ndarray]:
    """Returns scenes of 2 to 5 of the digits, each 20 to 36 pixels high (of 64), and class maps.

    Scene `i` is a function of (digits, seed, name, size, i): more scenes begin with the fewer.

    Args:
      digits: white on black, uint8 `[n, side, side, 1]`, with labels 0 to 9.
      num_scenes: how many.
      seed: chooses digits, places, ink and ground.
      name: of the split: splits of other names have other places and grounds, too.
      size: height and width of the scenes.

    Returns:
      `image`, uint8 `[num_scenes, size, size, 1]`, and `class_map`, uint8
      `[num_scenes, size, size]`.

    Raises:
      UserError: no digits, or scenes too small for them.
    """
    if not len(digits.label):
        raise UserError(f"there are no digits to compose {name} scenes from: give some.")
    if size < SIDES[1]:
        raise UserError(f"scenes of {size} pixels are too small: give at least {SIDES[1]:.0f}.")
    blocks = []
    for start in range(0, num_scenes, BLOCK):
        generator = numpy_generator(seed, f"digit scenes {name}", start // BLOCK)
        image, class_map = _block(generator, digits, size)
        blocks.append((image[: num_scenes - start], class_map[: num_scenes - start]))
    empty = (np.zeros((0, size, size), np.uint8),) * 2
    images, class_maps = zip(*blocks, strict=True) if blocks else ((part,) for part in empty)
    return {"image": np.concatenate(images)[..., None], "class_map": np.concatenate(class_maps)}


def scene_splits(
    dataset: Dataset, num_scenes: Mapping[str, int], *, seed: int = 0, size: int = 64
) -> dict[str, dict[str, np.ndarray]]:
    """Returns `digit_scenes` of each split's own digits: none is seen in two splits.

    Args:
      dataset: digits, such as `load("mnist")`.
      num_scenes: split name (`train`, `validation`, `test`) -> number of scenes.
      seed, size: as for `digit_scenes`.
    """
    return {
        split: digit_scenes(getattr(dataset, split), count, seed, name=split, size=size)
        for split, count in num_scenes.items()
    }


def _block(
    generator: np.random.Generator, digits: Arrays, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `BLOCK` images and class maps, uint8 `[BLOCK, size, size]`."""
    shape = (BLOCK, MOST_DIGITS)
    chosen = generator.integers(0, len(digits.label), shape)
    number = generator.integers(FEWEST_DIGITS, MOST_DIGITS + 1, BLOCK)
    side = generator.uniform(*SIDES, shape)
    top, left = _places(generator, side, size)
    ink = generator.uniform(*INK, shape).astype(np.float32)
    image = _ground(generator, size)

    masks = np.empty((BLOCK, MOST_DIGITS, size, size), bool)
    for slot in range(MOST_DIGITS):
        strokes = digits.image[chosen[:, slot], :, :, 0].astype(np.float32) / 255
        rows, columns = (
            _resampling(start[:, slot], side[:, slot], strokes.shape[1], size)
            for start in (top, left)
        )
        coverage = np.minimum(FLOW * (rows @ strokes @ columns.transpose(0, 2, 1)), 1)
        coverage *= (slot < number)[:, None, None]
        image += coverage * (ink[:, slot, None, None] - image)
        masks[:, slot] = coverage >= 0.5
    classes = 1 + digits.label[chosen].astype(np.uint8)
    class_map = np.max(masks * classes[:, :, None, None], axis=1)
    class_map[masks.sum(axis=1) > 1] = IGNORE
    grain = generator.standard_normal(image.shape, np.float32)
    image = np.clip(image + GRAIN * grain, 0, 1)
    return np.round(255 * image).astype(np.uint8), class_map


def _places(
    generator: np.random.Generator, side: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the top and left of each digit `[scenes, slots]`, in pixels, within the scene."""
    scenes, slots = side.shape
    corner = generator.uniform(0, 1, (2, scenes, slots, PLACES)) * (size - side)[None, :, :, None]
    center = corner + side[None, :, :, None] / 2
    chosen = np.zeros((scenes, slots), np.intp)
    everyone = np.arange(scenes)
    for slot in range(1, slots):
        before = center[:, everyone[:, None], np.arange(slot), chosen[:, :slot]]
        apart = center[:, :, slot, :, None] - before[:, :, None, :]
        distance = np.max(np.abs(apart), axis=0).min(axis=-1)
        chosen[:, slot] = distance.argmax(axis=-1)
    places = np.take_along_axis(corner, chosen[None, :, :, None], axis=3)[..., 0]
    return places[0], places[1]


def _resampling(start: np.ndarray, side: np.ndarray, old: int, new: int) -> np.ndarray:
    """Returns matrices `[scenes, new, old]` that put `old` pixels at `start`, `side` pixels wide.

    A new pixel is the mean of what it covers, which outside of the old pixels is 0.
    """
    edges = start[:, None, None] + np.arange(old + 1) * (side / old)[:, None, None]
    position = np.arange(new)[None, :, None]
    covered = np.minimum(edges[..., 1:], position + 1) - np.maximum(edges[..., :-1], position)
    return np.maximum(covered, 0).astype(np.float32)


def _ground(generator: np.random.Generator, size: int) -> np.ndarray:
    """Returns gray ground, float32 `[BLOCK, size, size]`: waves, smoothed noise, a mean."""
    noise = generator.standard_normal((BLOCK, size, size), np.float32)
    rows, columns = (_smoothing(generator, size) for _ in range(2))
    noise = rows @ noise @ columns.transpose(0, 2, 1)
    # A wave at an angle is a sum of products of waves along the axes.
    angle = generator.uniform(0, np.pi, (BLOCK, 1, 1)) + generator.normal(0, 0.2, (1, WAVES, 1))
    frequency = 2 * np.pi / generator.uniform(5, 40, (BLOCK, WAVES, 1))
    phase = generator.uniform(0, 2 * np.pi, (BLOCK, WAVES, 1))
    along = (np.arange(size) * frequency * np.sin(angle) + phase).astype(np.float32)
    across = (np.arange(size) * frequency * np.cos(angle)).astype(np.float32)
    left = np.concatenate([np.cos(along), -np.sin(along)], axis=1).transpose(0, 2, 1)
    waves = left @ np.concatenate([np.cos(across), np.sin(across)], axis=1)
    mixture = generator.uniform(0, 1, (BLOCK, 1, 1)).astype(np.float32)
    texture = mixture * noise + (1 - mixture) * waves / np.sqrt(WAVES / 2, dtype=np.float32)
    contrast, mean = (
        generator.uniform(*bounds, (BLOCK, 1, 1)).astype(np.float32) for bounds in (TEXTURE, GROUND)
    )
    return mean + contrast * texture


def _smoothing(generator: np.random.Generator, size: int) -> np.ndarray:
    """Returns Gaussian filters `[BLOCK, size, size]` of random width that keep the variance."""
    width = generator.uniform(0.7, 5, (BLOCK, 1, 1))
    distance = np.arange(size)[:, None] - np.arange(size)
    weights = np.exp(-0.5 * (distance / width) ** 2)
    weights /= np.linalg.norm(weights, axis=2, keepdims=True)
    return weights.astype(np.float32)
