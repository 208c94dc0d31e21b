"""What a training step saw, recomputed from (seed, step) without repeating the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

import cnnjax
from cnnjax.augment.policy import BatchAugment
from cnnjax.data.dataset import Dataset
from cnnjax.data.pipelines import Batch
from cnnjax.data.streamed import LabelledDataset, StreamedDataset, training_pipeline
from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.run import classifier
from cnnjax.run.recipe import training_key
from cnnjax.run.settings import read_config
from cnnjax.train.step import as_float


def data_of_run(directory: Path, *, dataset: str = "", data_dir: str = "") -> LabelledDataset:
    """Returns the images that a run of a classifier was trained on, as its settings prepare them.

    Args:
      directory: of the run.
      dataset: where its data are now, such as `folder:NEW`, if not where they were.
      data_dir: where tfds datasets are now, likewise.

    Raises:
      UserError: the data are not there, or `dataset` has others than the run's.
    """
    settings = classifier.settings_of_run(directory)
    found = classifier.read_data(
        dataclasses.replace(
            settings,
            dataset=dataset or settings.dataset,
            data_dir=data_dir or settings.data_dir,
        )
    )
    recorded = read_config(directory)
    saved, same = recorded.get("data_checksum"), found
    if few := recorded["settings"].get("labels_per_class"):
        same = cnnjax.data.few_labels(found, few, seed=settings.seed)  # type: ignore[arg-type]
    if dataset and saved and same.checksum != saved:
        raise UserError(
            f"the data of --dataset {dataset} are not those of {directory} (checksum "
            f"{same.checksum[:12]}, the run's {saved[:12]}): name where the run's own are now."
        )
    return found


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
