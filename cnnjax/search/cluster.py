"""Workers on a Ray cluster: the same worker processes, started by an actor on whichever node.

The search itself, its study and its decisions stay in one process; nodes only run trials, whose
directories all of them see. When a node dies, its trials go on elsewhere from their last
checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

from cnnjax.errors import UserError
from cnnjax.paths import read_text
from cnnjax.search import worker
from cnnjax.search.workers import LOST, Answer, Process, Request

EXTRA = "pip install 'cnnjax[ray]'"
REACH_SECS = 5.0
# Without a machine for so long the search says that it waits.
PATIENCE_SECS = 30.0
TOKEN = ".cluster"


@contextlib.contextmanager
def connect(
    address: str, directory: Path, experiment: str, workers: int
) -> Iterator[tuple[int, Callable[[int], Remote]]]:
    """Connects to a cluster for as long as the context lasts.

    Args:
      address: HOST:PORT of its head, or `auto` for the cluster that this machine belongs to.
      directory: of the search, which all nodes must see at the same path.
      experiment: a module that can be imported on every node, from the directory of this process.
      workers: how many trials train at once; 0 for one a GPU of the cluster, or one a core if it
        has none.

    Yields:
      How many workers there may be, and `number -> worker`.

    Raises:
      UserError: Ray is not installed, or the cluster cannot be reached or has no cores.
    """
    ray = _initialized(address)
    token = uuid.uuid4().hex
    (directory / TOKEN).write_text(token, encoding="utf-8")
    try:
        found = ray.cluster_resources()
        gpus, cores = int(found.get("GPU", 0)), int(found.get("CPU", 0))
        if not cores:
            raise UserError(f"--address {address}: its nodes have no cores: start them with some")
        resources = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        started = _Started(resources, experiment, directory, token)
        yield workers or gpus or cores, started.worker
    finally:
        ray.shutdown()
        (directory / TOKEN).unlink(missing_ok=True)


def ray_module() -> Any:
    """Returns Ray. Raises UserError where it is not installed."""
    # A log of usage is sent nowhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"--engine ray needs Ray: {EXTRA}") from None
    return ray


def _initialized(address: str) -> Any:
    ray = ray_module()
    check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Of many types, depending on what is there.
        text = str(error).strip().partition(". ")[0].splitlines()[0]
        raise UserError(f"--address {address}: no Ray cluster can be used there ({text})") from None
    return ray


def check(address: str) -> None:
    """Raises UserError where Ray is not installed, or there is no cluster at the address."""
    _initialized(address).shutdown()


def check_reachable(address: str) -> None:
    """Raises UserError where nothing listens at HOST:PORT; Ray itself would try for long."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--address {address}: write HOST:PORT of the cluster's head, such as 10.0.0.1:6379 as "
            "`ray start --head` prints it, or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECS).close()
    except OSError as error:
        raise UserError(
            f"--address {address} cannot be reached ({error.strerror or error}): is the cluster's "
            "head there, as `ray start --head` started it?"
        ) from None


class _Started:
    """Makes workers, and says it once where there is no machine for any of them."""

    def __init__(self, resources: dict[str, int], experiment: str, directory: Path, token: str):
        self.resources, self.experiment = resources, experiment
        self.directory, self.token = directory, token
        self.last_ready = time.monotonic()
        self.has_said = False

    def worker(self, number: int) -> Remote:
        """Starts a worker as soon as there is a node with room for it."""
        actor = ray_module().remote(max_concurrency=2, max_restarts=0, **self.resources)(Node)
        arguments = (self.experiment, str(self.directory), self.token, os.getcwd())
        return Remote(number, actor.remote(*arguments), self)

    def note(self, is_ready: bool) -> None:
        """Notes that a worker waits for a node, or that it does not."""
        if is_ready:
            self.last_ready, self.has_said = time.monotonic(), False
        elif not self.has_said and time.monotonic() - self.last_ready > PATIENCE_SECS:
            print("waiting      for a node of the cluster with room for a trial", flush=True)
            self.has_said = True


class Node:
    """What runs on a node: an actor that holds one worker process."""

    def __init__(self, experiment: str, directory: str, token: str, working: str):
        path = Path(directory) / TOKEN
        try:
            found = read_text(path)
        except (OSError, UserError):
            found = ""
        self.problem = ""
        if found != token:
            self.problem = (
                f"node {platform.node()} does not see {directory} as this machine does: put --out "
                "on a file system that all nodes share"
            )
            return
        # A node's processes end with it, in the middle of a trial too, whose end Ray would await.
        threading.Thread(target=worker.end_with, args=(os.getppid(),), daemon=True).start()
        paths = [working, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.process = Process(
            0,
            experiment,
            {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            directory=working if Path(working).is_dir() else None,
        )

    def check(self) -> str:
        """Returns what is wrong with this node; "" for nothing."""
        return self.problem

    def run(self, request: Request) -> int | None:
        """Runs a trial to its end; returns its exit code, None where its process was killed."""
        self.process.run(request)
        return self.process.answers.get()

    def stop_trial(self) -> None:
        """Asks the trial to save and stop."""
        self.process.stop_trial()


class Remote:
    """A worker on some node, in the hands of an actor."""

    def __init__(self, number: int, actor: Any, started: _Started):
        self.number, self._actor, self._started = number, actor, started
        self._checked = actor.check.remote()
        self._answer: Any = None
        self._is_ready = False

    def is_ready(self) -> bool:
        """Whether it has been placed on a node; raises UserError where that node cannot be used."""
        if self._is_ready:
            return True
        ray = ray_module()
        if not ray.wait([self._checked], timeout=0)[0]:
            self._started.note(False)
            return False
        self._started.note(True)
        try:
            problem = ray.get(self._checked)
        except ray.exceptions.RayActorError:
            # The node died before it began: another.
            self._actor = self._started.worker(self.number)._actor
            self._checked = self._actor.check.remote()
            return False
        if problem:
            raise UserError(problem)
        self._is_ready = True
        return True

    def run(self, request: Request) -> None:
        """Starts a trial."""
        self._answer = self._actor.run.remote(request)

    def answer(self) -> Answer:
        """Returns the exit code of the trial; LOST where its node has died."""
        ray = ray_module()
        if not ray.wait([self._answer], timeout=0)[0]:
            raise Empty
        try:
            return ray.get(self._answer)
        except ray.exceptions.RayActorError:
            return LOST

    def stop_trial(self) -> None:
        """Asks the trial to save and stop."""
        self._actor.stop_trial.remote()

    def end(self) -> None:
        """Ends the actor; its process ends with it."""
        with contextlib.suppress(Exception):  # It may have gone with its node.
            ray_module().kill(self._actor)
