"""What few labels suffice for on features that are there, beside the same network from scratch.

The features are those that enter a network's head, such as those of an encoder trained without
labels. A way is compared over seeds, each of which chooses the labeled images, draws what is new
and shuffles; all ways get the same images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax import models
from cnnjax.data.batches import evaluation_batches
from cnnjax.data.dataset import Dataset, few_labels
from cnnjax.evaluation.probe import linear_probe
from cnnjax.finetune.base import Base
from cnnjax.run.load import TrainedModel, computation
from cnnjax.studies import tables, trials
from cnnjax.tasks.classification import classification
from cnnjax.train.predict import make_eval_step

EVALUATION_BATCH = 500
# What trains the network itself: (way of `trials`, whether images are augmented, learning rate).
TRAINED = {
    "from scratch": ("scratch", False, 3e-3),
    "from scratch, augmented": ("scratch", True, 3e-3),
    "fine-tuned, augmented": ("full", True, 1e-3),
}
PROBE = "linear probe"
WAYS = (PROBE, *TRAINED)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each training from scratch or fine-tuning gets.

    Attributes:
      steps: updates of Adam, with a cosine schedule after a tenth of warm-up.
      batch_size: images a step, if there are so many.
      augment: see `cnnjax.augment.make_augment`.
    """

    steps: int
    batch_size: int
    augment: Callable[..., Any] | None = None


def frozen_features(trained: TrainedModel) -> Callable[[np.ndarray], np.ndarray]:
    """Returns `images [examples, height, width, channels] -> [examples, features]`, compiled."""

    @jax.jit
    def features(variables: Any, image: jax.Array) -> jax.Array:
        found = dataclasses.replace(trained, variables=variables).features(image)
        return found.reshape(len(image), -1)

    def of_all(images: np.ndarray) -> np.ndarray:
        batches = evaluation_batches({"image": images}, EVALUATION_BATCH)
        parts = [features(trained.variables, batch["image"]) for batch in batches]
        return np.concatenate(jax.device_get(parts))[: len(images)]

    return of_all


def compare(
    trained: TrainedModel,
    base: Base,
    dataset: Dataset,
    budget: Budget,
    *,
    labels: int,
    seeds: Sequence[int],
    ways: Sequence[str] = WAYS,
) -> Iterator[tuple[str, list[float]]]:
    """Yields each way and its test accuracies, one a seed.

    Args:
      trained: the network whose features are probed.
      base: its variables, as `cnnjax.run.load.read_base` returns them.
      dataset: in memory; few of its training labels are used.
      budget: of what is trained.
      labels: images of each class.
      seeds: see the top.
      ways: some of `WAYS`.
    """
    few = {seed: few_labels(dataset, labels, seed=seed).train for seed in seeds}
    for way in ways:
        if way == PROBE:
            features = frozen_features(trained)
            test = features(dataset.test.image)
            yield (
                way,
                [
                    _accuracy(linear_probe(features(each.image), each.label)(test), dataset)
                    for each in few.values()
                ],
            )
        else:
            yield way, _trained(way, trained, base, dataset, budget, few)


def _accuracy(predicted: np.ndarray, dataset: Dataset) -> float:
    return float(np.mean(predicted == dataset.test.label))


def _trained(
    way: str,
    trained: TrainedModel,
    base: Base,
    dataset: Dataset,
    budget: Budget,
    few: dict[int, Any],
) -> list[float]:
    """Returns the test accuracies of networks that are trained on the few images."""
    name, augmented, learning_rate = TRAINED[way]
    card = trained.card
    fields = computation(card["model"], card["arguments"], precision=card.get("precision"))
    model = models.create(card["model"], num_classes=dataset.num_classes, **fields)
    prepared = trials.prepare(
        trials.find_way(name),
        model,
        dataset.image_shape,
        trials.loader(base, model, dataset.image_shape),
        num_steps=budget.steps,
        normalize=trained.normalize,
        augment=budget.augment if augmented else None,
    )
    program = trials.Program(prepared, next(iter(few.values())), budget.batch_size)
    task = classification(dataset.num_classes)
    evaluate = jax.jit(make_eval_step(prepared.tuned, task, normalize=trained.normalize))  # type: ignore[arg-type]
    accuracies = []
    for seed, arrays in few.items():
        _, variables, _ = program(arrays, seed, learning_rate)
        batches = evaluation_batches(dataset.test, EVALUATION_BATCH)
        accuracies.append(trials.accuracy(evaluate, variables, batches))
    return accuracies


def markdown(found: dict[str, list[float]], *, labels: int, test_examples: int) -> str:
    """Sets the accuracies as a table: means with halves of their 95% intervals."""
    rows = []
    for way, accuracies in found.items():
        mean, half = tables.mean_interval(accuracies)
        shown = [f"{100 * value:.2f}" for value in (min(accuracies), max(accuracies))]
        rows.append([way, f"{100 * mean:.2f} ± {100 * half:.2f}", *shown])
    seeds = max(map(len, found.values()))
    return (
        f"Test accuracy in % on {test_examples:,} images, with {labels} labels of each class (mean "
        f"± half of the 95% interval over {seeds} seeds):\n\n"
        + tables.table(["", "accuracy", "worst", "best"], rows)
    )
