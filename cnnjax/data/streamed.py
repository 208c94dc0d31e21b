"""Streamed datasets, and the interface that training uses for any dataset.

`open_dataset` returns a `Dataset` (in memory) or a `StreamedDataset` (prepared by tfds, on disk,
never read whole). Both have a name, classes, an image shape, moments and a checksum; their examples
are reached by the functions below, which take either.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np

import cnnjax.data
from cnnjax.data import sources, tfds_source, tfds_splits
from cnnjax.data.batches import Batch, evaluation_batches
from cnnjax.data.dataset import (
    ArrayDataset,
    Arrays,
    Dataset,
    channel_moments,
    check_validation,
    describe_images,
    first_rows,
    labeled_images,
    num_examples,
)
from cnnjax.data.fields import Field
from cnnjax.data.image_files import parse_fit
from cnnjax.data.pipelines import Forms, Pipeline, ResidentPipeline, forms_of, image_forms
from cnnjax.data.streaming import stream_arrays, stream_tfds, stream_tfds_evaluation
from cnnjax.data.tfds_splits import Range
from cnnjax.errors import UserError, unknown_name

PIPELINES = ("auto", "resident", "stream")
# The mean of a channel over 2,048 images is known to about 0.005 (white is 1).
MOMENT_EXAMPLES = 2048
# What may be held in memory of a dataset on disk: encoded, to be shuffled; decoded, to be drawn.
SHUFFLE_BYTES = 2 * 2**30
EXAMPLE_BYTES = 2**29


@dataclass(frozen=True)
class StreamedDataset:
    """A tfds dataset on disk.

    Attributes:
      name: what `open_dataset` was asked for.
      class_names: the name of each label, `label` being the index into it.
      image_shape: (height, width, channels).
      splits: `train`, `validation` and `test` -> the stored examples that they consist of.
      checksum: SHA-256 over what tfds recorded when it prepared the files (version, sizes, number
        of bytes, shards, checksums of what was downloaded), the splits, the classes and the image
        shape. No image is read for it: another preparation of the same data may differ, and files
        changed behind tfds's back are not noticed.
      tfds_name: as tfds writes it, with configuration and version.
      data_dir: where it is prepared; None for the default.
      image_size: (height, width) that images are fitted to; None where they are taken as they are.
      fit: how: see `cnnjax.data.image_files.fit_image`.
      shuffle_buffer: the number of examples shuffled at a time.
      smallest_area: training reads random parts of at least this fraction of an image's area; 0
        reads whole images.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    splits: dict[str, tuple[Range, ...]]
    checksum: str
    tfds_name: str
    data_dir: str | None
    image_size: tuple[int, int] | None
    fit: str
    shuffle_buffer: int
    smallest_area: float = 0.0
    notes: ClassVar[tuple[str, ...]] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fields(self) -> dict[str, Field]:
        """What the keys of an example are."""
        return labeled_images(self.num_classes)

    @property
    def description(self) -> str:
        """What an example is, in words."""
        return describe_images(self.image_shape, self.num_classes)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel of the first 2,048 training images, pixels mapped to [0, 1]."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise the standard deviation; 1 for a channel that is constant."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return channel_moments(first_examples(self, "train", MOMENT_EXAMPLES).image)


LabeledDataset = Dataset | StreamedDataset
AnyDataset = LabeledDataset | ArrayDataset


