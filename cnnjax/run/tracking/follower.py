"""The process that follows a run's directory and sends what is new to one tracker.

It ends when the trainer says so or has ended, after all was sent; a tracker that fails is asked
again, later and later. Its own words go to `tracking/NAME.log`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from cnnjax.errors import UserError
from cnnjax.run import files
from cnnjax.run.tracking import DIRECTORY, facts
from cnnjax.run.tracking import sent as states
from cnnjax.run.tracking.sent import Record, Records, Sent

POLL_SECS = 0.5
SAMPLE_SECS = 5.0
FIRST_PAUSE_SECS, LONGEST_PAUSE_SECS = 1.0, 60.0
# What is left to a tracker when the trainer was killed: a server may never answer. A store on this
# machine does, and would be damaged if it were left half made.
ORPHAN_SECS, LOCAL_ORPHAN_SECS = 30.0, 600.0


class TrackedRun(Protocol):
    """A run that is open at a tracker; each function raises whatever the tracker's library does."""

    def log(self, records: list[Record]) -> None: ...

    def sample(self, number: int) -> None: ...

    def figure(self, path: Path, step: int) -> None: ...

    def file(self, path: Path) -> None: ...

    def checkpoint(self, path: Path) -> None: ...

    def finish(self, status: str, summary: dict[str, Any]) -> None: ...


def open_run(
    tracker: str, directory: Path, sent: Sent, trainer_pid: int | None = None
) -> TrackedRun:
    """Opens a run at a tracker: a new one, or that of `sent`, whose entries it completes.

    Args:
      tracker: one of `TRACKERS`.
      directory: of the run, with its `config.json`.
      sent: what the tracker has of it.
      trainer_pid: the process whose load is a metric, if there is one.
    """
    if tracker == "wandb":
        from cnnjax.run.tracking.wandb_runs import WandbRun

        return WandbRun(directory, sent, trainer_pid)
    from cnnjax.run.tracking.mlflow_runs import MlflowRun

    return MlflowRun(directory, sent, trainer_pid)


def is_local(tracker: str) -> bool:
    """Whether the tracker is a store that lies on this machine, which must not be cut short."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return tracker == "mlflow" and not address.startswith(("http", "databricks", "uc"))


def follow(
    tracker: str,
    directory: Path,
    *,
    checkpoints: str,
    ended: Callable[[], str | None],
    trainer_pid: int | None = None,
    patient: bool = True,
) -> Sent:
    """Sends a run to a tracker until it has ended and all was sent.

    Args:
      tracker, directory: as for `open_run`.
      checkpoints: which are sent, see `facts.checkpoints`.
      ended: returns how the run ended (`finished`, `stopped`, `killed`), None while it goes on.
      trainer_pid: see `open_run`.
      patient: asks a tracker that fails again; False raises what it raised.

    Returns:
      What was sent.
    """
    sent, records = states.load(directory, tracker), Records(directory)
    run: TrackedRun | None = None
    pause, next_sample = FIRST_PAUSE_SECS, 0.0
    while True:
        how = ended()
        try:
            if run is None:
                run = open_run(tracker, directory, sent, trainer_pid)
                sent.done, sent.clean = False, False
                states.save(directory, tracker, sent)
            _send_new(run, tracker, directory, sent, records)
            _send_checkpoints(run, tracker, directory, sent, checkpoints)
            if time.monotonic() >= next_sample or how is not None:
                run.sample(sent.samples)
                sent.samples, next_sample = sent.samples + 1, time.monotonic() + SAMPLE_SECS
            if how is not None:
                _send_files(run, tracker, directory, sent)
                run.finish(how, facts.summary(directory))
            if sent.error or how is not None:
                sent.error, sent.done, sent.clean = "", how is not None, how is not None
                states.save(directory, tracker, sent)
            pause = FIRST_PAUSE_SECS
        except Exception as error:
            if not patient:
                raise
            traceback.print_exc()
            sent.error = _one_line(error)
            records.forget()
            states.save(directory, tracker, sent)
            _wait(pause, ended if how is None else lambda: None)
            pause = min(2 * pause, LONGEST_PAUSE_SECS)
            continue
        if how is not None:
            return sent
        _wait(POLL_SECS, ended)


def _send_new(run: TrackedRun, tracker: str, directory: Path, sent: Sent, records: Records) -> None:
    if new := sent.new(records.read()):
        run.log(new)
        sent.note(new)
        states.save(directory, tracker, sent)


def _send_checkpoints(
    run: TrackedRun, tracker: str, directory: Path, sent: Sent, which: str
) -> None:
    for path in facts.checkpoints(directory, which):
        if path.name in sent.files:
            continue
        try:
            run.checkpoint(path)
        except OSError:
            if path.exists():
                raise
            continue  # A newer one has taken its place meanwhile.
        sent.files.append(path.name)
        states.save(directory, tracker, sent)


def _send_files(run: TrackedRun, tracker: str, directory: Path, sent: Sent) -> None:
    """Sends figures and tables; those of a run that trained on are sent again."""
    last = max(sent.steps.values(), default=0)
    for path in files.figures(directory):
        run.figure(path, last)
    for name in facts.FILES:
        if (directory / name).exists():
            run.file(directory / name)


def _wait(seconds: float, ended: Callable[[], str | None]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and ended() is None:
        time.sleep(min(0.1, seconds))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def only_follower(directory: Path, tracker: str, *, wait: bool) -> Iterator[None]:
    """Waits for an earlier follower of the same run, which may still be sending.

    Raises:
      UserError: there is one, and `wait` is False.
    """
    path = directory / DIRECTORY / f"{tracker}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows.
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{directory} is being sent to {tracker} already: wait for its training to end."
            ) from None
        yield


def main(tracker: str, run_directory: str, checkpoints: str, trainer_pid: str) -> None:
    """Is the process; the trainer speaks to its standard input: how the run ended, as one word.

    An input that ends without a word means that the trainer was killed.
    """
    words: list[str] = []

    def listen() -> None:
        words.append(sys.stdin.readline().strip() or "killed")
        if words[0] == "killed":
            time.sleep(LOCAL_ORPHAN_SECS if is_local(tracker) else ORPHAN_SECS)
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)  # The cores are training's.
    directory = Path(run_directory)
    with only_follower(directory, tracker, wait=True):
        follow(
            tracker,
            directory,
            checkpoints=checkpoints,
            ended=lambda: words[0] if words else None,
            trainer_pid=int(trainer_pid),
        )
