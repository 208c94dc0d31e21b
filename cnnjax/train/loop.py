"""The training loop: it owns time (when to log, evaluate, save, stop) and no mathematics."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cnnjax import metrics as metrics_lib
from cnnjax.errors import UserError
from cnnjax.train.compile import StackedMetrics, Train
from cnnjax.train.state import TrainState


class Diverged(UserError):
    """Training produced a number that is not finite; what was saved before is untouched."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far: what the loop remembers besides the state, saved with it.

    Attributes:
      value: the best monitored value, or None before the first validation.
      step: the step at which it was reached.
      evaluations_since: validations since then, for early stopping.
    """

    value: float | None = None
    step: int = 0
    evaluations_since: int = 0

    def after(self, step: int, value: float, *, lower_is_better: bool) -> "Best":
        """Returns the best after one more validation; NaN is never the best."""
        if self.value is None or math.isnan(value):
            better = not math.isnan(value)
        else:
            better = value < self.value if lower_is_better else value > self.value
        if better:
            return Best(value, step, 0)
        return dataclasses.replace(self, evaluations_since=self.evaluations_since + 1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How training ended: `reason` is `finished`, `early stopping` or `interrupted`."""

    state: TrainState
    best: Best
    reason: str


def fit(
    state: TrainState,
    train: Train,
    *,
    first_step: int,
    last_step: int,
    steps_per_epoch: int,
    log_every_steps: int,
    record: Callable[[int, str, dict[str, float]], None],
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every_steps: int = 0,
    save: Callable[[TrainState, Best], None] | None = None,
    save_every_steps: int | None = None,
    monitor: str = "accuracy",
    lower_is_better: bool = False,
    patience: int = 0,
    best: Best | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains from `first_step` to `last_step`.

    Args:
      state: the state at `first_step`.
      train: a compiled trainer of `cnnjax.train.compile`.
      first_step: the number of steps already made; 0 for a new run.
      last_step: the total number of steps.
      steps_per_epoch: steps in one pass over the training data.
      log_every_steps: training metrics are averaged over this many steps, counted from the start of
        each epoch.
      record: `(step, kind, values)`, called with kind `train` or `validation`.
      evaluate: `state -> values`, called at the end of epochs and at the very end.
      evaluate_every_steps: only at the end of the first epoch after each multiple of this number
        of steps, which matters where epochs are shorter; 0: of each epoch.
      save: called every `save_every_steps` steps (counted from the start of each epoch), where
        `evaluate` is, and when stopping early or interrupted.
      save_every_steps: see `save`; None for epoch ends only.
      monitor: the validation value that decides which step is best: the highest.
      lower_is_better: the lowest is.
      patience: stop after this many validations in a row without improvement; 0 never does. A run
        that is resumed where it had stopped for this reason stops at once.
      best: what a resumed run had reached.
      should_stop: asked after each chunk of steps; when true, the loop saves and returns.

    Returns:
      The last state, the best validation, and why the loop ended.

    Raises:
      Diverged: a loss or norm is not finite. The state of that step is never saved.
    """
    best = best or Best()
    intervals = [log_every_steps, *([save_every_steps] if save_every_steps else [])]
    chunks = chunk_lengths(first_step, last_step, steps_per_epoch, intervals)
    step = first_step
    if 0 < patience <= best.evaluations_since:
        return Outcome(state, best, "early stopping")

    for state, metrics in train(state, first_step, chunks):  # noqa: B020 - the trainer owns it
        start, step = step, step + len(metrics["loss"][0])
        check_finite(start, metrics)
        record(step, "train", metrics_lib.finalize(_total(metrics)))

        epoch_ends = step % steps_per_epoch == 0
        ends = step == last_step
        evaluation_due = epoch_ends and passes_multiple(
            step - steps_per_epoch, step, evaluate_every_steps
        )
        if evaluate is not None and (evaluation_due or ends):
            values = evaluate(state)
            record(step, "validation", values)
            best = best.after(step, values[monitor], lower_is_better=lower_is_better)

        interrupted = should_stop()
        exhausted = 0 < patience <= best.evaluations_since
        save_due = save_every_steps and (step % steps_per_epoch) % save_every_steps == 0
        if save is not None and (save_due or evaluation_due or ends or interrupted or exhausted):
            save(state, best)
        if ends:
            break
        if interrupted:
            return Outcome(state, best, "interrupted")
        if exhausted:
            return Outcome(state, best, "early stopping")

    return Outcome(state, best, "finished")


def passes_multiple(start: int, stop: int, number: int) -> bool:
    """Whether a multiple of the number is in (start, stop]; of 0, always."""
    return not number or start // number < stop // number


def chunk_lengths(
    first_step: int, last_step: int, steps_per_epoch: int, intervals: list[int]
) -> Iterator[int]:
    """Yields numbers of steps that end at each multiple of an interval within an epoch.

    The ends depend on the position in the epoch alone, so a resumed run has the same ones.
    """
    step = first_step
    while step < last_step:
        position = step % steps_per_epoch
        ends = [steps_per_epoch, *(position // every * every + every for every in intervals)]
        length = min(min(ends) - position, last_step - step)
        yield length
        step += length


def check_finite(start: int, metrics: StackedMetrics) -> None:
    """Raises `Diverged` if a loss or norm of the steps after step `start` is not finite."""
    watched = ("loss", "gradient_norm", "update_norm")
    finite = np.logical_and.reduce([np.isfinite(metrics[name][0]) for name in watched])
    if finite.all():
        return
    index = int(np.argmin(finite))
    values = {name: metrics[name][0][index] / metrics[name][1][index] for name in watched}
    learning_rate = float(metrics["learning_rate"][0][index])
    bad = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
    raise Diverged(
        f"training diverged at step {start + index + 1} (learning rate {learning_rate:g}): {bad}. "
        "Lower the learning rate, lengthen the warmup or clip the gradient."
    )


def _total(metrics: StackedMetrics) -> dict[str, Any]:
    return {name: (total.sum(0), count.sum(0)) for name, (total, count) in metrics.items()}
