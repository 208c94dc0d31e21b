"""The loop of a search: settings are asked for, trained by worker processes, reported and judged.

A trial is a run: its directory is `trials/NUMBER` of the search, and it resumes like any other. A
search that was killed goes on with what was running: the trial keeps its number, its settings and
its reports, and trains on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from cnnjax.errors import UserError
from cnnjax.paths import read_text
from cnnjax.rng import numpy_generator
from cnnjax.run.files import only_writer
from cnnjax.run.logs import METRICS_FILE
from cnnjax.search import study as studies
from cnnjax.search.plan import Search, last_line, objective_values, validations
from cnnjax.search.space import Space, Value, draw_allowed
from cnnjax.search.workers import LOST, Answer, Worker

if TYPE_CHECKING:
    import optuna

POLL_SECS = 0.1
PRUNED, KILLED = "pruned", "killed"
# Of a trial in the storage: how many workers were lost with the machines they ran on.
RESTARTS, MOST_RESTARTS = "restarts", 5
# Likewise how long its workers took, all starts together but for those that were killed.
SECONDS = "seconds"
# As `only_writer` says it.
BEING_TRAINED = "is being trained by"


@dataclasses.dataclass
class Running:
    """A trial that a worker trains.

    Attributes:
      trial: of Optuna.
      directory: of its run.
      lock: what keeps others from it.
      started: when, in seconds.
      reported: validations that the study knows.
      seen_bytes: of its metrics when they were last read.
      ended_by: what asked it to stop, if anything did.
    """

    trial: Any
    directory: Path
    lock: contextlib.ExitStack
    started: float
    reported: int = 0
    seen_bytes: int = 0
    ended_by: str = ""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of a trial.

    Attributes:
      number: of the trial.
      values: of the objectives; None where it was pruned or failed.
      how: `complete`, `pruned` or `failed`.
      why: of a failure, in a line.
      seconds: since it was started here.
    """

    number: int
    values: tuple[float, ...] | None
    how: str
    why: str
    seconds: float


