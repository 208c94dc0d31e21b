"""The end of a run: its scores on the test set, its figures, its summary."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cnnjax import checkpoint, distill
from cnnjax.data.streamed import split_size
from cnnjax.devices import backend, processes
from cnnjax.errors import UserError
from cnnjax.evaluation.references import LEAST_EXAMPLES
from cnnjax.run import files, load, report
from cnnjax.run.logs import MetricsLog
from cnnjax.run.recipe import Recipe
from cnnjax.run.scoring import Scoring, monitored
from cnnjax.run.settings import Run
from cnnjax.train import loop
from cnnjax.train.state import TrainState
from cnnjax.trees import count_parameters

PyTree = Any


def finish(
    config: Run,
    experiment: str,
    scoring: Scoring,
    outcome: loop.Outcome,
    elapsed: Callable[[], float],
) -> None:
    """Tests the trained model, writes figures and summary, and says where they are."""
    recipe, directory, state = scoring.recipe, Path(config.run_dir), outcome.state
    best = outcome.best
    if config.patience and best.value is not None and best.step != int(state.step):
        state, _ = checkpoint.restore(directory / "checkpoints", state, step=best.step)
        processes.say(f"restored     the best weights, of step {best.step}")
    variables = scoring.variables_of(state)
    if recipe.recalibrate_batches:
        statistics = {"step": state.step, "batch_stats": variables["batch_stats"]}
        checkpoint.save(directory / load.RECALIBRATED, statistics, {})
    monitor, _ = monitored(config, recipe)
    steps_per_epoch = split_size(recipe.dataset, "train") // config.batch_size
    test, text = {}, "The test set was left alone."
    if config.test:
        test = scoring.of(variables, "test")
        reported = scoring.report(variables, "test")
        # The frozen ones first: the first convolution is the likeliest to be frozen.
        params = processes.fetch(
            (variables.get("frozen", {}).get("params", {}), variables["params"])
        )
    if not processes.is_first():
        return
    if config.test:
        with MetricsLog(directory, resume_step=int(outcome.state.step)) as log:
            log.write(int(outcome.state.step), "test", test)
        found = reported()
        text = found.text
        report.write_figures(
            directory, params, found.figures, score=monitor, steps_per_epoch=steps_per_epoch
        )
    card = files.read_json(directory / "model.json", f"{directory} is damaged")
    summary = summarize(
        config,
        experiment,
        recipe,
        card,
        state=state,
        last_step=int(outcome.state.step),
        best=best,
        ended=outcome.reason,
        test=test,
        seconds=elapsed(),
    )
    report.write_summary(directory, summary, text)
    if test:
        # Trials of a search and folds are not served: in a short one it takes a tenth of the time.
        _leave_reference(directory, recipe, card)
        print(
            f"test         {'  '.join(f'{name} {value:.4f}' for name, value in test.items())}  "
            f"({summary['test_examples']} examples, {summary['seconds']:.1f} s in all)"
        )
    print(f"see          {directory / 'summary.md'}")


def summarize(
    config: Run,
    experiment: str,
    recipe: Recipe,
    card: Mapping[str, Any],
    *,
    state: TrainState,
    last_step: int,
    best: loop.Best,
    ended: str,
    test: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Returns the content of `summary.json`.

    Args:
      config, experiment, recipe: of the run.
      card: its `model.json`.
      state: that of the step which is tested and kept.
      last_step: the steps that it has trained.
      best: its best validation.
      ended: why it ended, such as `finished`.
      test: scores on the test set; {} where it was left alone.
      seconds: of the whole run.
    """
    monitor, _ = monitored(config, recipe)
    trained = state.params
    if "distill" in card:
        # The network's own, without what projects it to its teacher.
        trained = distill.student_variables({"params": trained})["params"]
    return {
        "experiment": experiment,
        "model": card["model"],
        "dataset": recipe.dataset.name,
        **{f"test_{name}": value for name, value in test.items()},
        **({"test_examples": split_size(recipe.dataset, "test")} if test else {}),
        "validation_examples": split_size(recipe.dataset, "validation"),
        "monitor": monitor,
        f"best_validation_{monitor}": best.value,
        "parameters": count_parameters({**state.all_params, "trained": trained}),
        "trained_parameters": count_parameters(trained),
        "seconds": seconds,
        "seed": config.seed,
        "epochs": last_step / (split_size(recipe.dataset, "train") // config.batch_size),
        "step": int(state.step),
        "ended": ended,
        "devices": backend.describe(),
    }


def _leave_reference(directory: Path, recipe: Recipe, card: dict[str, Any]) -> None:
    """Leaves what a server compares its traffic with, for a classifier that has enough images."""
    is_classifier = card.get("task", "classification") == "classification"
    known = {"image_shape", "class_names", "num_outputs"} <= card.keys()
    enough = split_size(recipe.dataset, "validation") >= LEAST_EXAMPLES
    if not (is_classifier and known and enough) or processes.count() > 1:
        return
    try:
        report.leave_reference(directory, recipe.dataset)  # type: ignore[arg-type]
    except UserError as error:
        # A run that is otherwise whole does not end with an error for the want of it.
        print(f"reference    none: {error}")
