"""How a run's state is scored, and which score says that it is the best so far."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cnnjax import metrics
from cnnjax.data.batches import Batch
from cnnjax.data.pipelines import Pipeline
from cnnjax.data.streamed import example_inputs, split_batches
from cnnjax.devices import processes
from cnnjax.devices.sharding import batch_sharding
from cnnjax.errors import UserError, unknown_name
from cnnjax.explain.worst import with_worst_explained
from cnnjax.run.recipe import Recipe
from cnnjax.run.settings import Run
from cnnjax.tasks.task import Report
from cnnjax.train import batch_stats, evaluate
from cnnjax.train.predict import EvalStep, make_eval_step, make_predict
from cnnjax.train.state import TrainState

PyTree = Any
EVALUATION_BATCH = 512
# Scores that are minimized, besides those that tasks name.
MINIMIZED = ("loss",)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What it takes to score a run's state on `validation` and `test`.

    Attributes:
      recipe: what is trained.
      mesh: the devices.
      steps: split -> compiled evaluation step; another split has that of `validation`.
      variables_of: state -> variables that are validated, tested and kept.
    """

    recipe: Recipe
    mesh: Mesh
    steps: Mapping[str, EvalStep]
    variables_of: Callable[[TrainState], PyTree]

    def of(self, variables: PyTree, split: str) -> dict[str, float]:
        """Returns the scores of a whole split: the task's, and those of the recipe's own step."""
        scores_of = self.recipe.task.scores
        step = self.steps.get(split, self.steps["validation"])
        batches = self.batches(split)
        return evaluate.scores(evaluate.evaluate(step, variables, batches, scores_of=scores_of))

    def report(self, variables: PyTree, split: str) -> Callable[[], Report]:
        """Predicts a whole split, on all processes; what is returned reports on it, on one."""
        recipe, dataset = self.recipe, self.recipe.dataset
        predict = evaluate.compile_predict(
            make_predict(recipe.model, recipe.task, normalize=recipe.normalize), self.mesh
        )
        targets = [name for name, field in dataset.fields.items() if not field.is_input]
        predictions, examples = evaluate.predict_all(
            predict, variables, self.batches(split), keep=targets
        )
        local = processes.fetch(variables) if recipe.task.name == "classification" else None

        def reported() -> Report:
            shown = examples | example_inputs(dataset, split)
            report = recipe.task.report(predictions, shown)
            if local is None:
                return report
            return with_worst_explained(
                report, recipe.model, local, recipe.normalize, predictions, shown
            )

        return reported

    def batches(self, split: str) -> Iterator[Batch]:
        """Yields the batches of a split."""
        sharding = batch_sharding(self.mesh)
        return split_batches(self.recipe.dataset, split, EVALUATION_BATCH, sharding=sharding)


def make_scoring(
    recipe: Recipe, mesh: Mesh, variables_of: Callable[[TrainState], PyTree]
) -> Scoring:
    """Compiles the steps for `validation` and `test`: the same, or the recipe's own."""
    splits, make_own = ("validation", "test"), recipe.make_eval_step
    if make_own is not None:
        makers = {split: functools.partial(make_own, split=split) for split in splits}
        own = {split: evaluate.compile_eval(make, mesh) for split, make in makers.items()}
        return Scoring(recipe, mesh, own, variables_of)

    def make(axis_name: str | None) -> EvalStep:
        return make_eval_step(
            recipe.model, recipe.task, normalize=recipe.normalize, axis_name=axis_name
        )

    steps = dict.fromkeys(splits, evaluate.compile_eval(make, mesh))
    return Scoring(recipe, mesh, steps, variables_of)


def scored_variables(
    recipe: Recipe, state: TrainState, data: Pipeline
) -> Callable[[TrainState], PyTree]:
    """Returns `state -> variables` that are validated, tested and kept."""
    num_batches = recipe.recalibrate_batches
    if num_batches < 0:
        raise UserError(f"--recalibrate {num_batches}: give 0 or more batches.")
    if not num_batches:
        return lambda state: state.variables()
    if not state.batch_stats:
        raise UserError(
            f"--recalibrate {num_batches}: {type(recipe.model).__name__} has no BatchNorm, whose "
            "statistics could be measured; leave it out."
        )
    statistics = jax.jit(batch_stats.make_statistics(recipe.model, normalize=recipe.normalize))

    def variables_of(state: TrainState) -> PyTree:
        variables = state.variables()
        batches = itertools.islice(data.batches(0), num_batches)
        measured = batch_stats.recalibrate(statistics, variables, batches)
        places = jax.tree.map(lambda leaf: leaf.sharding, variables["batch_stats"])
        return {**variables, "batch_stats": processes.put(measured, places)}

    return variables_of


def monitored(config: Run, recipe: Recipe) -> tuple[str, bool]:
    """Returns the validation score that says which parameters are best, and if less is better."""
    name, direction = recipe.task.monitor
    if config.monitor and config.monitor != name:
        name, direction = config.monitor, "min" if config.monitor in MINIMIZED else "max"
    return name, direction == "min"


def check_monitor(config: Run, scoring: Scoring, state: TrainState, batch: PyTree) -> None:
    """Raises a UserError unless validation has the score that is monitored; nothing is computed."""
    name, _ = monitored(config, scoring.recipe)
    variables = jax.eval_shape(TrainState.variables, state)
    shapes = jax.eval_shape(scoring.steps["validation"], variables, batch)
    totals = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), dict(shapes))
    known = {*metrics.pairs(totals), *scoring.recipe.task.scores(totals)}
    if name not in known:
        raise unknown_name("validation score --monitor", name, sorted(known))
