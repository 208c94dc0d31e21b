"""What a run leaves for `cnnjax serve`: how its validation images and its answers to them look."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnjax.data.streamed import LabeledDataset, split_batches, split_size
from cnnjax.errors import UserError
from cnnjax.evaluation import references
from cnnjax.run import load

if TYPE_CHECKING:
    from cnnjax.evaluation.drift import Reference

NAME = "reference.npz"
BATCH_SIZE, MOST_EXAMPLES = 250, 10_000

Answer = Callable[[Any], tuple[np.ndarray, np.ndarray]]


def answer_of(trained: load.TrainedModel) -> Answer:
    """Returns `images [batch, height, width, channels] -> (logits [batch, classes], embeddings
    [batch, features])`, compiled once for each batch size; embeddings are what enters the head."""
    import jax

    @jax.jit
    def answer(variables: Any, images: Any) -> tuple[Any, Any]:
        logits = trained.model.apply(variables, trained.normalize(images), train=False)
        features = load.TrainedModel(trained.model, variables, trained.card, trained.step).features
        embeddings = features(images)
        return logits, embeddings.reshape(len(embeddings), -1)

    def answered(images: Any) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = answer(trained.variables, np.asarray(images))
        return np.asarray(logits, np.float32), np.asarray(embeddings, np.float32)

    return answered


def leave_reference(
    directory: str | Path, dataset: LabeledDataset, *, window: int = references.WINDOW
) -> Reference:
    """Makes the reference of a trained classifier, of images that it was not trained on.

    Args:
      directory: of the run, which gets the file `reference.npz`.
      dataset: whose validation split is taken, at most 10,000 images of it.
      window: number of images that are compared at a time.

    Raises:
      UserError: no classifier, too few images, or the file cannot be written.
    """
    size = split_size(dataset, "validation")
    if size < references.LEAST_EXAMPLES:
        raise UserError(
            f"a reference needs {references.LEAST_EXAMPLES:,} validation images, and "
            f"{dataset.name} has {size:,}: train with a larger --validation."
        )
    trained = load.load_classifier(directory)
    answer = answer_of(trained)
    parts: list[tuple[np.ndarray, ...]] = []
    batches = split_batches(dataset, "validation", BATCH_SIZE)
    for batch in itertools.islice(batches, -(-MOST_EXAMPLES // BATCH_SIZE)):
        mask = np.asarray(batch["mask"])
        found = (batch["image"], *answer(batch["image"]), batch["label"])
        parts.append(tuple(np.asarray(each)[mask] for each in found))
    images, logits, embeddings, labels = map(np.concatenate, zip(*parts, strict=True))
    reference = references.make_reference(
        images, logits, embeddings, labels, window=window, step=trained.step
    )
    path = Path(directory) / NAME
    try:
        references.save_reference(path, reference)
    except OSError as error:
        raise UserError(f"cannot write the reference {path}: {error.strerror}") from None
    return reference
