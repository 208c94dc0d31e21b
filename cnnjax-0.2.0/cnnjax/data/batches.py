"""A batch from the host to its devices: padding, mask, and which process holds what."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from cnnjax.data.dataset import Split, columns, num_examples
from cnnjax.errors import UserError

Batch = dict[str, jax.Array]
HostBatch = dict[str, np.ndarray]
T = TypeVar("T")
BATCHES_AHEAD = 2
_ALIGNMENT_BYTES = 64


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


def replicate(batch: HostBatch, sharding: jax.sharding.Sharding | None) -> Batch:
    """Puts whole arrays on each device; the devices of one CPU share a single copy."""
    devices: list[Any] = [] if sharding is None else list(sharding.addressable_devices)
    if len(devices) > 1 and devices[0].platform == "cpu":
        batch = {name: _aligned(array) for name, array in batch.items()}
    return place(batch, sharding)


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy where JAX's CPU devices use memory as it is: each copies what is elsewhere."""
    memory = np.empty(array.nbytes + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _place_array(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    # Unlike device_put this needs no agreement between processes: each fills its own shards.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def prefetch(items: Iterator[T], ahead: int = BATCHES_AHEAD) -> Iterator[T]:
    """Yields `items`, computed up to `ahead` in advance by a background thread.

    An exception of `items` is raised where the consumer asks for the item. The thread ends when
    the items do, when the returned generator is closed or forgotten, or with the program.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stopped.is_set() and threading.main_thread().is_alive():
            try:
                ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            # Here and now: as Python ends, what a generator holds may be gone before it.
            if isinstance(items, Generator):
                items.close()

    def consume() -> Iterator[T]:
        # Not a daemon: Python would end it within TensorFlow as it exits, which aborts the process.
        threading.Thread(target=work, name="prefetch", daemon=False).start()
        try:
            while True:
                kind, value = ready.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            stopped.set()

    return consume()
