"""What two classifiers say of the same examples, and which runs are pairs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import again, classifier, load, record
from cnnjax.studies import evaluated

# Settings that say where and how a run was started, and not what it is.
OF_NO_INTEREST = record.WHERE | {"seed"}
# What `open_data` makes the splits of.
OF_DATA = (
    *("dataset", "data_dir", "classes", "validation", "fold", "stratify", "drop_duplicates"),
    *("fit", "pipeline"),
)


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a classifier says of a split.

    Attributes:
      label: true classes `[examples]`.
      log_probabilities: `[examples, classes]`.
    """

    label: np.ndarray
    log_probabilities: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Which examples it gets right: bool `[examples]`."""
        return self.log_probabilities.argmax(axis=-1) == self.label

    @property
    def losses(self) -> np.ndarray:
        """The cross-entropy of each example, in nats: `[examples]`."""
        return -self.log_probabilities[np.arange(len(self.label)), self.label]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the examples of a comparison are.

    Attributes:
      split: `validation` or `test`.
      dataset, data_dir: where the data of the runs are now; "" for where they were.
      base: likewise the base of fine-tuned runs.
      smoke: whether only as many examples as a smoke run has are taken.
    """

    split: str
    dataset: str = ""
    data_dir: str = ""
    base: str = ""
    smoke: bool = False


