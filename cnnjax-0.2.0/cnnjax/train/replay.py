"""What a training step saw, recomputed from (seed, step) without repeating the run."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cnnjax.augment.policy import BatchAugment
from cnnjax.data.batches import Batch
from cnnjax.data.dataset import Dataset
from cnnjax.data.streamed import StreamedDataset, training_pipeline
from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.train.predict import as_float
from cnnjax.train.state import training_key


def stored_batch(
    dataset: Dataset | StreamedDataset,
    *,
    batch_size: int,
    seed: int,
    step: int,
    stream: bool = False,
) -> Batch:
    """Returns the batch of one step as the dataset has it: `image` (uint8), `label`, `mask`.

    Args:
      dataset: what `open_dataset` returned, with the run's settings.
      batch_size, seed: the run's.
      step: the number of steps made before it; 0 is the first.
      stream: whether the run had `--pipeline stream`.
    """
    if step < 0:
        raise UserError(f"step={step}: give 0 (the first) or more")
    pipeline = training_pipeline(dataset, batch_size, seed=seed, stream=stream)
    return next(pipeline.batches(step))


def augmented_batch(batch: Batch, augment: BatchAugment | None, *, seed: int, step: int) -> Batch:
    """Returns what a training step makes of its batch, before `normalize`.

    The image at `index` is a function of (seed, step, index) and of the image stored; on any number
    of devices it is this one, up to the rounding of the compiled program.

    Args:
      batch: what `stored_batch` returned.
      augment: what `make_augment` returned for the run's policy.
      seed, step: as for `stored_batch`.

    Returns:
      The batch: `image` float32 in [0, 1]; `label` as the loss gets it, mixed where images are.
    """
    batch = {**batch, "image": as_float(batch["image"])}
    if augment is None:
        return batch
    key = stream_key(training_key(seed), "augment", step)
    return jax.jit(augment)(key, batch, jnp.int32(0))
