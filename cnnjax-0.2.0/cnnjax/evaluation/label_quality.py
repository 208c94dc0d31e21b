"""Label quality: ranking suspicious labels, label noise, class balance.

Ranking: scores of which high ones point to mislabeled or odd examples, from what a network
predicts for its own training images. Networks learn what examples have in common before they learn
wrong labels by heart, so scores of a short or a regularized training tell most. Balance: weights of
the loss, or resampling. Noise: wrong labels on purpose, to test all of this with.

Everything here is NumPy on the host: `[examples]` scores, indices and labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.dataset import Arrays, Dataset, channel_moments
from cnnjax.data.streamed import AnyDataset
from cnnjax.errors import UserError, unknown_name
from cnnjax.losses import LossFunction, weighted
from cnnjax.paths import read_text
from cnnjax.rng import numpy_generator

BALANCES = ("none", "weights", "resample")


def loss_score(probabilities: Any, labels: Any) -> np.ndarray:
    """Cross-entropy of the label, `[examples]`: the small-loss criterion.

    Arpit et al. 2017, "A Closer Look at Memorization in Deep Networks", section 3.2: what is learnt
    early has a small loss early.
    """
    probabilities, labels = _checked(probabilities, labels)
    of_label = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(of_label, np.finfo(np.float64).tiny))


def margin_score(probabilities: Any, labels: Any) -> np.ndarray:
    """The largest probability of another class minus the label's, `[examples]` in [-1, 1].

    Averaged over epochs or runs it is, in probabilities and with its sign turned, the area under
    the margin of Pleiss et al. 2020, "Identifying Mislabeled Data using the Area Under the Margin
    Ranking", section 3.
    """
    probabilities, labels = _checked(probabilities, labels)
    rows = np.arange(len(labels))
    of_label = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = -np.inf
    return others.max(axis=1) - of_label


def el2n_score(probabilities: Any, labels: Any) -> np.ndarray:
    """Length of the error vector, `|p - y|_2`, `[examples]` in [0, sqrt(2)].

    Paul, Ganguli and Dziugaite 2021, "Deep Learning on a Data Diet: Finding Important Examples
    Early in Training", definition 2.2: the mean over several runs, early in training.
    """
    probabilities, labels = _checked(probabilities, labels)
    target = np.eye(probabilities.shape[1])[labels]
    return np.linalg.norm(probabilities - target, axis=1)


SCORES: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "loss": loss_score,
    "margin": margin_score,
    "el2n": el2n_score,
}


def rank(name: str, probabilities: Sequence[Any], labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ranks training examples, the most suspicious first.

    Args:
      name: a key of `SCORES`.
      probabilities: what each of one or more runs predicts, `[examples, classes]` each; scores are
        averaged over the runs.
      labels: integers `[examples]`, as trained on.

    Returns:
      (indices of the examples in falling order of their score, the score of each example).

    Raises:
      UserError: an unknown score, no run, or shapes that do not fit.
    """
    if name not in SCORES:
        raise unknown_name("score", name, SCORES)
    if not len(probabilities):
        raise UserError("no predictions to rank by: name one run at least.")
    scores = np.mean([SCORES[name](each, labels) for each in probabilities], axis=0)
    return np.argsort(-scores, kind="stable"), scores


def detection(order: Any, is_wrong: Any, *, precision: float = 0.9) -> dict[str, float]:
    """Returns how well a ranking finds what is known to be wrong.

    Args:
      order: indices `[examples]`, the most suspicious first.
      is_wrong: bool `[examples]`.
      precision: see `recall`.

    Returns:
      `recall`, the largest fraction of the wrong ones among the first n, over all n of which that
      `precision` is right; `count`, that n; `precision_at_count` and `average_precision`, the area
      under the precision-recall curve; `share`, of the wrong ones among all.

    Raises:
      UserError: nothing is wrong, or shapes that do not fit.
    """
    order, is_wrong = np.asarray(order), np.asarray(is_wrong, bool)
    if order.shape != is_wrong.shape or not is_wrong.any():
        raise UserError(
            f"a ranking of {order.shape} examples with {int(is_wrong.sum())} known to be wrong "
            "cannot be judged: give one truth value an example, some of them true."
        )
    found = np.cumsum(is_wrong[order])
    counts = np.arange(1, len(order) + 1)
    precisions, recalls = found / counts, found / is_wrong.sum()
    good = np.flatnonzero(precisions >= precision)
    last = int(good[-1]) if good.size else -1
    return {
        "recall": float(recalls[last]) if last >= 0 else 0.0,
        "count": last + 1,
        "precision_at_count": float(precisions[last]) if last >= 0 else float("nan"),
        "average_precision": float(np.sum(precisions * is_wrong[order]) / is_wrong.sum()),
        "share": float(is_wrong.mean()),
    }


