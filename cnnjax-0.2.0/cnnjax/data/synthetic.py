"""Synthetic images in place of a dataset that is not on this machine."""

from __future__ import annotations

import numpy as np

from cnnjax.data.dataset import Arrays, Dataset, make_dataset, select_classes
from cnnjax.data.sources import checked_size
from cnnjax.data.tfds_source import find_builder, image_features, image_shape
from cnnjax.data.tfds_splits import parse_spec
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

SIZES = {"train": 1024, "validation": 256, "test": 256}
# Of a class's pattern, in cells along each side.
_CELLS = 4


def stand_in(
    name: str, *, classes: str = "all", image_size: int | tuple[int, int] | None = None
) -> Dataset:
    """Returns synthetic images with the classes and image shape of a tfds dataset.

    Each class is a pattern of 4x4 colors, half hidden by noise: a network can learn them, and what
    it scores says nothing about the dataset.

    Args:
      name: `tfds:NAME`, as for `cnnjax.data.load`.
      classes, image_size: as for `cnnjax.data.load`.

    Raises:
      UserError: another kind of name, or a dataset that tfds does not know.
    """
    kind, _, text = name.partition(":")
    if kind != "tfds" or not text:
        raise UserError(f"no images can be made for {name!r}: name a dataset as 'tfds:NAME'")
    builder = find_builder(parse_spec(text).name)
    shape = image_shape(builder, checked_size(image_size))
    class_names, relabel = select_classes(image_features(builder).class_names, classes)
    generator = numpy_generator(0, "made images")
    stored = len(class_names) if relabel is None else len(relabel)
    patterns = generator.integers(0, 256, (stored, _CELLS, _CELLS, shape[2]), dtype=np.uint8)
    splits = {split: _images(generator, patterns, shape, count) for split, count in SIZES.items()}
    return make_dataset(f"{name} (synthetic images)", class_names, splits, relabel=relabel)


def _images(
    generator: np.random.Generator,
    patterns: np.ndarray,
    shape: tuple[int, int, int],
    count: int,
) -> Arrays:
    label = generator.integers(0, len(patterns), count).astype(np.int32)
    rows, columns = (np.arange(side) * _CELLS // side for side in shape[:2])
    noise = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    image = patterns[label][:, rows][:, :, columns] // 2 + noise // 2
    return Arrays(image, label)
