"""Streaming batches, for data larger than memory or augmented on the host.

TensorFlow only reads, shuffles, decodes and augments; no JAX operation runs inside tf.data. A
background thread moves each batch to the device before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from cnnjax.data.batches import (
    BATCHES_AHEAD,
    Batch,
    HostBatch,
    check_divides,
    local_rows,
    pad_and_mask,
    padded_size,
    place_local,
    prefetch,
)
from cnnjax.data.dataset import Split, columns, num_examples
from cnnjax.data.decoding import HostAugment, decoder, keep_freed_memory, tensorflow
from cnnjax.data.image_files import parse_fit
from cnnjax.data.pipelines import (
    Forms,
    batch_shapes,
    count_steps,
    epoch_indices,
    forms_of,
    image_forms,
)
from cnnjax.data.tfds_source import (
    image_features,
    image_shape,
    prepared_builder,
)
from cnnjax.data.tfds_splits import split_size
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator


class StreamingPipeline:
    """Batches read as they are needed: made by `stream_tfds` and `stream_arrays`."""

    def __init__(
        self,
        read_from: Callable[[int], Iterator[HostBatch]],
        num_examples: int,
        batch_size: int,
        forms: Forms,
        *,
        sharding: jax.sharding.Sharding | None = None,
        rows: np.ndarray | None = None,
    ):
        """Keeps what reads; nothing is opened yet.

        Args:
          read_from: first step -> this process's part of the batches from there on, for ever.
          num_examples: examples in the split, over all processes.
          batch_size: examples in a batch, over all processes.
          forms: shape and dtype of one example, by key.
          sharding: how a batch is spread over devices, along its first axis; None for the default
            device.
          rows: the positions in a batch of the examples that are read here.
        """
        self.batch_size = batch_size
        self.num_examples = num_examples
        self.steps_per_epoch = count_steps(num_examples, batch_size)
        check_divides(batch_size, sharding)
        self.batch_shapes = batch_shapes(batch_size, forms, sharding)
        self._read_from = read_from
        self._sharding = sharding
        self._rows = local_rows(batch_size, sharding) if rows is None else rows

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batches of the global steps `first_step`, `first_step + 1`, ... for ever."""
        return prefetch(self._on_device(first_step))

    def _on_device(self, first_step: int) -> Iterator[Batch]:
        for batch in self._read_from(first_step):
            yield place_local(batch, self._sharding, self._rows, self.batch_size)


def _endless(
    read_epoch: Callable[[int, int], Iterator[HostBatch]], steps_per_epoch: int
) -> Callable[[int], Iterator[HostBatch]]:
    """Returns what `StreamingPipeline` reads from, of what reads an epoch.

    Args:
      read_epoch: (epoch, number of batches to skip) -> the other batches of that epoch.
      steps_per_epoch: batches in an epoch.
    """

    def read_from(first_step: int) -> Iterator[HostBatch]:
        epoch, offset = divmod(first_step, steps_per_epoch)
        while True:
            yield from read_epoch(epoch, offset)
            epoch, offset = epoch + 1, 0

    return read_from


def stream_arrays(
    arrays: Split,
    batch_size: int,
    *,
    seed: int,
    host_augment: HostAugment | None = None,
    sharding: jax.sharding.Sharding | None = None,
    rows: np.ndarray | None = None,
) -> StreamingPipeline:
    """Streams from host memory, in exactly the order of `ResidentPipeline` with the same seed.

    For data that fit into the host's memory but not the device's, or that are augmented on the
    host. TensorFlow is imported only for the latter. Arguments as for `stream_tfds`.
    """
    here = local_rows(batch_size, sharding) if rows is None else rows
    by_key, size = columns(arrays), num_examples(arrays)

    def read_epoch(epoch: int, skip: int) -> Iterator[HostBatch]:
        order = epoch_indices(size, batch_size, seed, epoch)
        mine = order[skip:, here]
        if host_augment is None:
            for row in mine:
                yield _with_mask({name: array[row] for name, array in by_key.items()})
            return
        tf = tensorflow()
        positions = np.arange(order.size, dtype=np.int64).reshape(order.shape)[skip:, here]
        dataset = tf.data.Dataset.from_generator(
            lambda: (
                (position, {name: array[at] for name, array in by_key.items()})
                for position, at in zip(positions.ravel(), mine.ravel(), strict=True)
            ),
            output_signature=(
                tf.TensorSpec((), tf.int64),
                {
                    name: tf.TensorSpec(array.shape[1:], array.dtype)
                    for name, array in by_key.items()
                },
            ),
        )
        dataset = _map_images(dataset, host_augment, _epoch_seeds(seed, epoch))
        yield from host_batches(dataset, len(here))

    forms = forms_of(arrays)
    if host_augment is not None:
        tf = tensorflow()
        stored = tf.TensorSpec(by_key["image"].shape[1:], tf.uint8)
        forms["image"] = _image_form(host_augment, stored)
    read_from = _endless(read_epoch, count_steps(size, batch_size))
    return StreamingPipeline(read_from, size, batch_size, forms, sharding=sharding, rows=here)


