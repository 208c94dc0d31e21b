"""The data of trained classifiers, opened again, and what the classifiers say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import cnnjax
from cnnjax.augment.filters import Filter, filter_images
from cnnjax.data.dataset import Arrays
from cnnjax.errors import UserError
from cnnjax.evaluation.ensemble import ModelLogits
from cnnjax.run import again, classifier
from cnnjax.train.predict import as_float

BATCH_SIZE = 500


def open_data(config: Any, directories: Sequence[str], cards: Sequence[Mapping[str, Any]]) -> Any:
    """Opens the first run's dataset, or the one asked for; all members must fit it.

    Args:
      config: of `cnnjax evaluate`.
      directories: of the runs.
      cards: their `model.json`.

    Raises:
      UserError: no run, a dataset that does not fit all runs, or that is not there.
    """
    if not directories:
        raise UserError("no run given: name one, such as --run runs/mine, or give --weights.")
    if not config.dataset:
        again.check_data_known(directories[0])
    settings = [again.settings_of_run(directory) for directory in directories]
    first = settings[0]
    dataset = cnnjax.data.open_dataset(
        config.dataset or first.dataset,
        pipeline=first.pipeline,
        data_dir=config.data_dir or first.data_dir or None,
        classes=first.classes,
        validation=first.validation,
        seed=classifier.data_seed(first),
        image_size=tuple(cards[0]["image_shape"][:2]),
        fit=first.fit,
        fold=first.fold,
        stratify=first.stratify,
        drop_duplicates=first.drop_duplicates and not config.dataset,
    )
    classifier.tell_notes(dataset)
    for directory, card in zip(directories, cards, strict=True):
        if list(dataset.class_names) != card["class_names"]:
            raise UserError(
                f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {directory} "
                f"was trained on {', '.join(card['class_names'])}: choose a dataset with the same "
                "ones."
            )
        if list(dataset.image_shape) != card["image_shape"]:
            raise UserError(
                f"{dataset.name} has images of {dataset.image_shape}, but {directory} takes "
                f"{tuple(card['image_shape'])}: choose a dataset with images of that shape."
            )
    held_out = {
        (each.dataset, each.validation, each.stratify, classifier.data_seed(each))
        for each in settings
    }
    if len(held_out) > 1 and (config.calibrate or config.full or config.split == "validation"):
        raise UserError(
            "these runs hold out different validation images, so that one was trained on what "
            "another is validated on: train them with the same --data-seed, or leave out "
            "--calibrate and --full, and use --split test."
        )
    if config.smoke:
        dataset = cnnjax.run.trainer.shrink(dataset)
    return _corrupted(dataset, config)


def _corrupted(dataset: Any, config: Any) -> Any:
    """Changes the images of the split that is evaluated, each by its own draw."""
    if not config.corrupt:
        return dataset
    change: Any = cnnjax.augment.make_augment(config.corrupt, num_classes=dataset.num_classes)
    if cnnjax.augment.policy.parse_policy(config.corrupt).mixing:
        raise UserError(f"--corrupt {config.corrupt}: mixed images have no label to evaluate.")
    if isinstance(dataset, cnnjax.data.StreamedDataset):
        raise UserError(f"--corrupt: {dataset.name} is streamed; use a dataset that fits memory.")
    image, label = getattr(dataset, config.split)
    key = cnnjax.rng.stream_key(config.seed, "corrupt", 0)
    changed = np.empty_like(image)
    for start in range(0, len(image), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        batch = change(key, {"image": image[rows] / np.float32(255)}, start)
        changed[rows] = np.round(255 * np.clip(batch["image"], 0, 1))
    return dataclasses.replace(dataset, **{config.split: Arrays(changed, label)})


def filtered(
    normalize: Callable[[Any], jax.Array], image_filter: Filter | None
) -> Callable[[Any], jax.Array]:
    """Returns `normalize` of stored images that are filtered first."""
    return lambda image: normalize(filter_images(as_float(image), image_filter))


def predict(
    logits_of: Sequence[ModelLogits], variables: Sequence[Any], dataset: Any, split: str
) -> tuple[Any, Any]:
    """Returns log probabilities `[members, examples, classes]` and the labels.

    Args:
      logits_of: of each member.
      variables: of each member.
      dataset: of `open_data`.
      split: of it.
    """
    mesh = cnnjax.devices.sharding.make_mesh(1)
    each = []
    for function, own in zip(logits_of, variables, strict=True):
        step = cnnjax.train.evaluate.compile_predict(
            cnnjax.evaluation.ensemble.log_probabilities(function), mesh
        )
        batches = cnnjax.data.split_batches(dataset, split, BATCH_SIZE)
        logits, kept = cnnjax.train.evaluate.predict_all(step, own, batches)
        each.append(logits)
    return np.stack(each), kept["label"]
