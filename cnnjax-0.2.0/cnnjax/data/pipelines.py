"""Endless training batches as pure functions of (seed, step).

A batch is a dict of arrays whose first axis is the examples, of the keys that the dataset has, such
as `image [batch, height, width, channels]` as stored (uint8) and `label [batch]` int32, and always
`mask [batch]` bool (False: padding). The batch of a global step does not depend on where a
run started, so a run resumed at any step sees what it would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.data.batches import Batch, check_divides, replicate
from cnnjax.data.dataset import Split, columns, num_examples
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator


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
        self.arrays: Batch = replicate(columns(arrays), replicated)
        self.batch_shapes = batch_shapes(batch_size, forms_of(arrays), sharding)
        # A chunk of steps asks for its epoch again: drawing a million places takes milliseconds.
        self._epoch_indices = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_indices, self.num_examples, batch_size, seed)
        )
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


# Shape and dtype of one example, by key.
Forms = dict[str, tuple[tuple[int, ...], np.dtype]]


def forms_of(split: Split) -> Forms:
    """Returns the shape and dtype of one example of a split, by key."""
    return {name: (array.shape[1:], array.dtype) for name, array in columns(split).items()}


def image_forms(image_shape: tuple[int, ...], image_dtype: np.dtype) -> Forms:
    """Returns the shapes and dtypes of a labeled image."""
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
