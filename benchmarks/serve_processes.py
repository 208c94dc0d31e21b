"""A server that is measured: its processes, which rest while another has its turn."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
READY_SECS = 300


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: its URL, the file that holds its body, its headers."""

    url: str
    body: Path
    headers: tuple[str, ...] = ()


class Server:
    """A server's processes, stopped by signal while others are measured."""

    def __init__(self, name: str, words: Sequence[str], asked: Mapping[str, Asked]) -> None:
        """Starts it; args: its name, the command, and the requests by kind."""
        self.name, self.asked = name, dict(asked)
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (as long as the process)
        # All of them run this checkout's code, whatever their environments have.
        self._process = subprocess.Popen(
            words,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        )

    def wait_until_ready(self) -> None:
        """Waits until it answers, and lets it rest; the program ends where it does not."""
        end = time.monotonic() + READY_SECS
        asked = next(iter(self.asked.values()))
        while True:
            headers = dict(each.split(":", 1) for each in asked.headers)
            request = urllib.request.Request(asked.url, asked.body.read_bytes(), headers)
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    break
            if self._process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                sys.exit(f"{self.name} does not answer: {self._log.read()[-3000:]}")
            time.sleep(0.5)
        self._signal(signal.SIGSTOP)

    def measure(self, kind: str, clients: int, secs: float, rate: float = 0.0) -> dict[str, Any]:
        """Returns what `load.py` says of one kind of request, and the CPU time per request."""
        asked = self.asked[kind]
        words = [sys.executable, str(HERE / "load.py"), asked.url, "--body", str(asked.body)]
        words += ["--clients", str(clients), "--secs", str(secs), "--rate", str(rate)]
        for header in asked.headers:
            words += ["--header", header]
        self._signal(signal.SIGCONT)
        before = self._cpu_secs()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        used = self._cpu_secs() - before
        self._signal(signal.SIGSTOP)
        found = json.loads(done.stdout)
        asked_of_it = sum(found["statuses"].values()) + found["before"]
        return found | {"cpu_ms": 1e3 * used / asked_of_it}

    def _tree(self) -> dict[int, int]:
        """Returns the clock ticks of the process and all that come from it, by process."""
        parents, ticks = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                process = int(stat.parent.name)
                parents[process] = int(fields[1])
                ticks[process] = int(fields[11]) + int(fields[12])
        own = {self._process.pid}
        while more := {each for each, parent in parents.items() if parent in own} - own:
            own |= more
        return {each: ticks[each] for each in own if each in ticks}

    def _cpu_secs(self) -> float:
        """Returns the CPU time of the processes, that within the warm-up included."""
        return sum(self._tree().values()) / os.sysconf("SC_CLK_TCK")

    def _signal(self, number: int) -> None:
        for process in self._tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def close(self) -> None:
        """Ends the processes."""
        self._signal(signal.SIGCONT)
        own = self._tree()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for process in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