def flip_labels(
    labels: Any, share: float, num_classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gives a fraction of the examples, drawn at random, another class, uniform among the others.

    Args:
      labels: integers `[examples]`.
      share: in [0, 1]; the number flipped is exactly `round(share * examples)`.
      num_classes: 2 or more.
      seed: determines which and to what.

    Returns:
      (labels int32 `[examples]`, bool `[examples]`: which were changed).
    """
    labels = np.asarray(labels, np.int32)
    if not 0 <= share <= 1:
        raise UserError(f"label noise {share} must be a share in [0, 1], such as 0.2.")
    generator = numpy_generator(seed, "label noise")
    is_flipped = np.zeros(len(labels), bool)
    is_flipped[generator.permutation(len(labels))[: round(share * len(labels))]] = True
    moved = generator.integers(1, num_classes, len(labels), dtype=np.int32)
    return np.where(is_flipped, (labels + moved) % num_classes, labels), is_flipped


def class_weights(labels: Any, num_classes: int) -> np.ndarray:
    """Returns the weight of each class with which all classes count alike, float32 `[classes]`.

    `examples / (classes present * examples of the class)`, so that the mean weight of an example is
    1; 0 for a class without examples. King and Zeng 2001, "Logistic Regression in Rare Events
    Data", section 4.2.
    """
    counts = np.bincount(np.asarray(labels), minlength=num_classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0.0).astype(np.float32)


def balanced_indices(labels: Any, seed: int) -> np.ndarray:
    """Returns indices in which each class is as frequent as the most frequent one.

    Every example is there as often as the others of its class, give or take once; which are there
    once more is drawn by the seed. Of the most frequent class each is there once.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    chosen = []
    for number in np.flatnonzero(counts):
        own = np.flatnonzero(labels == number)
        whole, rest = divmod(counts.max(), len(own))
        extra = numpy_generator(seed, "balance", int(number)).permutation(own)[:rest]
        chosen.append(np.concatenate([np.tile(own, whole), extra]))
    return np.sort(np.concatenate(chosen))


def prepare(
    dataset: Any,
    *,
    train_examples: int = 0,
    label_noise: float = 0.0,
    exclude: str | Path = "",
    balance: str = "none",
    seed: int = 0,
) -> Any:
    """Changes the training split, in this order; validation and test stay as they are.

    Args:
      dataset: what `data.open_dataset` returned; in memory, if there is anything to do.
      train_examples: number of training images to keep, drawn by the seed; 0 keeps all.
      label_noise: the fraction of training labels made wrong by `flip_labels`.
      exclude: a text file with the index of a training image on each line: these are left out.
        They count the images that are there after the two steps before.
      balance: `resample` repeats images of rare classes; `none` and `weights` leave them.
      seed: of every draw.

    Returns:
      The dataset itself where there is nothing to do.

    Raises:
      UserError: a streamed dataset, or a setting out of its range.
    """
    if balance not in BALANCES:
        raise unknown_name("balance", balance, BALANCES)
    if not (train_examples or label_noise or exclude or balance == "resample"):
        return dataset
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"{dataset.name} is streamed from disk, so its training images cannot be chosen or "
            "relabeled one by one: use --pipeline resident if they fit in memory."
        )
    image, label = dataset.train
    if train_examples:
        kept = _drawn(len(label), train_examples, seed)
        image, label = image[kept], label[kept]
    if label_noise:
        label, _ = flip_labels(label, label_noise, dataset.num_classes, seed)
    if exclude:
        kept = np.setdiff1d(np.arange(len(label)), read_indices(exclude, len(label)))
        image, label = image[kept], label[kept]
    if balance == "resample":
        kept = balanced_indices(label, seed)
        image, label = image[kept], label[kept]
    mean, std = channel_moments(image)
    return dataclasses.replace(dataset, train=Arrays(image, label), mean=mean, std=std)


def balanced_loss(balance: str, loss_fn: LossFunction, dataset: AnyDataset) -> LossFunction:
    """Returns the loss for training: weighted by class where `balance` is `weights`.

    Raises:
      UserError: of a streamed dataset, whose labels are not in memory to be counted.
    """
    if balance != "weights":
        return loss_fn
    if not isinstance(dataset, Dataset):
        raise UserError("--balance weights counts labels in memory: use --pipeline resident.")
    return weighted(loss_fn, class_weights(dataset.train.label, dataset.num_classes))


def read_indices(path: str | Path, num_examples: int) -> np.ndarray:
    """Reads indices of examples, one per line; a UserError for anything else."""
    lines = read_text(path, "list of examples").split()
    try:
        indices = np.array([int(line) for line in lines], np.int64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} must hold one whole number per line: {error}") from None
    outside = indices[(indices < 0) | (indices >= num_examples)]
    if outside.size:
        raise UserError(
            f"{path} names example {outside[0]}, but there are {num_examples} training images: it "
            "belongs to other data."
        )
    if len(np.unique(indices)) == num_examples:
        raise UserError(f"{path} names all {num_examples} training images: none would be left.")
    return indices


def _drawn(count: int, wanted: int, seed: int) -> np.ndarray:
    if not 1 <= wanted <= count:
        raise UserError(
            f"train_examples {wanted}: there are {count} training images; take 1 to {count}, or 0 "
            "for all."
        )
    return np.sort(numpy_generator(seed, "train examples").permutation(count)[:wanted])


def _checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise UserError(
            f"probabilities {list(probabilities.shape)} and labels {list(labels.shape)} do not "
            "fit: give [examples, classes] and [examples]."
        )
    return probabilities, labels