def pairs_by_seed(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the runs of two settings in pairs of the same seed, by seed.

    Args:
      first, second: the runs of each setting; one of each is a pair, whatever its seeds.

    Raises:
      UserError: a run is given twice, a seed is twice in a set, or only in one of them.
    """
    others = {Path(each).resolve() for each in second}
    for directory in first:
        if Path(directory).resolve() in others:
            raise UserError(f"{directory} stands on both sides: compare it with another run")
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    ours, theirs = _by_seed(first), _by_seed(second)
    for one, other, flag in ((ours, theirs, "--against"), (theirs, ours, "--run")):
        if alone := sorted(set(one) - set(other)):
            raise UserError(
                f"seed {alone[0]} ({one[alone[0]]}) has no partner among {flag}: pairs have the "
                "same --seed; train it with both settings, or leave the run out"
            )
    return [(ours[seed], theirs[seed]) for seed in sorted(ours)]


def seed_of(directory: Path | str) -> int:
    """Returns the seed of a run."""
    return int(record.read_settings(Path(directory)).get("seed", 0))


def _by_seed(runs: Sequence[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for directory in runs:
        seed = seed_of(directory)
        if seed in found:
            raise UserError(
                f"{found[seed]} and {directory} both have seed {seed}: give one run for each seed"
            )
        found[seed] = directory
    return found


def settings_that_differ(first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Returns the settings of two runs that are not the same, but for seed and places."""
    one, other = (record.read_settings(Path(each)) for each in (first, second))
    names = [name for name in {**one, **other} if name not in OF_NO_INTEREST]
    pairs = {name: (one.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_pair(first: str, second: str, place: Place) -> None:
    """Raises UserError unless both are classifiers of the same examples; nothing is predicted."""
    cards = [_card(each) for each in (first, second)]
    settings = [again.settings_of_run(each) for each in (first, second)]
    if cards[0]["class_names"] != cards[1]["class_names"]:
        raise UserError(
            f"{first} ({settings[0].dataset}) and {second} ({settings[1].dataset}) have different "
            "classes: compare runs of the same data"
        )
    if not place.dataset and _data_settings(first, cards[0]) == _data_settings(second, cards[1]):
        return
    one, other = (
        open_data(each, card, place) for each, card in zip((first, second), cards, strict=True)
    )
    if not all(hasattr(getattr(each, place.split, None), "label") for each in (one, other)):
        # Streamed from disk: which examples they are is known by the settings alone.
        if place.split == "validation" or settings[0].dataset != settings[1].dataset:
            raise _differ(first, second, place.split, settings)
        return
    a, b = (getattr(each, place.split) for each in (one, other))
    same = np.array_equal(a.label, b.label)
    if not same or (a.image.shape == b.image.shape and not np.array_equal(a.image, b.image)):
        raise _differ(first, second, place.split, settings)


def _differ(first: str, second: str, split: str, settings: Sequence[Any]) -> UserError:
    named = [f"{run} ({each.dataset})" for run, each in zip((first, second), settings, strict=True)]
    if split == "validation" and settings[0].dataset == settings[1].dataset:
        return UserError(
            f"{first} and {second} hold out different validation images, so that one was trained "
            "on what the other is judged by: train them with the same --data-seed and "
            "--validation, or give --split test"
        )
    return UserError(
        f"the {split} images of {' and '.join(named)} are not the same: compare runs of the same "
        "data, or name the images to judge both by with --dataset"
    )


def _card(directory: str) -> Mapping[str, Any]:
    if (task := load.task_of(directory)) != "classification":
        raise UserError(
            f"{directory} is a run of the task {task}, whose examples are not right or wrong: "
            "compare recorded scores over seeds, by two runs or more on each side"
        )
    return load.read_json(Path(directory) / "model.json", f"{directory} is damaged")


def _data_settings(directory: str, card: Mapping[str, Any]) -> list[Any]:
    settings = again.settings_of_run(directory)
    return [
        classifier.data_seed(settings),
        card["image_shape"],
        *(getattr(settings, name) for name in OF_DATA),
    ]


def open_data(directory: str, card: Mapping[str, Any], place: Place) -> Any:
    """Opens the data of a run; a UserError where it has no such split."""
    config = argparse.Namespace(
        **dataclasses.asdict(place), calibrate=False, full=False, corrupt=""
    )
    dataset = evaluated.open_data(config, [directory], [card])
    if not cnnjax.data.split_size(dataset, place.split):
        other = "test" if place.split == "validation" else "validation"
        raise UserError(f"{directory} has no {place.split} images: give --split {other}")
    return dataset


def answers(directory: str, place: Place) -> tuple[Answers, Any]:
    """Has a run classify a split; returns its answers and the dataset.

    Args:
      directory: of the run.
      place: which examples.

    Raises:
      UserError: it is no run of a classifier, its checkpoints or its data are not there.
    """
    trained = load.load_classifier(directory, base=load.base_if_tuned(directory, place.base))
    dataset = open_data(directory, trained.card, place)
    logits_of = cnnjax.evaluation.ensemble.model_logits(trained.model, trained.normalize)
    found, label = evaluated.predict([logits_of], [trained.variables], dataset, place.split)
    return Answers(np.asarray(label), np.asarray(found[0], np.float64)), dataset


def compare(first: Answers, second: Answers, *, seed: int = 0) -> dict[str, Any]:
    """Compares two classifiers on the same examples.

    Returns:
      `examples`; `accuracy` and `loss` of both, the difference (second minus first) and its 95%
      interval, by the bootstrap over examples; how many only the first or the second gets right,
      and `p_value` of McNemar's exact test.
    """
    comparison = cnnjax.evaluation.comparison
    found: dict[str, Any] = {"examples": len(first.label)}
    for name, one, other in (
        ("accuracy", first.right.astype(np.float64), second.right.astype(np.float64)),
        ("loss", first.losses, second.losses),
    ):
        found[name] = {
            "first": float(one.mean()),
            "second": float(other.mean()),
            "difference": float((other - one).mean()),
            "interval": list(comparison.bootstrap_interval(other - one, seed=seed)),
        }
    return found | {
        "only_first_right": int((first.right & ~second.right).sum()),
        "only_second_right": int((~first.right & second.right).sum()),
        "p_value": comparison.mcnemar(first.right, second.right),
    }


def recorded_scores(
    pairs: Sequence[tuple[str, str]], split: str
) -> tuple[str, list[tuple[float, float]]]:
    """Returns what runs of any task recorded of the score that they monitor, pair by pair.

    Raises:
      UserError: a run is not finished, or was not scored so, or they monitor different scores.
    """
    summaries = [[_summary(each) for each in pair] for pair in pairs]
    names = {summary["monitor"]: None for pair in summaries for summary in pair}
    if len(names) > 1:
        raise UserError(f"these runs monitor different scores: {', '.join(names)}")
    name = next(iter(names))
    key = f"best_validation_{name}" if split == "validation" else f"test_{name}"
    for pair, found in zip(pairs, summaries, strict=True):
        for directory, summary in zip(pair, found, strict=True):
            if summary.get(key) is None:
                raise UserError(f"{directory} has no {key} in its summary.json")
    return name, [(float(one[key]), float(other[key])) for one, other in summaries]


def _summary(directory: str) -> Mapping[str, Any]:
    return load.read_json(Path(directory) / record.SUMMARY, f"{directory} is not finished")
