"""Processes that run the trials of a search on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Protocol

# The machine that a worker ran on has gone, and the worker with it.
LOST = "lost"
# The exit code of a trial; None where its process has ended, LOST where its machine has.
Answer = int | str | None


@dataclasses.dataclass(frozen=True)
class Request:
    """A trial that a worker is asked to run.

    Attributes:
      log: the file that its output goes to.
      argv: flags of the experiment.
      directory: of its run.
      costs: what is measured of it when it is finished: names of `costs.COSTS`.
    """

    log: str
    argv: tuple[str, ...]
    directory: str
    costs: tuple[str, ...] = ()


class Worker(Protocol):
    """What runs trials one after another, wherever it is.

    Attributes:
      number: counted from 0.
    """

    number: int

    def is_ready(self) -> bool:
        """Whether it could start a trial now."""

    def run(self, request: Request) -> None:
        """Starts a trial."""

    def answer(self) -> Answer:
        """Returns how the trial ended; raises `queue.Empty` while it runs."""

    def stop_trial(self) -> None:
        """Asks the trial to save and stop; the worker goes on."""

    def end(self) -> None:
        """Ends the worker."""


class Process:
    """A worker process of this machine: see `cnnjax.search.worker`."""

    def __init__(
        self,
        number: int,
        experiment: str,
        environment: Mapping[str, str],
        core: str = "",
        directory: str | None = None,
    ):
        self.number = number
        self.answers: SimpleQueue[int | None] = SimpleQueue()
        command = [sys.executable, "-m", "cnnjax.search.worker", experiment, str(os.getpid())]
        self._process = subprocess.Popen(
            [*command, *([core] if core else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
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

    def is_ready(self) -> bool:
        """It always is: what it is asked waits until it has started."""
        return True

    def run(self, request: Request) -> None:
        """Starts a trial."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Then `answer` says so.
            self._process.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
            self._process.stdin.flush()

    def answer(self) -> Answer:
        """Returns the exit code of the trial; None where the process has ended."""
        return self.answers.get_nowait()

    def stop_trial(self) -> None:
        """Asks the trial to save and stop."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def local(
    experiment: str,
    environments: Sequence[Mapping[str, str]] = ({},),
    cores: Sequence[str] = ("",),
) -> Callable[[int], Process]:
    """Returns `number -> worker` of this machine, which take environments and cores in turn."""

    def start(number: int) -> Process:
        environment, core = environments[number % len(environments)], cores[number % len(cores)]
        return Process(number, experiment, environment, core)

    return start
