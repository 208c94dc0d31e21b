"""Endless training batches as pure functions of (seed, step), and exact evaluation batches.

A batch is a dict of arrays whose first axis is the examples, of the keys that the dataset has, such
as `image [batch, height, width, channels]` as stored (uint8) and `label [batch]` int32, and always
`mask [batch]` bool (False: padding). The batch of a global step does not depend on where a
run started, so a run resumed at any step sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.data.dataset import Split, columns, num_examples
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

Batch = dict[str, jax.Array]
HostBatch = dict[str, np.ndarray]


class Pipeline(Protocol):
    """What training needs of its data.

    Attributes:
      batch_size: examples in a batch, over all processes.
      num_examples: examples in the split.
      steps_per_epoch: whole batches in an epoch. Each epoch is reshuffled, so the remainder
        that it leaves out differs from epoch to epoch.
      batch_shapes: a batch as `jax.ShapeDtypeStruct`s, with the sharding that it will have: enough
        to compile a step before anything is read.
    """

    batch_size: int
    num_examples: int
    steps_per_epoch: int
    batch_shapes: dict[str, jax.ShapeDtypeStruct]

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batches of the global steps `first_step`, `first_step + 1`, ... for ever."""


def gather(arrays: Batch, indices: jax.Array) -> Batch:
    """Picks a batch out of arrays in device memory; for use inside a compiled step or scan.

    Args:
      arrays: key -> `[n, ...]`.
      indices: int32 `[batch]`, each in `[0, n)`.

    Returns:
      The batch, of the arrays' dtypes, with a mask of True.
    """
    batch = {
        name: array.at[indices].get(mode="promise_in_bounds") for name, array in arrays.items()
    }
    return batch | {"mask": jnp.ones(indices.shape, bool)}


class ResidentPipeline:
    """Batches gathered on the device, from data that live there as uint8.

    The fastest pipeline, for whatever fits in device memory. The order depends on the seed, the
    number of examples and the batch size alone, never on devices or processes.

    Attributes:
      arrays: the split's, on the device or, given `replicated`, on each of them.
    """

    def __init__(
        self,
        arrays: Split,
        batch_size: int,
        *,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
        replicated: jax.sharding.Sharding | None = None,
    ):
        """Moves the data to the device.

        Args:
          arrays: the training split.
          batch_size: examples in a batch, over all devices.
          seed: determines the order.
          sharding: how a batch is spread over devices, along its first axis; None for the default
            device.
          replicated: puts the data on each device of the mesh; needed when `sharding` is given.

        Raises:
          UserError: when a batch is larger than the data or does not divide among the devices.
        """
        if sharding is not None and replicated is None:
            raise UserError("a sharded batch needs the data on every device: give replicated too")
        self.batch_size = batch_size
        self.num_examples = num_examples(arrays)
        self.steps_per_epoch = count_steps(self.num_examples, batch_size)
        check_divides(batch_size, sharding)
        self.arrays: Batch = {
            name: _place_array(array, replicated) for name, array in columns(arrays).items()
        }
        self.batch_shapes = batch_shapes(batch_size, forms_of(arrays), sharding)
        self._seed = seed
        self._gather = jax.jit(gather, out_shardings=sharding)

    def indices(self, first_step: int, num_steps: int) -> np.ndarray:
        """Returns int32 `[num_steps, batch_size]`: the examples of each step, in order."""
        epoch, offset = divmod(first_step, self.steps_per_epoch)
        rows = [self._epoch_indices(epoch)[offset : offset + num_steps]]
        missing = num_steps - len(rows[0])
        while missing > 0:
            epoch += 1
            rows.append(self._epoch_indices(epoch)[:missing])
            missing -= len(rows[-1])
        return np.concatenate(rows)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Yields the batches of the global steps `first_step`, `first_step + 1`, ... for ever."""
        epoch, offset = divmod(first_step, self.steps_per_epoch)
        while True:
            for indices in self._epoch_indices(epoch)[offset:]:
                yield self._gather(self.arrays, indices)
            epoch, offset = epoch + 1, 0

    def _epoch_indices(self, epoch: int) -> np.ndarray:
        return epoch_indices(self.num_examples, self.batch_size, self._seed, epoch)


# Shape and dtype of one example, by key.
Forms = dict[str, tuple[tuple[int, ...], np.dtype]]


def forms_of(split: Split) -> Forms:
    """Returns the shape and dtype of one example of a split, by key."""
    return {name: (array.shape[1:], array.dtype) for name, array in columns(split).items()}


def image_forms(image_shape: tuple[int, ...], image_dtype: np.dtype) -> Forms:
    """Returns the shapes and dtypes of a labelled image."""
    return {"image": (image_shape, image_dtype), "label": ((), np.dtype(np.int32))}


def batch_shapes(
    batch_size: int, forms: Forms, sharding: jax.sharding.Sharding | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a whole batch of such examples, with its mask, as `jax.ShapeDtypeStruct`s."""
    masked: Forms = {**forms, "mask": ((), np.dtype(np.bool_))}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in masked.items()
    }