def open_dataset(
    name: str,
    *,
    pipeline: str = "auto",
    data_dir: str | os.PathLike | None = None,
    classes: str = "all",
    validation: float = 0.1,
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
      pipeline: `"resident"` loads it into memory; `"stream"` leaves a tfds dataset on disk, and
        loads the others; `"auto"` leaves a tfds dataset on disk when it is too large to be loaded.
      data_dir, classes, image_size, fit, drop_duplicates: see `cnnjax.data.load`. A dataset on disk
        keeps all its classes: how many images some of them have is known only after reading all.
      validation: see `cnnjax.data.load`. Of a dataset on disk the validation split is not drawn
        image by image: it is a slice of `train` as stored, which tfds shuffles when it prepares.
        Likewise the last tenth of `train` is the test split of a dataset that has nothing else.
      seed: chooses the validation images: of a dataset on disk, where the slice starts.
      smallest_area: of each training image of a dataset on disk a random part of at least this
        fraction of its area is read, each epoch another: see
        `cnnjax.data.decoding.random_crop_decoder`. 0 reads whole images.
      stratify: see `cnnjax.data.load`; the slices of a dataset on disk are of its classes as they
        come.

    Raises:
      UserError: whatever is wrong, in one line, before any image is read.
    """
    if pipeline not in PIPELINES:
        raise unknown_name("pipeline", pipeline, PIPELINES)
    if not 0.0 <= smallest_area <= 1.0:
        raise UserError(f"smallest_area={smallest_area}: give a share from 0 to 1, such as 0.08")
    kind, _, text = name.partition(":")
    if kind == "tfds" and text and pipeline != "resident":
        size = sources.checked_size(image_size)
        spec = tfds_splits.parse_spec(text)
        builder = tfds_source.prepared_builder(spec.name, data_dir)
        splits = tfds_splits.choose_splits(builder, spec.splits)
        shape = tfds_source.image_shape(builder, size)
        is_large = tfds_source.memory_bytes(builder, splits, shape) > sources.MAX_BYTES
        if pipeline == "stream" or is_large:
            sources.check_duplicates(name, has_files=False, drop_duplicates=drop_duplicates)
            if classes != "all":
                raise UserError(
                    f"classes={classes!r}: {name!r} is streamed, and then all classes are used; "
                    "use 'all', or pipeline 'resident', which needs the dataset to fit in memory"
                )
            parts = {split: tfds_splits.ranges(builder, text) for split, text in splits.items()}
            dataset = _streamed(
                name, spec.name, builder, parts, data_dir, validation, seed, size, fit
            )
            return replace(dataset, smallest_area=smallest_area)
    if smallest_area:
        raise UserError(
            f"smallest_area={smallest_area:g} (--crop-area): {name!r} is read into memory whole, "
            "and random parts are those of stored images; stream it (pipeline 'stream', tfds "
            "datasets), or cut on the device by the augmentation resized_crop"
        )
    return cnnjax.data.load(
        name,
        data_dir=data_dir,
        classes=classes,
        validation=validation,
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
        return stream_tfds(
            dataset.tfds_name,
            tfds_splits.as_text(dataset.splits["train"]),
            batch_size,
            seed=seed,
            data_dir=dataset.data_dir,
            image_size=dataset.image_size,
            fit=dataset.fit,
            smallest_area=dataset.smallest_area,
            shuffle_buffer=dataset.shuffle_buffer,
            sharding=sharding,
        )
    if stream:
        return stream_arrays(dataset.train, batch_size, seed=seed, sharding=sharding)
    return ResidentPipeline(
        dataset.train, batch_size, seed=seed, sharding=sharding, replicated=replicated
    )


def split_size(dataset: AnyDataset, split: str) -> int:
    """The number of examples of `train`, `validation` or `test`; nothing is read."""
    if isinstance(dataset, StreamedDataset):
        return tfds_splits.count(dataset.splits[split])
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
        return stream_tfds_evaluation(
            dataset.tfds_name,
            tfds_splits.as_text(dataset.splits[split]),
            batch_size,
            data_dir=dataset.data_dir,
            image_size=dataset.image_size,
            fit=dataset.fit,
            sharding=sharding,
        )
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
    return tfds_source.read_split(
        tfds_source.prepared_builder(dataset.tfds_name, dataset.data_dir),
        tfds_splits.as_text(tfds_splits.cut(dataset.splits[split], 0, count)),
        dataset.image_size,
        dataset.image_shape,
        dataset.fit,
        count,
    )


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
        splits = dataset.splits | {
            name: tfds_splits.cut(dataset.splits[name], 0, size) for name, size in sizes.items()
        }
        checksum = hashlib.sha256(f"{dataset.checksum}{_texts(splits)}".encode()).hexdigest()
        return replace(dataset, splits=splits, checksum=checksum)
    if isinstance(dataset, ArrayDataset):
        rows: dict[str, Any] = {
            name: first_rows(getattr(dataset, name), size) for name, size in sizes.items()
        }
        return replace(dataset, **rows)
    arrays: dict[str, Any] = {
        name: first_examples(dataset, name, size) for name, size in sizes.items()
    }
    return replace(dataset, **arrays)


def _streamed(
    name: str,
    tfds_name: str,
    builder: Any,
    splits: dict[str, tuple[Range, ...]],
    data_dir: str | os.PathLike | None,
    validation: float,
    seed: int,
    image_size: tuple[int, int] | None,
    fit: str,
) -> StreamedDataset:
    check_validation(validation)
    parse_fit(fit)
    splits = tfds_splits.completed(name, builder, splits, validation, seed)
    class_names = tfds_source.image_features(builder).class_names
    shape = tfds_source.image_shape(builder, image_size)
    stored = builder.info.splits[splits["train"][0].split]
    example_bytes = max(1, int(stored.num_bytes) // stored.num_examples)
    return StreamedDataset(
        name=name,
        class_names=class_names,
        image_shape=shape,
        splits=splits,
        checksum=_checksum(builder, splits, class_names, shape, fit),
        tfds_name=tfds_name,
        data_dir=None if data_dir is None else os.fspath(data_dir),
        image_size=image_size,
        fit=fit,
        shuffle_buffer=max(1, min(50_000, SHUFFLE_BYTES // example_bytes)),
    )


def _checksum(
    builder: Any,
    splits: dict[str, tuple[Range, ...]],
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],
    fit: str,
) -> str:
    info = builder.info
    stored = [
        (split, each.num_examples, int(each.num_bytes), tuple(each.shard_lengths))
        for split, each in sorted(info.splits.items())
    ]
    downloads = sorted(each.checksum for each in (builder.url_infos or {}).values())
    content = (info.full_name, stored, downloads, _texts(splits), class_names, shape, fit)
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _texts(splits: dict[str, tuple[Range, ...]]) -> list[tuple[str, str]]:
    return [(name, tfds_splits.as_text(parts)) for name, parts in sorted(splits.items())]