def run(
    search: Search,
    study: optuna.Study,
    *,
    budget: int,
    workers: int,
    start: Callable[[int], Worker],
    timeout_secs: float = 0.0,
    combinations: Sequence[dict[str, Value]] | None = None,
    on_start: Callable[[Any], None] = lambda trial: None,
    on_end: Callable[[Ended], None] = lambda ended: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs trials until the budget is spent; those that were left running first.

    Args:
      search: what is searched.
      study: of `studies.open_study`.
      budget: how many trials count, with those of earlier starts and of others on the same study.
      workers: how many train at once.
      start: number -> a worker, such as `workers.local` or `cluster.connect` return it; called
        again for one that has died.
      timeout_secs: begin no trial after so many seconds; 0 for no limit.
      combinations: of a grid.
      on_start, on_end: called with each trial, with what became of it.
      should_stop: asked again and again: whether to save what runs and to end.

    Returns:
      Whether the search has come to its end, and not to `should_stop` or the timeout.

    Raises:
      UserError: the first trial fails, or the storage does.
    """
    began = time.monotonic()
    everyone, busy = [start(number) for number in range(workers)], dict[int, Running]()
    exhausted = False
    try:
        while True:
            stopping = should_stop() or bool(
                timeout_secs and time.monotonic() - began > timeout_secs
            )
            for worker in everyone:
                if stopping or exhausted or worker.number in busy or not worker.is_ready():
                    continue
                with alone(search.directory, "asking"):
                    found = _next(search, study, budget, combinations)
                if found is None:
                    exhausted = True
                    break
                busy[worker.number] = found
                on_start(found.trial)
                worker.run(search.request(found.trial.params, found.directory))
            if not busy and (stopping or exhausted):
                return exhausted
            if stopping and should_stop():
                for number in [number for number in busy if not busy[number].ended_by]:
                    everyone[number].stop_trial()
                    busy[number].ended_by = KILLED
            for number, running in list(busy.items()):
                worker = everyone[number]
                if search.objectives and not running.ended_by:
                    _report(search, study, running, worker)
                with contextlib.suppress(Empty):
                    answer = worker.answer()
                    _report(search, study, running, None)
                    ended = _judged(search, study, running, answer)
                    running.lock.close()
                    del busy[number]
                    if not isinstance(answer, int):
                        worker.end()
                        everyone[number] = start(number)
                        # The trial that it had may have to go on.
                        exhausted = False
                    if ended is not None:
                        on_end(ended)
                        _check_first(study, ended)
            time.sleep(POLL_SECS)
    finally:
        for worker in everyone:
            worker.end()
        for running in busy.values():
            running.lock.close()


@contextlib.contextmanager
def alone(directory: Path, doing: str) -> Iterator[None]:
    """Waits until no other search does this in the directory, and keeps others from it.

    Such as asking for a trial, which is claimed a moment later.
    """
    place = directory / "claims" / doing
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_writer(place))
                break
            except UserError:
                time.sleep(POLL_SECS / 2)
        yield


def _next(
    search: Search,
    study: optuna.Study,
    budget: int,
    combinations: Sequence[dict[str, Value]] | None,
) -> Running | None:
    """The trial to train next: one that was left running, or a new one."""
    optuna = studies.optuna_module()
    running = optuna.trial.TrialState.RUNNING
    for each in study.get_trials(deepcopy=False, states=(running,)):
        if studies.SKIPPED in each.user_attrs:
            continue
        lock = _claimed(search, each.number)
        if lock is None:
            continue
        # Its owner may have told its end between the list and the claim.
        now = study.get_trials(deepcopy=False)[each.number]
        if now.state != running or not _is_whole(search.space, now.params):
            if now.state == running:
                studies.skip(study, optuna.trial.Trial(study, each._trial_id), "was not begun")
            lock.close()
            continue
        trial = optuna.trial.Trial(study, each._trial_id)
        reported = max(each.intermediate_values, default=0)
        directory = search.trial_directory(each.number)
        return Running(trial, directory, lock, time.monotonic(), reported)
    generator = numpy_generator(
        search.settings.get("seed", 0), "drawn", len(study.get_trials(deepcopy=False))
    )
    trial = studies.ask(
        study,
        search.space,
        budget,
        search.allows,
        combinations,
        lambda: draw_allowed(search.space, search.settings, generator),
    )
    if trial is None:
        return None
    lock = _claimed(search, trial.number)
    assert lock is not None, f"trial {trial.number} is new and claimed"
    return Running(trial, search.trial_directory(trial.number), lock, time.monotonic())


def _is_whole(space: Space, params: Mapping[str, Value]) -> bool:
    """Whether a trial was killed after all its settings were chosen."""
    wanted = [
        each.name
        for each in space.dimensions
        if each.condition is None or params.get(each.condition[0]) == each.condition[1]
    ]
    return set(wanted) == set(params)


def _claimed(search: Search, number: int) -> contextlib.ExitStack | None:
    """Takes a trial for this process until the stack is closed; None where another has it."""
    claim = search.directory / "claims" / f"{number:04}"
    claim.mkdir(parents=True, exist_ok=True)
    search.trial_directory(number).parent.mkdir(parents=True, exist_ok=True)
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(only_writer(claim))
    except UserError:
        return None
    return stack


def _report(search: Search, study: optuna.Study, running: Running, worker: Worker | None) -> None:
    """Reports validations that are new; asks the worker to stop where the pruner says so."""
    with contextlib.suppress(OSError):
        size = (running.directory / METRICS_FILE).stat().st_size
        # They are read again and again, and may be long.
        if size == running.seen_bytes:
            return
        running.seen_bytes = size
    first = search.objectives[0]
    found = validations(running.directory, first.name)
    for epoch, value in enumerate(found, 1):
        if epoch <= running.reported:
            continue
        running.reported = epoch
        if len(search.objectives) > 1:
            continue
        running.trial.report(value, epoch)
        if worker is not None and not running.ended_by and running.trial.should_prune():
            running.ended_by = PRUNED
            worker.stop_trial()


def _judged(search: Search, study: optuna.Study, running: Running, answer: Answer) -> Ended | None:
    """Tells the study what became of a trial; None for one that goes on later."""
    state = studies.optuna_module().trial.TrialState
    seconds = time.monotonic() - running.started
    number = running.trial.number
    has_summary = (running.directory / "summary.json").exists()
    spent = running.trial.user_attrs.get(SECONDS, 0.0) + seconds
    running.trial.set_user_attr(SECONDS, spent)
    if running.ended_by == KILLED and not has_summary:
        return None
    log = running.directory.with_suffix(".log")
    # What another node began may end a moment after it was lost.
    is_lost = answer == LOST or (answer == 2 and BEING_TRAINED in _last_line(log))
    if is_lost and not has_summary and running.ended_by != PRUNED:
        restarts = running.trial.user_attrs.get(RESTARTS, 0) + 1
        running.trial.set_user_attr(RESTARTS, restarts)
        if restarts < MOST_RESTARTS:
            return None
    if running.ended_by == PRUNED and not has_summary:
        study.tell(running.trial, state=state.PRUNED)
        return Ended(number, None, PRUNED, "", seconds)
    why = ""
    if answer in (0, LOST) and has_summary:
        values = objective_values(search, running.directory)
        if all(map(math.isfinite, values)):
            study.tell(running.trial, list(values))
            return Ended(number, values, "complete", "", seconds)
        why = f"{search.objectives[0].name} is not a number"
    elif answer == LOST:
        why = f"the machine that it ran on was lost {MOST_RESTARTS} times"
    elif answer is None:
        why = "its process was killed"
    why = why or _last_line(log) or f"it ended with {answer}"
    running.trial.set_user_attr("failed", why)
    study.tell(running.trial, state=state.FAIL)
    return Ended(number, None, "failed", why, seconds)


def _last_line(log: Path) -> str:
    with contextlib.suppress(UserError):
        return last_line(read_text(log))
    return ""


def _check_first(study: optuna.Study, ended: Ended) -> None:
    """Raises UserError where no trial has worked yet and one fails: the next would, too."""
    if ended.how != "failed":
        return
    state = studies.optuna_module().trial.TrialState
    worked = (state.COMPLETE, state.PRUNED)
    if not any(each.state in worked for each in study.get_trials(deepcopy=False)):
        raise UserError(f"trial {ended.number} failed, and none has worked: {ended.why}")