def epoch_indices(num_examples: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns int32 `[steps, batch_size]`: a fresh permutation of the examples, in batches."""
    order = numpy_generator(seed, "shuffle", epoch).permutation(num_examples)
    num_steps = num_examples // batch_size
    return order[: num_steps * batch_size].reshape(num_steps, batch_size).astype(np.int32)


def count_steps(num_examples: int, batch_size: int) -> int:
    """Whole batches in `num_examples`; UserError if there is none."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: give a positive number")
    if batch_size > num_examples:
        raise UserError(
            f"batch_size={batch_size} is larger than the {num_examples} training images: give "
            f"{num_examples} or less"
        )
    return num_examples // batch_size


def check_divides(batch_size: int, sharding: jax.sharding.Sharding | None) -> None:
    """Raises UserError unless a batch divides evenly among the devices it is spread over."""
    if sharding is None:
        return
    try:
        sharding.shard_shape((batch_size,))
    except ValueError as error:
        raise UserError(
            f"batch_size={batch_size} does not divide evenly among {sharding.num_devices} devices: "
            f"give a multiple of {sharding.num_devices}"
        ) from error


def evaluation_batches(
    arrays: Split, batch_size: int, *, sharding: jax.sharding.Sharding | None = None
) -> Iterator[Batch]:
    """Yields every example exactly once, in order; the last batch is padded and masked.

    Args:
      arrays: the split.
      batch_size: examples in a batch, over all devices; it need not divide anything.
      sharding: how a batch is spread over devices, along its first axis; None for the default one.
        Where the devices do not divide the batch, the batch grows to the next multiple of them.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: give a positive number")
    batch_size = padded_size(batch_size, sharding)
    by_key = columns(arrays)
    for start in range(0, num_examples(arrays), batch_size):
        chunk = {name: array[start : start + batch_size] for name, array in by_key.items()}
        yield place(pad_and_mask(chunk, batch_size), sharding)


def padded_size(batch_size: int, sharding: jax.sharding.Sharding | None) -> int:
    """The smallest batch of at least `batch_size` that divides among the devices of `sharding`."""
    if sharding is None:
        return batch_size
    while True:
        try:
            sharding.shard_shape((batch_size,))
        except ValueError:
            batch_size += 1
        else:
            return batch_size


def local_rows(batch_size: int, sharding: jax.sharding.Sharding | None) -> np.ndarray:
    """Positions in a batch of the examples that this process's devices hold, in rising order."""
    if sharding is None or sharding.is_fully_addressable:
        return np.arange(batch_size)
    shards = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[shard] for shard in shards]))


def place_local(
    batch: HostBatch, sharding: jax.sharding.Sharding | None, rows: np.ndarray, batch_size: int
) -> Batch:
    """Moves this process's part of a batch to its devices.

    Args:
      batch: the examples at the positions `rows` of the whole batch.
      sharding: how the whole batch is spread over devices; None puts the part on the default one.
      rows: rising positions, at least those that `local_rows` names.
      batch_size: examples in the whole batch.

    Returns:
      The whole batch, or the part where there is no sharding.
    """
    if sharding is None:
        return jax.device_put(batch)

    def placed(array: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return array[first : first + stop - start][(slice(None), *index[1:])]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, shard)

    return {name: placed(array) for name, array in batch.items()}


def pad_and_mask(batch: HostBatch, size: int) -> HostBatch:
    """Pads every key with zeros to `size` examples; `mask` tells the real ones."""
    count = num_examples(batch)
    mask = np.arange(size) < count
    if count == size:
        return batch | {"mask": mask}
    padded = {
        name: np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
        for name, array in batch.items()
    }
    return padded | {"mask": mask}


def place(batch: HostBatch, sharding: jax.sharding.Sharding | None) -> Batch:
    """Moves a whole batch, present on every process, to the device or its shards to the devices."""
    return {name: _place_array(array, sharding) for name, array in batch.items()}


def _place_array(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    # Unlike device_put this needs no agreement between processes: each fills its own shards.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