def stream_tfds(
    name: str,
    split: str,
    batch_size: int,
    *,
    seed: int,
    data_dir: str | os.PathLike | None = None,
    image_size: tuple[int, int] | None = None,
    fit: str = "pad",
    smallest_area: float = 0.0,
    host_augment: HostAugment | None = None,
    shuffle_buffer: int = 50_000,
    sharding: jax.sharding.Sharding | None = None,
    rows: np.ndarray | None = None,
) -> StreamingPipeline:
    """Streams a prepared tfds dataset from disk.

    Each epoch is reshuffled: its files, and the still encoded examples within a buffer. The
    order does not depend on the number of processes: each passes over the whole split, but decodes
    and augments, which is most of the work, only the examples of its own devices. A start in
    mid-epoch passes over the examples of the steps before without decoding them.

    Args:
      name: as tfds writes it, with configuration and version.
      split: a tfds split with slices, such as `train[:90%]`.
      batch_size: examples in a batch, over all processes.
      seed: determines the order and the augmentation.
      data_dir: where prepared datasets are; `$TFDS_DATA_DIR` or `~/tensorflow_datasets` by default.
      image_size: (height, width) of the batches' images; needed where they differ in size.
      fit: `"pad"`, `"resize"` or `"crop"`: see `cnnjax.data.image_files.fit_image`.
      smallest_area: of each image a random part of at least this fraction of its area, stretched to
        `image_size`: see `cnnjax.data.decoding.random_crop_decoder`. 0 takes the whole, by
        `fit`.
      host_augment: `(image, seed) -> image` of TensorFlow operations on one uint8 image as stored
        (or its random part), before it is fitted to `image_size`. `seed` is an int64 tensor `[2]`
        for `tf.image.stateless_random_*`, a function of the pipeline's seed, the epoch and the
        example's place in it.
      shuffle_buffer: the number of examples shuffled at a time.
      sharding: how a batch is spread over devices, along its first axis; None for the default
        device.
      rows: the positions in a batch of the examples that are read here; by default those that
        `sharding` puts on this process's devices. Without a sharding batches hold only these.

    Raises:
      UserError: at once for datasets not prepared or not for image classification, splits that do
        not exist, and batches that are larger than the split or do not divide.
    """
    builder = _checked_builder(name, data_dir, image_size, fit)
    num_stored = split_size(builder, split)
    steps_per_epoch = count_steps(num_stored, batch_size)
    num_used = steps_per_epoch * batch_size
    check_divides(batch_size, sharding)
    here = local_rows(batch_size, sharding) if rows is None else rows

    def read_epoch(epoch: int, skip: int) -> Iterator[HostBatch]:
        seeds = _epoch_seeds(seed, epoch)
        dataset = _encoded(builder, split, shuffle_seed=seeds[0])
        dataset = dataset.shuffle(shuffle_buffer, seed=seeds[1])
        dataset = dataset.take(num_used).skip(skip * batch_size)
        transform = decoder(_image_feature(builder), image_size, fit, host_augment, smallest_area)
        dataset = _at_rows(dataset.enumerate(skip * batch_size), here, batch_size)
        dataset = _map_images(dataset, transform, seeds)
        yield from host_batches(dataset, len(here))

    form: tuple[tuple[int, ...], np.dtype] = image_shape(builder, image_size), np.dtype(np.uint8)
    if host_augment is not None:
        transform = decoder(_image_feature(builder), image_size, fit, host_augment, smallest_area)
        form = _image_form(transform, tensorflow().TensorSpec((), tensorflow().string))
    return StreamingPipeline(
        _endless(read_epoch, steps_per_epoch),
        num_stored,
        batch_size,
        image_forms(*form),
        sharding=sharding,
        rows=here,
    )


