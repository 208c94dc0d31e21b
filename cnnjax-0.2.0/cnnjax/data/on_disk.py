"""Datasets that stay on disk: prepared by tfds, or image files in a folder.

Nothing here is read whole. Training and evaluation reach the examples through
`cnnjax.data.streamed`, which takes these and datasets in memory alike.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np

from cnnjax.data import file_stream, held_out, sources, tfds_source, tfds_splits
from cnnjax.data.batches import Batch
from cnnjax.data.dataset import (
    Arrays,
    channel_moments,
    describe_images,
    labeled_images,
    select_classes,
)
from cnnjax.data.fields import Field
from cnnjax.data.file_stream import Files
from cnnjax.data.folder import find_files
from cnnjax.data.image_files import image_to_shape, parse_fit, read_image
from cnnjax.data.pipelines import Pipeline
from cnnjax.data.streaming import stream_tfds, stream_tfds_evaluation
from cnnjax.data.tfds_splits import Range
from cnnjax.errors import UserError

# The mean of a channel over 2,048 images is known to about 0.005 (white is 1).
MOMENT_EXAMPLES = 2048
# What may be held in memory of a tfds dataset, encoded, to be shuffled.
SHUFFLE_BYTES = 2 * 2**30
# Files of one length are compared byte for byte, which reads all of a large folder.
COMPARED_BYTES = 4 * 2**30
NOT_COMPARED = (
    "the folder is large: whether training images are held out too was not looked for, as "
    "--drop-duplicates would"
)


@dataclass(frozen=True)
class StreamedDataset(abc.ABC):
    """A labeled image dataset on disk.

    Attributes:
      name: what `open_dataset` was asked for.
      class_names: the name of each label, `label` being the index into it.
      image_shape: (height, width, channels).
      splits: `train`, `validation` and `test` -> what they consist of.
      checksum: SHA-256 over what is known of the examples without reading them.
      image_size: (height, width) that images are fitted to; None where they are taken as they are.
      fit: how: see `cnnjax.data.image_files.fit_image`.
      smallest_area: training reads random parts of at least this fraction of an image's area; 0
        reads whole images.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    splits: Mapping[str, Any]
    checksum: str
    image_size: tuple[int, int] | None
    fit: str
    smallest_area: float = 0.0
    notes: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def training_pipeline(
        self, batch_size: int, *, seed: int, sharding: jax.sharding.Sharding | None
    ) -> Pipeline:
        """See `cnnjax.data.streamed.training_pipeline`."""

    @abc.abstractmethod
    def split_size(self, split: str) -> int:
        """The number of examples of a split."""

    @abc.abstractmethod
    def split_batches(
        self, split: str, batch_size: int, *, sharding: jax.sharding.Sharding | None
    ) -> Iterator[Batch]:
        """See `cnnjax.data.streamed.split_batches`."""

    @abc.abstractmethod
    def first(self, split: str, count: int) -> Arrays:
        """The first `count` examples of a split: one at least, and as many as there are at most."""

    @abc.abstractmethod
    def _cut(self, split: str, count: int) -> Any:
        """What the first `count` examples of a split, or all, consist of."""

    def spread(self, split: str, count: int) -> Arrays:
        """About `count` examples from all over a split, or as many as there are."""
        return self.first(split, min(count, self.split_size(split)))

    def shortened(self, sizes: Mapping[str, int]) -> StreamedDataset:
        """The dataset with only the first `sizes[split]` examples of each split named."""
        splits = {**self.splits, **{name: self._cut(name, size) for name, size in sizes.items()}}
        content = (self.checksum, sorted(sizes.items()))
        return replace(self, splits=splits, checksum=_sha256(content))

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
        """Per channel of up to 2,048 training images, pixels mapped to [0, 1]."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise the standard deviation; 1 for a channel that is constant."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return channel_moments(self.spread("train", MOMENT_EXAMPLES).image)


@dataclass(frozen=True)
class TfdsOnDisk(StreamedDataset):
    """A dataset prepared by tfds; a split is ranges of what is stored.

    The checksum is over what tfds recorded when it prepared the files (version, sizes, number of
    bytes, shards, checksums of what was downloaded), the splits, the classes and the image shape:
    another preparation of the same data may differ, and files changed behind tfds's back are not
    noticed.

    Attributes:
      tfds_name: as tfds writes it, with configuration and version.
      data_dir: where it is prepared; None for the default.
      shuffle_buffer: the number of examples shuffled at a time.
    """

    tfds_name: str = ""
    data_dir: str | None = None
    shuffle_buffer: int = 1

    def training_pipeline(
        self, batch_size: int, *, seed: int, sharding: jax.sharding.Sharding | None
    ) -> Pipeline:
        return stream_tfds(
            self.tfds_name,
            tfds_splits.as_text(self.splits["train"]),
            batch_size,
            seed=seed,
            data_dir=self.data_dir,
            image_size=self.image_size,
            fit=self.fit,
            smallest_area=self.smallest_area,
            shuffle_buffer=self.shuffle_buffer,
            sharding=sharding,
        )

    def split_size(self, split: str) -> int:
        return tfds_splits.count(self.splits[split])

    def split_batches(
        self, split: str, batch_size: int, *, sharding: jax.sharding.Sharding | None
    ) -> Iterator[Batch]:
        return stream_tfds_evaluation(
            self.tfds_name,
            tfds_splits.as_text(self.splits[split]),
            batch_size,
            data_dir=self.data_dir,
            image_size=self.image_size,
            fit=self.fit,
            sharding=sharding,
        )

    def first(self, split: str, count: int) -> Arrays:
        return tfds_source.read_split(
            tfds_source.prepared_builder(self.tfds_name, self.data_dir),
            tfds_splits.as_text(self._cut(split, count)),
            self.image_size,
            self.image_shape,
            self.fit,
            count,
        )

    def _cut(self, split: str, count: int) -> tuple[Range, ...]:
        return tfds_splits.cut(self.splits[split], 0, count)


@dataclass(frozen=True)
class FilesOnDisk(StreamedDataset):
    """Image files; a split is the `Files` of it.

    The splits and the order of training are those of the folder in memory, and so are the pixels,
    unless random parts are read. The checksum is over the names of the files below the folder,
    their lengths, their labels, the splits and the image shape: a folder may move, but a file whose
    content changes and not its length is not noticed.
    """

    notes: tuple[str, ...] = ()  # type: ignore[misc]

    def training_pipeline(
        self, batch_size: int, *, seed: int, sharding: jax.sharding.Sharding | None
    ) -> Pipeline:
        return file_stream.stream_files(
            self.splits["train"],
            batch_size,
            seed=seed,
            image_size=self.image_shape[:2],
            num_channels=self.image_shape[2],
            fit=self.fit,
            smallest_area=self.smallest_area,
            sharding=sharding,
        )

    def split_size(self, split: str) -> int:
        return len(self.splits[split].names)

    def split_batches(
        self, split: str, batch_size: int, *, sharding: jax.sharding.Sharding | None
    ) -> Iterator[Batch]:
        return file_stream.stream_files_evaluation(
            self.splits[split],
            batch_size,
            image_size=self.image_shape[:2],
            num_channels=self.image_shape[2],
            fit=self.fit,
            sharding=sharding,
        )

    def first(self, split: str, count: int) -> Arrays:
        files = self._cut(split, count)
        return Arrays(self._read(files), files.labels)

    def _cut(self, split: str, count: int) -> Files:
        return self.splits[split].chosen(np.arange(min(count, self.split_size(split))))

    def spread(self, split: str, count: int) -> Arrays:
        # Files are in the order of their classes: the first would be of few of them.
        files = self.splits[split].chosen(spread_rows(self.split_size(split), count))
        return Arrays(self._read(files), files.labels)

    def _read(self, files: Files) -> np.ndarray:
        images = [
            image_to_shape(read_image(name), self.image_shape, fit=self.fit) for name in files.names
        ]
        return np.stack(images) if images else np.zeros((0, *self.image_shape), np.uint8)


def spread_rows(size: int, count: int) -> np.ndarray:
    """Returns up to `count` of `size` places, evenly spread, ascending."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.int64))


