"""The loop of a search: settings are asked for, trained by worker processes, reported and judged.

A trial is a run: its directory is `trials/NUMBER` of the search, and it resumes like any other. A
search that was killed goes on with what was running: the trial keeps its number, its settings and
its reports, and trains on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from cnnjax.errors import UserError
from cnnjax.paths import read_text
from cnnjax.run.files import only_writer
from cnnjax.run.logs import METRICS_FILE
from cnnjax.search import study as studies
from cnnjax.search.plan import Search, last_line, objective_values, validations
from cnnjax.search.space import Space, Value

if TYPE_CHECKING:
    import optuna

POLL_SECS = 0.1
PRUNED, KILLED = "pruned", "killed"


class Worker:
    """A process that runs trials one after another: see `cnnjax.search.worker`.

    Attributes:
      number: counted from 0.
      answers: the exit code of each trial as it ends; None when the process has.
    """

    def __init__(self, number: int, experiment: str, environment: Mapping[str, str], core: str):
        self.number = number
        self.answers: SimpleQueue[int | None] = SimpleQueue()
        command = [sys.executable, "-m", "cnnjax.search.worker", experiment, str(os.getpid())]
        self._process = subprocess.Popen(
            [*command, *([core] if core else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            # Ctrl-C is for the search, which asks its trials to save.
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.answers.put(int(line))
        self._process.wait()
        self.answers.put(None)

    def run(self, log: Path, argv: Sequence[str]) -> None:
        """Starts a trial."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Then `answers` says so.
            self._process.stdin.write(json.dumps([str(log), list(argv)]) + "\n")
            self._process.stdin.flush()

    def stop_trial(self) -> None:
        """Asks the trial to save and stop; the process goes on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


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
    timeout_secs: float = 0.0,
    combinations: Sequence[dict[str, Value]] | None = None,
    environments: Sequence[Mapping[str, str]] = ({},),
    cores: Sequence[str] = ("",),
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
      timeout_secs: begin no trial after so many seconds; 0 for no limit.
      combinations: of a grid.
      environments, cores: of the workers, in turn.
      on_start, on_end: called with each trial, with what became of it.
      should_stop: asked again and again: whether to save what runs and to end.

    Returns:
      Whether the search has come to its end, and not to `should_stop` or the timeout.

    Raises:
      UserError: the first trial fails, or the storage does.
    """
    began = time.monotonic()

    def start(number: int) -> Worker:
        environment, core = environments[number % len(environments)], cores[number % len(cores)]
        return Worker(number, search.experiment, environment, core)

    idle = [start(number) for number in range(workers)]
    everyone, busy = list(idle), dict[int, Running]()
    exhausted = False
    try:
        while True:
            stopping = should_stop() or bool(
                timeout_secs and time.monotonic() - began > timeout_secs
            )
            while idle and not stopping and not exhausted:
                found = _next(search, study, budget, combinations)
                if found is None:
                    exhausted = True
                    break
                worker = idle.pop(0)
                busy[worker.number] = found
                on_start(found.trial)
                log = found.directory.with_suffix(".log")
                worker.run(log, search.command(found.trial.params, found.directory))
            if not busy:
                return not stopping or exhausted
            if stopping and should_stop():
                for number in [number for number in busy if not busy[number].ended_by]:
                    everyone[number].stop_trial()
                    busy[number].ended_by = KILLED
            for number, running in list(busy.items()):
                worker = everyone[number]
                if search.objectives and not running.ended_by:
                    _report(search, study, running, worker)
                with contextlib.suppress(Empty):
                    code = worker.answers.get_nowait()
                    _report(search, study, running, None)
                    ended = _judged(search, study, running, code)
                    running.lock.close()
                    del busy[number]
                    if code is None:
                        everyone[number] = worker = start(number)
                    idle.append(worker)
                    if ended is not None:
                        on_end(ended)
                        _check_first(study, ended)
            time.sleep(POLL_SECS)
    finally:
        for worker in everyone:
            worker.end()
        for running in busy.values():
            running.lock.close()


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
    trial = studies.ask(study, search.space, budget, search.allows, combinations)
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


def _judged(
    search: Search, study: optuna.Study, running: Running, code: int | None
) -> Ended | None:
    """Tells the study what became of a trial; None for one that goes on later."""
    state = studies.optuna_module().trial.TrialState
    seconds = time.monotonic() - running.started
    number = running.trial.number
    has_summary = (running.directory / "summary.json").exists()
    if running.ended_by == KILLED and not has_summary:
        return None
    if running.ended_by == PRUNED and not has_summary:
        study.tell(running.trial, state=state.PRUNED)
        return Ended(number, None, PRUNED, "", seconds)
    why = ""
    if code == 0 and has_summary:
        values = objective_values(search, running.directory)
        if all(map(math.isfinite, values)):
            study.tell(running.trial, list(values))
            return Ended(number, values, "complete", "", seconds)
        why = f"{search.objectives[0].name} is not a number"
    elif code is None:
        why = "its process was killed"
    why = why or _last_line(running.directory.with_suffix(".log")) or f"it ended with code {code}"
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


@contextlib.contextmanager
def stops() -> Iterator[Callable[[], bool]]:
    """Within the context SIGINT and SIGTERM are noted; yields whether one came."""
    from cnnjax.run.exits import stop_requests

    with stop_requests() as asked:
        yield lambda: asked() is not None
