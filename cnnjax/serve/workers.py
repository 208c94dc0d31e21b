"""Several processes at one port: started, watched, restarted, stopped.

The parent listens and computes nothing; each worker inherits its socket, loads all models, and
takes connections once they are warm. A worker that dies is started again; the connections that it
had break at once, and the others take the new ones. SIGTERM to the parent drains all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError
from cnnjax.serve.logs import log

# A worker that dies again and again is started after 0.1, 0.2 ... seconds, until it lives for 60.
FIRST_PAUSE_SECS, LONGEST_PAUSE_SECS, WELL_SECS = 0.1, 30.0, 60.0
PROGRAM = "import sys; from cnnjax.commands import serve; sys.exit(serve.work(sys.argv[1]))"


@dataclasses.dataclass(frozen=True)
class Place:
    """What a worker is told of where it is.

    Attributes:
      socket_fd: of the socket that all workers take connections from.
      alive_fd: of a pipe that ends when the parent does.
      folder: that all workers share.
      number: of the worker, from 0.
    """

    socket_fd: int
    alive_fd: int
    folder: str
    number: int


def check_count(count: int) -> None:
    """Raises a UserError for a number of workers out of range."""
    if not 1 <= count <= 256:
        raise UserError(f"--workers {count}: give 1 to 256 processes.")
    if count > 1 and not hasattr(os, "fork"):
        raise UserError(f"--workers {count}: this system shares no sockets; leave it out.")


async def supervise(count: int, sock: socket.socket, settings: dict[str, Any]) -> int:
    """Keeps so many workers alive until SIGTERM or SIGINT; returns the exit code.

    Args:
      count: of workers.
      sock: that listens.
      settings: of the command, which workers are given as JSON.
    """
    with tempfile.TemporaryDirectory(prefix="cnnjax-serve-") as folder:
        alive, kept = os.pipe()
        os.set_inheritable(alive, True)
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        places = [Place(sock.fileno(), alive, folder, number) for number in range(count)]
        tasks = [asyncio.create_task(_keep(places[0], settings, stopping))]
        try:
            # What keeps one from starting keeps all: it is said once.
            while not tasks[0].done() and not any(Path(folder).glob("ready-*")):
                await asyncio.wait(tasks, timeout=0.1)
            if not stopping.is_set():
                tasks += [
                    asyncio.create_task(_keep(each, settings, stopping)) for each in places[1:]
                ]
            codes = await asyncio.gather(*tasks)
        finally:
            os.close(kept)
            os.close(alive)
    return max(codes)


async def _keep(place: Place, settings: dict[str, Any], stopping: asyncio.Event) -> int:
    """Runs one worker, again and again; returns the exit code of the last."""
    pause = FIRST_PAUSE_SECS
    stopped = asyncio.create_task(stopping.wait())
    is_first = True
    while True:
        began = time.monotonic()
        worker = await _start(place, settings)
        ended = asyncio.create_task(worker.wait())
        await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()
            # One that has not started yet has not learned to drain.
            return 0 if (code := await ended) == -signal.SIGTERM else abs(code)
        code = ended.result()
        _forget(worker.pid, Path(place.folder))
        if is_first and not _was_ready(worker.pid, Path(place.folder)):
            # It cannot start at all, and has said why.
            stopping.set()
            return abs(code) or 1
        is_first = False
        log("worker_died", worker=place.number, process=worker.pid, code=code)
        pause = FIRST_PAUSE_SECS if time.monotonic() - began > WELL_SECS else pause
        await asyncio.wait({stopped}, timeout=pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECS)
        if stopped.done():
            return 0


async def _start(place: Place, settings: dict[str, Any]) -> asyncio.subprocess.Process:
    told = json.dumps({"place": dataclasses.asdict(place), "settings": settings})
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": place.folder}
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        told,
        pass_fds=(place.socket_fd, place.alive_fd),
        env=environment,
    )
    log("worker_started", worker=place.number, process=worker.pid)
    return worker


def say_ready(folder: str) -> None:
    """Notes that this worker has been ready: if it dies, it is started again."""
    (Path(folder) / f"ready-{os.getpid()}").touch()


def _was_ready(process: int, folder: Path) -> bool:
    return (folder / f"ready-{process}").exists()


def _forget(process: int, folder: Path) -> None:
    """Removes what a dead worker said of itself; what it has counted stays."""
    from prometheus_client import multiprocess

    (folder / f"made-{process}").unlink(missing_ok=True)
    multiprocess.mark_process_dead(process, str(folder))


async def until_orphaned(alive_fd: int) -> None:
    """Waits until the parent has died, however it died."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def read() -> None:
        if not os.read(alive_fd, 1) and not ended.done():
            loop.remove_reader(alive_fd)
            ended.set_result(None)

    loop.add_reader(alive_fd, read)
    await ended