def tfds(
    name: str,
    *,
    only_large: bool,
    data_dir: str | os.PathLike | None,
    classes: str,
    validation: float,
    fold: str,
    seed: int,
    image_size: tuple[int, int] | None,
    fit: str,
    drop_duplicates: bool,
) -> TfdsOnDisk | None:
    """Opens `tfds:NAME` and leaves it on disk.

    Arguments as for `cnnjax.data.streamed.open_dataset`; `only_large`: whether to return None for
    one that can be held in memory.
    """
    spec = tfds_splits.parse_spec(name.partition(":")[2])
    builder = tfds_source.prepared_builder(spec.name, data_dir)
    stored = tfds_splits.choose_splits(builder, spec.splits)
    shape = tfds_source.image_shape(builder, image_size)
    if only_large and tfds_source.memory_bytes(builder, stored, shape) <= sources.MAX_BYTES:
        return None
    sources.check_duplicates(name, has_files=False, drop_duplicates=drop_duplicates)
    if fold:
        raise UserError(
            f"fold {fold}: {name!r} is streamed, and its images are not divided one by one; use "
            "the pipeline 'resident'"
        )
    if classes != "all":
        raise UserError(
            f"classes={classes!r}: {name!r} is streamed, and then all classes are used; "
            "use 'all', or pipeline 'resident', which needs the dataset to fit in memory"
        )
    parse_fit(fit)
    parts = {split: tfds_splits.ranges(builder, text) for split, text in stored.items()}
    splits = tfds_splits.completed(name, builder, parts, validation, seed)
    class_names = tfds_source.image_features(builder).class_names
    info = builder.info.splits[splits["train"][0].split]
    example_bytes = max(1, int(info.num_bytes) // info.num_examples)
    return TfdsOnDisk(
        name=name,
        class_names=class_names,
        image_shape=shape,
        splits=splits,
        checksum=_tfds_checksum(builder, splits, class_names, shape, fit),
        tfds_name=spec.name,
        data_dir=None if data_dir is None else os.fspath(data_dir),
        image_size=image_size,
        fit=fit,
        shuffle_buffer=max(1, min(50_000, SHUFFLE_BYTES // example_bytes)),
    )


def folder(
    name: str,
    *,
    only_large: bool,
    classes: str,
    validation: float,
    fold: str,
    seed: int,
    image_size: tuple[int, int] | None,
    fit: str,
    stratify: bool,
    drop_duplicates: bool,
) -> FilesOnDisk | None:
    """Opens `folder:PATH` and leaves the files where they are; their headers are read.

    Arguments as for `cnnjax.data.streamed.open_dataset`; `only_large`: whether to return None for
    one that can be held in memory, or whose size nobody said.
    """
    held_out.check_validation(validation)
    held_out.check_fold(fold)
    parse_fit(fit)
    if only_large and image_size is None:
        return None
    found = find_files(name.partition(":")[2])
    # Three channels, as nearly all images have that are so many.
    num_bytes = len(found.flat) * int(np.prod(image_size or 0)) * 3
    if only_large and num_bytes <= sources.MAX_BYTES:
        return None
    class_names, relabel = select_classes(found.class_names, classes)
    stored = {
        split: np.array([label for _, label in files], np.int32)
        for split, files in found.splits.items()
    }
    lengths = [os.path.getsize(file) for file in found.flat]
    is_compared = drop_duplicates or sum(lengths) <= COMPARED_BYTES
    divided = held_out.divide(
        name,
        class_names,
        stored,
        relabel=relabel,
        validation=validation,
        fold=fold,
        seed=seed,
        is_stratified=stratify,
        files=found.compared() if is_compared else None,
        drop_duplicates=drop_duplicates,
    )
    files = file_stream.scan_files(found.flat, divided.labels)
    names = [str(file.relative_to(found.root)) for file in found.flat]
    shape = (*(image_size or _only_size(name, files)), files.num_channels)
    numbers = [(split, rows.tolist()) for split, rows in sorted(divided.numbers.items())]
    return FilesOnDisk(
        name=name,
        class_names=class_names,
        image_shape=shape,
        splits={split: files.chosen(rows) for split, rows in divided.numbers.items()},
        checksum=_sha256((names, lengths, files.labels.tolist(), numbers, class_names, shape, fit)),
        image_size=image_size,
        fit=fit,
        notes=divided.notes if is_compared else (*divided.notes, NOT_COMPARED),
    )


def _only_size(name: str, files: Files) -> tuple[int, int]:
    sizes = np.unique(files.sizes, axis=0)
    if len(sizes) > 1:
        raise UserError(
            f"images of {name!r} have {len(sizes)} different sizes (height x width), such as "
            f"{'x'.join(map(str, sizes[0]))} and {'x'.join(map(str, sizes[-1]))}: give image_size"
        )
    return int(sizes[0, 0]), int(sizes[0, 1])


def _tfds_checksum(
    builder: Any,
    splits: Mapping[str, tuple[Range, ...]],
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
    texts = [(name, tfds_splits.as_text(parts)) for name, parts in sorted(splits.items())]
    return _sha256((info.full_name, stored, downloads, texts, class_names, shape, fit))


def _sha256(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()
