"""The end of a run: its scores on the test set, its figures, its summary."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cnnjax import checkpoint, metrics
from cnnjax.data.batches import Batch
from cnnjax.data.streamed import AnyDataset, example_inputs, split_batches, split_size
from cnnjax.devices import backend, processes
from cnnjax.devices.sharding import batch_sharding
from cnnjax.errors import unknown_name
from cnnjax.run import load, report, settings
from cnnjax.run.logs import MetricsLog
from cnnjax.run.recipe import Recipe
from cnnjax.train import evaluate, loop
from cnnjax.train.evaluate import compile_predict
from cnnjax.train.predict import EvalStep, make_predict
from cnnjax.train.state import TrainState
from cnnjax.trees import count_parameters

PyTree = Any
EVALUATION_BATCH = 512
# Scores that are minimized, besides those that tasks name.
MINIMIZED = ("loss",)


def finish(
    config: settings.Run,
    experiment: str,
    recipe: Recipe,
    outcome: loop.Outcome,
    variables_of: Callable[[TrainState], PyTree],
    eval_step: EvalStep,
    mesh: Mesh,
    elapsed: Callable[[], float],
) -> None:
    """Tests the trained model, writes figures and summary, and says where they are."""
    directory, dataset, state = Path(config.run_dir), recipe.dataset, outcome.state
    best = outcome.best
    if config.patience and best.value is not None and best.step != int(state.step):
        state, _ = checkpoint.restore(directory / "checkpoints", state, step=best.step)
        processes.say(f"restored     the best weights, of step {best.step}")
    variables = variables_of(state)
    if recipe.recalibrate_batches:
        statistics = {"step": state.step, "batch_stats": variables["batch_stats"]}
        checkpoint.save(directory / load.RECALIBRATED, statistics, {})
    test = split_scores(eval_step, variables, recipe, "test", mesh)
    predict = compile_predict(
        make_predict(recipe.model, recipe.task, normalize=recipe.normalize), mesh
    )
    targets = [name for name, field in dataset.fields.items() if not field.is_input]
    predictions, examples = evaluate.predict_all(
        predict, variables, _batches(dataset, "test", mesh), keep=targets
    )
    # The frozen ones first: the first convolution is the likeliest to be frozen.
    params = processes.fetch((variables.get("frozen", {}).get("params", {}), variables["params"]))
    if not processes.is_first():
        return
    with MetricsLog(directory, resume_step=int(outcome.state.step)) as log:
        log.write(int(outcome.state.step), "test", test)
    found = recipe.task.report(predictions, examples | example_inputs(dataset, "test"))
    monitor, _ = monitored(config, recipe)
    report.write_figures(
        directory,
        params,
        found.figures,
        score=monitor,
        steps_per_epoch=split_size(dataset, "train") // config.batch_size,
    )
    summary = {
        "experiment": experiment,
        "model": settings.read_json(directory / "model.json", f"{directory} is damaged")["model"],
        "dataset": dataset.name,
        **{f"test_{name}": value for name, value in test.items()},
        "test_examples": split_size(dataset, "test"),
        "validation_examples": split_size(dataset, "validation"),
        "monitor": monitor,
        f"best_validation_{monitor}": best.value,
        "parameters": count_parameters(state.all_params),
        "trained_parameters": count_parameters(state.params),
        "seconds": elapsed(),
        "seed": config.seed,
        "epochs": config.epochs,
        "step": int(state.step),
        "ended": outcome.reason,
        "devices": backend.describe(),
    }
    report.write_summary(directory, summary, found.text)
    print(
        f"test         {'  '.join(f'{name} {value:.4f}' for name, value in test.items())}  "
        f"({summary['test_examples']} examples, {summary['seconds']:.1f} s in all)\n"
        f"see          {directory / 'summary.md'}"
    )


def split_scores(
    eval_step: EvalStep, variables: PyTree, recipe: Recipe, split: str, mesh: Mesh
) -> dict[str, float]:
    """Returns the scores of a whole split: the task's, and those of the recipe's own step."""
    batches = _batches(recipe.dataset, split, mesh)
    return evaluate.scores(
        evaluate.evaluate(eval_step, variables, batches, scores_of=recipe.task.scores)
    )


def _batches(dataset: AnyDataset, split: str, mesh: Mesh) -> Iterator[Batch]:
    return split_batches(dataset, split, EVALUATION_BATCH, sharding=batch_sharding(mesh))


def monitored(config: settings.Run, recipe: Recipe) -> tuple[str, bool]:
    """Returns the validation score that says which parameters are best, and if less is better."""
    name, direction = recipe.task.monitor
    if config.monitor and config.monitor != name:
        name, direction = config.monitor, "min" if config.monitor in MINIMIZED else "max"
    return name, direction == "min"


def check_monitor(
    config: settings.Run, recipe: Recipe, eval_step: EvalStep, variables: PyTree, batch: PyTree
) -> None:
    """Raises a UserError unless validation has the score that is monitored; nothing is computed."""
    name, _ = monitored(config, recipe)
    shapes = jax.eval_shape(eval_step, variables, batch)
    totals = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), dict(shapes))
    known = {*metrics.pairs(totals), *recipe.task.scores(totals)}
    if name not in known:
        raise unknown_name("validation score --monitor", name, sorted(known))
