"""Every method of fine-tuning on one pretrained base and one dataset: runs that are kept, a table.

Beside `few_label_study`, which trains its small bases itself and asks what is forgotten, this takes
a base as it is, such as converted weights. All runs of a method are one program: of few labels the
images are repeated until they are as many as of the most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax import augment, models, plots
from cnnjax.data.batches import evaluation_batches
from cnnjax.data.dataset import Arrays, Dataset, few_labels
from cnnjax.devices import environment
from cnnjax.errors import UserError
from cnnjax.finetune import defaults
from cnnjax.finetune.base import Base
from cnnjax.models.fields import fields
from cnnjax.models.summary import abstract_variables
from cnnjax.run import files
from cnnjax.studies import tables, trials
from cnnjax.tasks.classification import classification
from cnnjax.train.predict import make_eval_step
from cnnjax.trees import count_parameters

METHODS = ("scratch", "full", "last:2", "head", "norm", "bitfit", "lora:4", "adapter:16")
EVALUATION_BATCH = 64
RESULTS = "adapting.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
      methods: as `trials.find_way` takes them.
      labels: numbers of labeled images of each class.
      seeds: each chooses the images, draws what is new, and shuffles.
      steps: updates of each run, of Adam with a cosine schedule.
      batch_size: images a step.
      norm_momentum: of running statistics, which would hardly have moved in so few steps by the
        0.99 of some networks.
    """

    methods: Sequence[str] = METHODS
    labels: Sequence[int] = (5, 20)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 80
    batch_size: int = 16
    norm_momentum: float = 0.9


def compare(base: Base, dataset: Dataset, plan: Plan, directory: Path) -> str:
    """Makes the runs that are missing, then the tables and the figure; returns the tables.

    `directory` gets `adapting.json` (every run, as soon as it ends), `adapting.md`, `adapting.png`.

    Raises:
      UserError: the results that are there are of another base, dataset or budget, or a class has
        fewer images than labels are asked for.
    """
    files.make_directory(directory, "the directory of results")
    model = _model(base, dataset, plan)
    results = _read_results(base, dataset, plan, directory / RESULTS)
    wanted = [
        {"method": method, "labels": labels, "seed": seed}
        for method in plan.methods
        for labels in plan.labels
        for seed in plan.seeds
    ]
    for method in plan.methods:
        missing = [w for w in wanted if w["method"] == method and not _find(results, w)]
        runner = _runner(base, model, dataset, plan, method) if missing else None
        for trial in missing:
            assert runner is not None
            results["trials"].append(trial | runner(trial))
            files.write_json(directory / RESULTS, results)
            told = f"{method}, {trial['labels']} labels per class, seed {trial['seed']}"
            print(f"  {told}: {results['trials'][-1]['accuracy']:.2%}", flush=True)
    rows = tables.summarize(made for each in wanted if (made := _find(results, each)))
    form = abstract_variables(model, dataset.image_shape)
    text = tables.markdown(
        rows, source_accuracy=None, all_parameters=count_parameters(form["params"])
    )
    (directory / "adapting.md").write_text(text, encoding="utf-8")
    _draw(rows, directory / "adapting.png")
    return text


def _model(base: Base, dataset: Dataset, plan: Plan) -> Any:
    model = models.create(
        base.card["model"], num_classes=dataset.num_classes, **base.card["arguments"]
    )
    if "norm_momentum" not in fields(model):
        return model
    return models.with_fields(model, norm_momentum=plan.norm_momentum)


def _runner(
    base: Base, model: Any, dataset: Dataset, plan: Plan, method: str
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compiles a method; returns trial -> its results."""

    def normalize(image: jax.Array) -> jax.Array:
        order = base.card.get("channel_order", "RGB")
        return augment.normalize(image, base.card["mean"], base.card["std"], channel_order=order)

    shape = dataset.image_shape
    prepared = trials.prepare(
        trials.find_way(method),
        model,
        shape,
        trials.loader(base, model, shape),
        num_steps=plan.steps,
        normalize=normalize,
    )
    size = count_parameters(abstract_variables(model, shape)["params"])
    rate = defaults.learning_rate(method, "adam", size)
    program = trials.Program(prepared, repeated(dataset, plan, plan.labels[0], 0), plan.batch_size)
    task = classification(dataset.num_classes)
    evaluate = jax.jit(make_eval_step(prepared.tuned, task, normalize=normalize))  # type: ignore[arg-type]
    batches = list(evaluation_batches(dataset.test, EVALUATION_BATCH))
    checkpoint: list[int] = []

    def run(trial: dict[str, Any]) -> dict[str, Any]:
        few = repeated(dataset, plan, trial["labels"], trial["seed"])
        state, variables, step_secs = program(few, trial["seed"], rate)
        checkpoint[:] = checkpoint or [trials.checkpoint_bytes(state)]
        return {
            "learning_rate": rate,
            "accuracy": trials.accuracy(evaluate, variables, batches),
            "source_accuracy": None,
            "trained_parameters": count_parameters(state.params),
            "checkpoint_bytes": checkpoint[0],
            "step_secs": step_secs,
            "peak_bytes": program.peak_bytes,
        }

    return run


def repeated(dataset: Dataset, plan: Plan, labels: int, seed: int) -> Arrays:
    """Returns the few labeled images, again and again until they are as many as the most."""
    few = few_labels(dataset, labels, seed=seed).train
    rows = np.arange(max(plan.labels) * dataset.num_classes) % len(few.label)
    return Arrays(few.image[rows], few.label[rows])


def _find(results: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any] | None:
    for trial in results["trials"]:
        if all(trial[name] == value for name, value in wanted.items()):
            return trial
    return None


def _read_results(base: Base, dataset: Dataset, plan: Plan, path: Path) -> dict[str, Any]:
    same = {
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "norm_momentum": plan.norm_momentum,
        "images": max(plan.labels) * dataset.num_classes,
        "image_shape": list(dataset.image_shape),
        "base_checksum": base.checksum,
        "data_checksum": dataset.checksum,
    }
    if not path.exists():
        return {"settings": same, **environment.describe(), "trials": []}
    found = files.read_json(path, "cannot go on with the results")
    if found["settings"] != same:
        other = [name for name, value in same.items() if found["settings"].get(name) != value]
        raise UserError(
            f"{path} holds results with other {', '.join(other)}: choose another directory"
        )
    return found


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    curves: dict[str, list] = {}
    for row in rows:
        width = row["accuracy_interval"] or float("nan")
        curves.setdefault(row["method"], []).append((row["labels"], row["accuracy"], width))
    plots.attempt(lambda place: plots.accuracy_by_labels(curves, place), path)