def stream_tfds_evaluation(
    name: str,
    split: str,
    batch_size: int,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: tuple[int, int] | None = None,
    fit: str = "pad",
    sharding: jax.sharding.Sharding | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields every example of a split exactly once, in order; the last batch is padded and masked.

    All processes yield the same number of batches. Arguments and errors as for `stream_tfds`; the
    batch grows to the next size that divides among the devices.
    """
    batch_size = padded_size(batch_size, sharding)
    here = local_rows(batch_size, sharding) if rows is None else rows
    builder = _checked_builder(name, data_dir, image_size, fit)
    num_batches = -(-split_size(builder, split) // batch_size)

    def read() -> Iterator[Batch]:
        dataset = _encoded(builder, split, shuffle_seed=None)
        dataset = _at_rows(dataset.enumerate(), here, batch_size)
        dataset = _map_images(
            dataset, decoder(_image_feature(builder), image_size, fit, None), (0, 0)
        )
        empty: HostBatch = {
            "image": np.zeros((0, *image_shape(builder, image_size)), np.uint8),
            "label": np.zeros(0, np.int32),
        }
        parts = host_batches(dataset, len(here), drop_remainder=False)
        # A process may have nothing of the last batch.
        for _ in range(num_batches):
            part = next(parts, empty)
            unmasked = {"image": part["image"], "label": part["label"]}
            yield place_local(pad_and_mask(unmasked, len(here)), sharding, here, batch_size)

    return prefetch(read())


def _epoch_seeds(seed: int, epoch: int) -> tuple[int, int]:
    first, second = numpy_generator(seed, "stream", epoch, 0).integers(2**31, size=2)
    return int(first), int(second)


def _checked_builder(
    name: str, data_dir: str | os.PathLike | None, image_size: tuple[int, int] | None, fit: str
) -> Any:
    parse_fit(fit)
    builder = prepared_builder(name, data_dir)
    image_shape(builder, image_size)
    return builder


def _encoded(builder: Any, split: str, *, shuffle_seed: int | None) -> Any:
    """A split as a tf.data dataset: encoded `image`, int32 `label`.

    With a seed the files are interleaved in an order drawn from it, else everything is in order.
    """
    tf = tensorflow()
    import tensorflow_datasets as tfds

    keys = image_features(builder)
    options = tf.data.Options()
    options.deterministic = True
    is_shuffled = shuffle_seed is not None
    dataset = builder.as_dataset(
        split=split,
        shuffle_files=is_shuffled,
        decoders={keys.image: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(
            options=options,
            shuffle_seed=shuffle_seed,
            interleave_cycle_length=16 if is_shuffled else 1,
            # Shuffling a dataset that is stored in order is meant.
            enable_ordering_guard=False,
            try_autocache=False,
            skip_prefetch=True,
        ),
    )
    return dataset.map(
        lambda example: {
            "image": example[keys.image],
            "label": tf.cast(example[keys.label], tf.int32),
        }
    )


def _image_feature(builder: Any) -> Any:
    return builder.info.features[image_features(builder).image]


def _at_rows(dataset: Any, rows: np.ndarray, batch_size: int) -> Any:
    """Keeps, of examples with their positions, those at these positions of each batch."""
    if len(rows) == batch_size:
        return dataset
    tf = tensorflow()
    is_here = tf.constant(np.isin(np.arange(batch_size), rows))
    return dataset.filter(lambda position, example: tf.gather(is_here, position % batch_size))


def _image_form(transform: HostAugment, image: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of what `transform` makes of an image, without making it."""
    tf = tensorflow()
    traced = tf.function(transform, autograph=False)
    result = traced.get_concrete_function(image, tf.TensorSpec((2,), tf.int64)).structured_outputs
    if not result.shape.is_fully_defined():
        raise UserError(
            f"host_augment returns images of unknown shape {result.shape}: end it with "
            "tf.ensure_shape(image, [height, width, channels])"
        )
    return tuple(result.shape), np.dtype(result.dtype.as_numpy_dtype)


def _map_images(dataset: Any, transform: HostAugment, seeds: tuple[int, int]) -> Any:
    """Applies `transform` to each image of (position, example), with a seed of its own, in order.

    The positions are those in the epoch; the work is done in parallel.
    """
    tf = tensorflow()

    # AutoGraph would only warn about what it cannot convert: there is nothing to convert.
    @tf.autograph.experimental.do_not_convert
    def transformed(position: Any, example: dict[str, Any]) -> dict[str, Any]:
        # Two constants and a position make two words: no other epoch has both.
        seed = tf.stack([tf.constant(seeds[0], tf.int64) * 2**31 + seeds[1], position])
        return example | {"image": transform(example["image"], seed)}

    return dataset.map(transformed, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def host_batches(
    dataset: Any, batch_size: int, *, drop_remainder: bool = True
) -> Generator[HostBatch, None, None]:
    """Yields the examples of a tf.data dataset as batches of NumPy arrays, all unmasked."""
    keep_freed_memory()
    batched = dataset.batch(batch_size, drop_remainder=drop_remainder).prefetch(BATCHES_AHEAD)
    for batch in batched.as_numpy_iterator():
        yield _with_mask(batch)


def _with_mask(batch: HostBatch) -> HostBatch:
    return batch | {"mask": np.ones(num_examples(batch), bool)}
