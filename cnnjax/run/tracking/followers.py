"""What the trainer does for trackers: it starts their followers, and waits for them at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cnnjax.devices import processes
from cnnjax.errors import UserError, unknown_name
from cnnjax.run import record
from cnnjax.run.tracking import DIRECTORY, TRACKERS, follower
from cnnjax.run.tracking import sent as states

_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
from cnnjax.run.tracking import follower
follower.main(*sys.argv[2:])
"""


def check(trackers: Sequence[str]) -> None:
    """Raises a UserError for a tracker that is not known or not installed."""
    for name in trackers:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        found = importlib.util.find_spec(name)
        # A folder `wandb` in the working directory is no package.
        if found is None or found.origin is None:
            raise UserError(f"--track {name} needs a package: pip install 'cnnjax[{name}]'")


@contextlib.contextmanager
def following(
    trackers: Sequence[str], directory: Path, *, checkpoints: str, wait_secs: float
) -> Iterator[None]:
    """Has each tracker follow the run while training goes on inside; in the first process only.

    At the end it waits until all was sent, at most `wait_secs` seconds, and says what was. Nothing
    that a tracker does raises here.
    """
    if not (trackers and processes.is_first()):
        yield
        return
    started = {name: _start(name, directory, checkpoints) for name in dict.fromkeys(trackers)}
    status = "stopped"
    try:
        yield
        if (directory / record.SUMMARY).exists():
            status = "finished"
    finally:
        deadline = time.monotonic() + wait_secs
        for process in started.values():
            _tell(process, status)
        for name, process in started.items():
            _end(name, process, directory, deadline, processes.say)


def _start(tracker: str, directory: Path, checkpoints: str) -> subprocess.Popen[str] | None:
    """Returns the follower's process; None where none can be started: training goes on."""
    folder = directory / DIRECTORY
    package = str(Path(__file__).parent.parent.parent.parent)
    words = (tracker, str(directory), checkpoints, str(os.getpid()))
    try:
        folder.mkdir(exist_ok=True)
        with (folder / f"{tracker}.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, package, *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                # Ctrl-C is for the trainer, which then says that the run was stopped.
                start_new_session=True,
            )
    except OSError as error:
        processes.say(f"note         {tracker} does not follow this run: {error}")
        return None


def _tell(process: subprocess.Popen[str] | None, status: str) -> None:
    if process is not None and process.stdin is not None:
        with contextlib.suppress(OSError):  # It has ended.
            process.stdin.write(f"{status}\n")
            process.stdin.close()


def _end(
    name: str,
    process: subprocess.Popen[str] | None,
    directory: Path,
    deadline: float,
    say: Callable[[str], None],
) -> None:
    if process is None:
        return
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        if follower.is_local(name):
            say(f"note         {name} takes the rest of this run in the background")
            return
        # With what it has started itself.
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    sent = states.load(directory, name)
    if sent.done:
        say(f"tracked      {name}: {sent.place}")
        return
    why = sent.error or f"it did not answer in time, see {directory / DIRECTORY / name}.log"
    say(
        f"note         {name} has not taken all of this run ({why}); what it lacks is sent by "
        f"cnnjax track --run {directory} --track {name}"
    )
