"""The runs of a few-label study: run where missing, kept, and summarized in tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

import cnnjax
from cnnjax import finetune
from cnnjax.data.dataset import Dataset
from cnnjax.devices import environment
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables
from cnnjax.paths import read_text
from cnnjax.run import files
from cnnjax.run.load import read_base
from cnnjax.studies import tables, trials
from cnnjax.tasks.classification import classification
from cnnjax.trees import count_parameters

if TYPE_CHECKING:
    from cnnjax.studies import few_labels

SWEEP_LABELS, SWEEP_SEEDS = 10, 3
EVALUATION_BATCH = 500
# Of a method that no sweep has tried on the task.
UNTRIED_RATE = 1e-3


class Study:
    """A base, a target, and the results that there are.

    Attributes:
      config, task: the settings.
      directory: of the run.
      base: the pretrained network.
      results: what `summary.json` (of a sweep, `sweep.json`) holds.
    """

    def __init__(
        self,
        config: few_labels.Config,
        task: few_labels.Transfer,
        directory: Path,
        source: Dataset,
        target: Dataset,
    ):
        self.config, self.task, self.directory, self.target = config, task, directory, target
        self.base = read_base(directory / "base")
        card = self.base.card
        self.model = make_model(card["model"], card["arguments"], target)
        self._source_model = make_model(card["model"], card["arguments"], source)
        self._num_source_classes = source.num_classes
        self._loaded = trials.loader(self.base, self.model, target.image_shape)
        self._batches: dict[str, list] = {}
        self._splits = {
            "source": source.test,
            "test": target.test,
            "validation": target.validation,
        }
        self.path = directory / ("sweep.json" if config.sweep else "summary.json")
        self.results = self._read_results()

    def normalize(self, image: jax.Array) -> jax.Array:
        """As the base was trained."""
        return cnnjax.augment.normalize(image, self.base.card["mean"], self.base.card["std"])

    def rate(self, method: str) -> float:
        """The learning rate of a method: given, found by the sweep, or that of its kind."""
        given = {word.rpartition("=")[0]: word.rpartition("=")[2] for word in self.config.rates}
        if method in given:
            return float(given[method])
        rates = self.task.rates
        found = {finetune.defaults.kind(name): rate for name, rate in rates.items()}
        return rates.get(method) or found.get(finetune.defaults.kind(method), UNTRIED_RATE)

    def missing(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the wanted trials that were not made yet."""
        return [trial for trial in wanted if self._find(trial) is None]

    def made(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The wanted trials with their results."""
        found = [self._find(trial) for trial in wanted]
        return [trial for trial in found if trial is not None]

    def run(self, wanted: list[dict[str, Any]], split: str) -> None:
        """Makes the trials that are missing; each is saved as soon as it is there."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for trial in self.missing(wanted):
            groups.setdefault(trial["method"], []).append(trial)
        done, total = len(wanted) - len(self.missing(wanted)), len(wanted)
        for method, group in groups.items():
            runner = self._runner(method, split)
            for trial in group:
                self.results["trials"].append(trial | runner(trial))
                files.write_json(self.path, self.results)
                done += 1
                told = f"{method}, {trial['labels']} labels per class, seed {trial['seed']}"
                print(f"{done:4d} of {total}  {told}", flush=True)

    def accuracy_before(self) -> float:
        """Of the base on its own test set."""
        eval_step = self._eval_step(self._source_model, self._num_source_classes)
        return trials.accuracy(eval_step, self.base.variables, self._device_batches("source"))

    def _runner(self, method: str, split: str) -> Callable[[dict], dict[str, Any]]:
        """Returns trial -> its results, of a method; compiles it once for each size of batch."""
        config, shape = self.config, self.target.image_shape
        way = trials.find_way(method)
        prepared = trials.prepare(
            way,
            self.model,
            shape,
            self._loaded,
            num_steps=config.steps,
            normalize=self.normalize,
            norm_statistics=config.norm_statistics,
        )
        most = max(config.labels) if not config.sweep else SWEEP_LABELS
        programs: dict[int, trials.Program] = {}
        evaluate = self._eval_step(prepared.tuned, self.target.num_classes)
        old = finetune.FineTuned(self._source_model, prepared.tuned.method)
        evaluate_old = self._eval_step(old, self._num_source_classes)
        size: list[int] = []

        def run(trial: dict[str, Any]) -> dict[str, Any]:
            seed, labels = trial["seed"], trial["labels"]
            few = cnnjax.data.few_labels(self.target, labels, seed=seed).train
            batch_size = min(config.batch_size, len(few.label))
            if batch_size not in programs:
                full = batch_size == config.batch_size
                room = max(labels, most if full else 0) * self.target.num_classes
                programs[batch_size] = trials.Program(prepared, few, batch_size, room=room)
            program = programs[batch_size]
            state, variables, step_secs = program(few, seed, trial["learning_rate"])
            size[:] = size or [trials.checkpoint_bytes(state)]
            accuracy = trials.accuracy(evaluate, variables, self._device_batches(split))
            before = None
            if config.forgetting and not way.scratch and split == "test":
                kept = trials.with_old_head(variables, self.base)
                before = trials.accuracy(evaluate_old, kept, self._device_batches("source"))
            return {
                "accuracy": accuracy,
                "source_accuracy": before,
                "trained_parameters": count_parameters(state.params),
                "checkpoint_bytes": size[0],
                "step_secs": step_secs,
                "peak_bytes": program.peak_bytes,
            }

        return run

    def _eval_step(self, model: Any, num_classes: int) -> Callable:
        """Compiles the evaluation of a model."""
        return jax.jit(
            cnnjax.train.predict.make_eval_step(
                model, classification(num_classes), normalize=self.normalize
            )
        )

    def _device_batches(self, split: str) -> list:
        if split not in self._batches:
            batches = cnnjax.data.evaluation_batches(self._splits[split], EVALUATION_BATCH)
            self._batches[split] = list(batches)
        return self._batches[split]

    def _find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        for trial in self.results["trials"]:
            if all(trial[name] == value for name, value in wanted.items()):
                return trial
        return None

    def _read_results(self) -> dict[str, Any]:
        """Returns what is there; a UserError if it was made with other settings."""
        same = {
            "task": dataclasses.asdict(self.task) | {"rates": None},
            "steps": self.config.steps,
            "batch_size": self.config.batch_size,
            "norm_statistics": self.config.norm_statistics,
            "forgetting": self.config.forgetting,
            "smoke": self.config.smoke,
            "base_checksum": self.base.checksum,
            "data_checksum": self.target.checksum,
        }
        if not self.path.exists():
            return {"settings": same, **environment.describe(), "trials": []}
        found = json.loads(read_text(self.path, "results"))
        for name, value in same.items():
            # Runs of before some setting have what is its default now.
            was = found["settings"].get(name, value)
            if was != value:
                raise UserError(
                    f"{self.path} holds results with {name} {was!r}, not {value!r}: choose another "
                    "--run-dir."
                )
        return found


def compare(study: Study) -> None:
    """Makes the trials of the comparison, its tables and its figure."""
    config, directory = study.config, study.directory
    wanted = [
        {"method": method, "labels": labels, "seed": seed, "learning_rate": study.rate(method)}
        for method in config.methods
        for labels in config.labels
        for seed in range(config.seeds)
    ]
    study.run(wanted, "test")
    rows = tables.summarize(_at_one_rate(study, wanted))
    before = study.accuracy_before()
    form = abstract_variables(study.model, study.target.image_shape)
    text = tables.markdown(
        rows,
        source_accuracy=before if config.forgetting else None,
        all_parameters=count_parameters(form["params"]),
    )
    study.results |= {"source_accuracy_before": before, "rows": rows}
    files.write_json(study.path, study.results)
    (directory / "table.md").write_text(text, encoding="utf-8")
    curves: dict[str, list] = {}
    for row in rows:
        width = row["accuracy_interval"] or float("nan")
        curves.setdefault(row["method"], []).append((row["labels"], row["accuracy"], width))
    figure = directory / "accuracy.png"
    drawn = cnnjax.plots.attempt(lambda path: cnnjax.plots.accuracy_by_labels(curves, path), figure)
    shown = f" and {figure}" if drawn else ""
    print(f"\n{text}\nsee          {directory / 'table.md'}{shown}")


def _at_one_rate(study: Study, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the wanted trials with their results, then all others of the directory.

    Of these not what was made at another learning rate than the method's of now: it is no seed of
    the same row.
    """
    first = study.made(wanted)
    return first + [
        trial
        for trial in study.results["trials"]
        if trial not in first and trial["learning_rate"] == study.rate(trial["method"])
    ]


def sweep(study: Study) -> None:
    """Makes the trials of the sweep and its table; says which rates are best."""
    labels = max(study.config.labels) if study.config.smoke else SWEEP_LABELS
    wanted = [
        {"method": method, "labels": labels, "seed": seed, "learning_rate": rate}
        for method in study.config.methods
        for rate in study.config.sweep_rates
        for seed in range(min(SWEEP_SEEDS, study.config.seeds))
    ]
    study.run(wanted, "validation")
    made = study.made(wanted)
    text = tables.sweep_markdown(made, labels)
    (study.directory / "sweep.md").write_text(text, encoding="utf-8")
    means = tables.sweep_means(made)
    best = {method: max(found, key=lambda r: found[r]) for method, found in means.items()}
    words = " ".join(f"{method}={rate:g}" for method, rate in best.items())
    print(f"\n{text}\nbest         --rates {words}\nsee          {study.directory / 'sweep.md'}")


def make_model(name: str, arguments: dict[str, Any], dataset: Dataset) -> Any:
    """Returns the network for the classes of a dataset."""
    return cnnjax.models.create(name, num_classes=dataset.num_classes, **arguments)
