"""The interface that training uses for any dataset, in memory or on disk.

`open_dataset` returns a `Dataset` (in memory) or a `StreamedDataset` (on disk, never read whole:
see `cnnjax.data.on_disk`). Both have a name, classes, an image shape, moments and a checksum; their
examples are reached by the functions below, which take either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np

import cnnjax.data
from cnnjax.data import on_disk, sources
from cnnjax.data.batches import Batch, evaluation_batches
from cnnjax.data.dataset import ArrayDataset, Arrays, Dataset, first_rows, num_examples
from cnnjax.data.on_disk import StreamedDataset
from cnnjax.data.pipelines import Forms, Pipeline, ResidentPipeline, forms_of, image_forms
from cnnjax.data.streaming import stream_arrays
from cnnjax.errors import UserError, unknown_name

PIPELINES = ("auto", "resident", "stream")
# What may be held in memory of decoded images, to be drawn.
EXAMPLE_BYTES = 2**29

LabeledDataset = Dataset | StreamedDataset
AnyDataset = LabeledDataset | ArrayDataset


def open_dataset(
    name: str,
    *,
    pipeline: str = "auto",
    data_dir: str | os.PathLike | None = None,
    classes: str = "all",
    validation: float = 0.1,
    fold: str = "",
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    fit: str = "pad",
    smallest_area: float = 0.0,
    stratify: bool = True,
    drop_duplicates: bool = False,
) -> LabeledDataset:
    """Opens a labeled image dataset, in memory or on disk.

    Args:
      name: see `cnnjax.data.load`.
      pipeline: `"resident"` loads it into memory; `"stream"` leaves a tfds dataset or a folder on
        disk, and loads the others; `"auto"` leaves those on disk that are too large to be loaded.
      data_dir, classes, fold, image_size, fit, drop_duplicates: see `cnnjax.data.load`. A tfds
        dataset on disk keeps all its classes: how many images some have is known only after reading
        all; and it has no folds.
      validation: see `cnnjax.data.load`. Of a tfds dataset on disk the validation split is not
        drawn image by image: it is a slice of `train` as stored, which tfds shuffles when it
        prepares. Likewise the last tenth of `train` is the test split of one that has nothing else.
        A folder has the same splits on disk as in memory.
      seed: chooses the validation images: of a tfds dataset on disk, where the slice starts.
      smallest_area: of each training image of a dataset on disk a random part of at least this
        fraction of its area is read, each epoch another: see
        `cnnjax.data.decoding.random_crop_decoder`. 0 reads whole images.
      stratify: see `cnnjax.data.load`; the slices of a tfds dataset on disk are of its classes as
        they come.

    Raises:
      UserError: whatever is wrong, in one line, before any image is read.
    """
    if pipeline not in PIPELINES:
        raise unknown_name("pipeline", pipeline, PIPELINES)
    if not 0.0 <= smallest_area <= 1.0:
        raise UserError(f"smallest_area={smallest_area}: give a share from 0 to 1, such as 0.08")
    kind, _, text = name.partition(":")
    if text and pipeline != "resident":
        size = sources.checked_size(image_size)
        found: StreamedDataset | None = None
        options: dict[str, Any] = {
            "only_large": pipeline == "auto",
            "classes": classes,
            "validation": validation,
            "fold": fold,
            "seed": seed,
            "image_size": size,
            "fit": fit,
            "drop_duplicates": drop_duplicates,
        }
        if kind == "tfds":
            found = on_disk.tfds(name, data_dir=data_dir, **options)
        elif kind == "folder":
            found = on_disk.folder(name, stratify=stratify, **options)
        if found is not None:
            return replace(found, smallest_area=smallest_area)
    if smallest_area:
        raise UserError(
            f"smallest_area={smallest_area:g} (--crop-area): {name!r} is read into memory whole, "
            "and random parts are those of stored images; stream it (pipeline 'stream', tfds "
            "datasets and folders), or cut on the device by the augmentation resized_crop"
        )
    return cnnjax.data.load(
        name,
        data_dir=data_dir,
        classes=classes,
        validation=validation,
        fold=fold,
        seed=seed,
        image_size=image_size,
        fit=fit,
        stratify=stratify,
        drop_duplicates=drop_duplicates,
    )


def training_pipeline(
    dataset: AnyDataset,
    batch_size: int,
    *,
    seed: int,
    stream: bool = False,
    sharding: jax.sharding.Sharding | None = None,
    replicated: jax.sharding.Sharding | None = None,
) -> Pipeline:
    """Returns the pipeline over the training split.

    Args:
      dataset: what `open_dataset` returned, or one of arrays.
      batch_size: examples in a batch, over all devices.
      seed: determines the order.
      stream: feed what is in memory batch by batch instead of keeping it on the device; what is on
        disk is always streamed.
      sharding: how a batch is spread over devices, along its first axis; None for the default one.
      replicated: puts resident data on each device of the mesh; needed when `sharding` is given.
    """
    if isinstance(dataset, StreamedDataset):
        return dataset.training_pipeline(batch_size, seed=seed, sharding=sharding)
    if stream:
        return stream_arrays(dataset.train, batch_size, seed=seed, sharding=sharding)
    return ResidentPipeline(
        dataset.train, batch_size, seed=seed, sharding=sharding, replicated=replicated
    )


def split_size(dataset: AnyDataset, split: str) -> int:
    """The number of examples of `train`, `validation` or `test`; nothing is read."""
    if isinstance(dataset, StreamedDataset):
        return dataset.split_size(split)
    return num_examples(getattr(dataset, split))


def split_batches(
    dataset: AnyDataset,
    split: str,
    batch_size: int,
    *,
    sharding: jax.sharding.Sharding | None = None,
) -> Iterator[Batch]:
    """Yields every example of a split exactly once, in order; the last batch is padded and masked.

    Arguments as for `evaluation_batches`; UserError for an empty split.
    """
    if not split_size(dataset, split):
        raise UserError(
            f"the {split} split of {dataset.name!r} is empty: hold images out for it, or use "
            "another split"
        )
    if isinstance(dataset, StreamedDataset):
        return dataset.split_batches(split, batch_size, sharding=sharding)
    return evaluation_batches(getattr(dataset, split), batch_size, sharding=sharding)


def first_examples(dataset: LabeledDataset, split: str, count: int | None = None) -> Arrays:
    """Returns the first `count` examples of a split, or as many as there are.

    None is as many as fit into 512 MiB: enough to be drawn, without harm to a large dataset.
    """
    if count is None:
        count = max(1, EXAMPLE_BYTES // int(np.prod(dataset.image_shape)))
    count = min(count, split_size(dataset, split))
    if not isinstance(dataset, StreamedDataset):
        arrays = getattr(dataset, split)
        return Arrays(arrays.image[:count], arrays.label[:count])
    if not count:
        return Arrays(np.zeros((0, *dataset.image_shape), np.uint8), np.zeros(0, np.int32))
    return dataset.first(split, count)


def spread_examples(dataset: LabeledDataset, split: str, count: int) -> Arrays:
    """Returns `count` examples from all over a split, or as many as there are.

    Those of folders are in the order of their classes: the first ones are of few of them.
    """
    if isinstance(dataset, StreamedDataset):
        return dataset.spread(split, count) if count else first_examples(dataset, split, 0)
    image, label = getattr(dataset, split)
    rows = on_disk.spread_rows(len(label), count)
    return Arrays(image[rows], label[rows])


D = TypeVar("D", bound=AnyDataset)


def example_forms(dataset: AnyDataset) -> Forms:
    """Returns the shape and dtype of one example, by key; nothing is read."""
    if isinstance(dataset, StreamedDataset):
        return image_forms(dataset.image_shape, np.dtype(np.uint8))
    return forms_of(dataset.train)


def example_inputs(
    dataset: AnyDataset, split: str, count: int | None = None
) -> dict[str, np.ndarray]:
    """Returns the keys that the model gets of the first examples: as many as can be shown.

    Arguments as for `first_examples`.
    """
    inputs = {name for name, field in dataset.fields.items() if field.is_input}
    if not isinstance(dataset, ArrayDataset):
        return {"image": first_examples(dataset, split, count).image}
    rows = {name: getattr(dataset, split)[name] for name in inputs}
    if count is None:
        example_bytes = sum(array[:1].nbytes for array in rows.values())
        count = max(1, EXAMPLE_BYTES // max(1, example_bytes))
    return first_rows(rows, count)


def shorten(dataset: D, sizes: dict[str, int]) -> D:
    """Returns the dataset with only the first `sizes[split]` examples of each split named."""
    if isinstance(dataset, StreamedDataset):
        return dataset.shortened(sizes)  # type: ignore[return-value]
    if isinstance(dataset, ArrayDataset):
        rows: dict[str, Any] = {
            name: first_rows(getattr(dataset, name), size) for name, size in sizes.items()
        }
        return replace(dataset, **rows)
    arrays: dict[str, Any] = {
        name: first_examples(dataset, name, size) for name, size in sizes.items()
    }
    return replace(dataset, **arrays)
