"""What a run leaves while it trains: its record, metrics, checkpoints and a progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from cnnjax import checkpoint
from cnnjax.data.pipelines import Pipeline, ResidentPipeline, count_steps
from cnnjax.data.streamed import AnyDataset, split_size
from cnnjax.devices import backend, processes, sharding
from cnnjax.run import files, record
from cnnjax.run.logs import MetricsLog, ProgressBar
from cnnjax.run.recipe import Recipe
from cnnjax.run.settings import Settings
from cnnjax.train.loop import Best
from cnnjax.train.state import TrainState


class RunWriter:
    """Metrics and checkpoints of a run, and its progress bar, from a first step on.

    Every process saves its part of a checkpoint; the first one also logs and shows. Leaving the
    context waits for checkpoints that are being written.

    Args:
      config: the settings, with the run's directory.
      recipe: what is trained.
      first_step: the number of steps made before.
      steps_per_epoch: scales the bar.
      monitor, lower_is_better: the validation score by which checkpoints are best.
      elapsed: returns the seconds that the run has taken, over all its starts.
    """

    def __init__(
        self,
        config: Settings,
        recipe: Recipe,
        *,
        first_step: int,
        steps_per_epoch: int,
        monitor: str,
        lower_is_better: bool,
        elapsed: Callable[[], float],
    ):
        directory = Path(config.run_dir)
        self._config, self._recipe, self._elapsed = config, recipe, elapsed
        self._steps_per_epoch = steps_per_epoch
        self._monitor = monitor
        self._monitored: dict[int, float] = {}
        self._bar = ProgressBar(
            config.epochs * steps_per_epoch,
            steps_per_epoch,
            config.batch_size,
            first_step,
            enabled=None if processes.is_first() else False,
        )
        self._log = None
        if processes.is_first():
            self._log = MetricsLog(directory, resume_step=first_step if config.resume else None)
        self._saver = checkpoint.Saver(
            directory / "checkpoints",
            keep_last=config.keep_last or None,
            keep_best=config.keep_best,
            metric="monitored",
            lower_is_better=lower_is_better,
        )
        self._open = contextlib.ExitStack()

    def __enter__(self) -> RunWriter:
        for part in (self._log or contextlib.nullcontext(), self._bar, self._saver):
            self._open.enter_context(part)
        return self

    def __exit__(self, *exception) -> bool | None:
        return self._open.__exit__(*exception)

    def record(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Logs and shows the metrics of a kind (`train`, `validation`) at a step."""
        if self._log is not None:
            self._log.write(step, kind, values)
        if kind == "train":
            self._bar.update(step, values)
            return
        if kind == "validation":
            self._monitored[step] = values[self._monitor]
        scores = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._bar.message(f"epoch {step / self._steps_per_epoch:g}: {kind} {scores}")

    def save(self, state: TrainState, best: Best) -> None:
        """Saves a checkpoint, with what resuming needs besides the state."""
        step = int(state.step)
        notes = checkpoint_notes(
            self._config,
            self._recipe,
            step=step,
            best=best,
            seconds=self._elapsed(),
            monitored=self._monitored.get(step),
        )
        with self._bar.paused():
            self._saver.save(state, notes)

    def paused(self) -> contextlib.AbstractContextManager:
        """A context whose time the bar does not count as training."""
        return self._bar.paused()


def record_facts(config: Settings, experiment: str, recipe: Recipe) -> None:
    """Writes `config.json` and `model.json`."""
    record.write_config(config, experiment, data_checksum=recipe.dataset.checksum)
    files.write_json(Path(config.run_dir) / "model.json", model_card(recipe))


def model_card(recipe: Recipe) -> dict[str, Any]:
    """Returns the content of `model.json`."""
    return {
        "task": recipe.task.name,
        "dataset": recipe.dataset.name,
        "parameters_averaged": recipe.ema,
        "precision": recipe.precision,
        **recipe.metadata(),
    }


def checkpoint_notes(
    config: Settings,
    recipe: Recipe,
    *,
    step: int,
    best: Best,
    seconds: float,
    monitored: float | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Returns what a checkpoint has besides the state, for those who resume from it.

    Args:
      config, recipe: of the run.
      step: of the state.
      best: the best validation so far.
      seconds: that the run has taken.
      monitored: the validation score of this step, if there is one.
      **others: further notes, in the place of these.
    """
    steps_per_epoch = count_steps(split_size(recipe.dataset, "train"), config.batch_size)
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    notes = {
        "step": step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "best": dataclasses.asdict(best),
        "seconds": seconds,
        **(recipe.checksums() | others),
        "settings": record.recorded_settings(config),
    }
    return notes if monitored is None else notes | {"monitored": monitored}


def print_header(
    config: Settings,
    dataset: AnyDataset,
    mesh: Mesh,
    data: Pipeline,
    method: str,
) -> None:
    """Says where the run is, what it computes on and what it reads."""
    splits = ", ".join(
        f"{split_size(dataset, split):,} {name}" if split_size(dataset, split) else f"no {name}"
        for name, split in (("training", "train"), ("validation", "validation"), ("test", "test"))
    )
    computed = "" if config.precision == "float32" else f" in {config.precision}"
    kept = "resident" if isinstance(data, ResidentPipeline) else "streamed"
    processes.say(
        f"run          {config.run_dir}\n"
        f"devices      {backend.describe()}; {sharding.describe(mesh)} in use, "
        f"step by {method}{computed}\n"
        f"data         {dataset.name}, {kept}: {splits} {dataset.description}"
    )
