"""The processes of `peers.py` and `zoo.py`: workers, their machine, and the MNIST experiment."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from workloads import Task

HERE = Path(__file__).resolve().parent
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")


class WorkerError(Exception):
    """A contender that cannot take part, and why: one line."""


class StoppedProcess:
    """A process that answers lines by lines, stopped by signal whenever it has nothing to do.

    A stopped process cannot spin in an idle thread pool. It is a process group of its own, so that
    the compilers and workers that it starts stop with it, and so that the system ends it should
    this process die.
    """

    def __init__(self, script: str, spec: dict[str, Any], device: str, patience_secs: float):
        self._patience_secs = patience_secs
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
            env=environment(device),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> dict[str, Any]:
        """Waits for the preparation; returns what the worker says of itself."""
        facts = self._answer()["ready"]
        self._stop()
        return facts

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to one request."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self._stop()
        return answer

    def close(self) -> None:
        """Ends the process; closing twice does no harm."""
        if self._log.closed:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], self._patience_secs)
        if not readable:
            raise WorkerError(f"no answer within {self._patience_secs:g} s (see --patience)")
        line = self._process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
            code = self._process.returncode
            raise WorkerError(f"ended with exit status {code}: {self._last_words()}")
        answer = json.loads(line)
        for trouble in ("missing", "failed"):
            if trouble in answer:
                raise WorkerError(f"{trouble}: {answer[trouble]}")
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it said nothing"

    def _stop(self) -> None:
        """Returns when the process has stopped: until its last thread has, it takes time."""
        self._signal(signal.SIGSTOP)
        if hasattr(os, "waitid"):  # Not on macOS before Python 3.13.
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class Worker(StoppedProcess):
    """One contender's process."""

    def __init__(
        self,
        task: Task,
        modes: Sequence[str],
        seconds: float,
        patience_secs: float,
        variant: str | None = None,
        *,
        least: bool = False,
    ):
        """Starts it to prepare `modes`, each in the fastest of its variants, or only in `variant`.

        A mode that is not prepared is prepared when it is measured first. `least`: times are the
        least of many short ones, not means.
        """
        spec = {"task": task._asdict(), "modes": list(modes), "seconds": seconds}
        spec |= {"variant": variant, "least": least, "started": time.time()}
        super().__init__("peer_worker.py", spec, task.device, patience_secs)

    def measure(self, mode: str, seconds: float, *, last: bool = False) -> dict[str, Any]:
        """Returns one measurement: seconds per step, wall and CPU.

        The last of a mode frees it.
        """
        return self.ask({"mode": mode, "seconds": seconds, "last": last})


def environment(device: str) -> dict[str, str]:
    """Returns the workers' environment: their device; on a GPU, which they share, memory as needed.

    Whatever else the user has set is left alone.
    """
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    variables = {"TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ | {"PYTHONPATH": path}
    if device == "cpu":
        return variables | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # One GPU for all: not every contender would use several.
    return {
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    } | variables


def gpu_name() -> str | None:
    """Returns the name of the first NVIDIA GPU, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
    )
    names = done.stdout.strip().splitlines()
    return names[0] if done.returncode == 0 and names else None


def machine(device: str) -> dict[str, Any]:
    """Names the processor, its cores and instructions, the GPU in use, the system and Python."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
    found = [each for each in INSTRUCTIONS if each in flags.split()]
    processor = f"{name}, {cores} core{'s' * (cores > 1)} in use"
    if found:
        processor += f", {' '.join(found)}"
    if device == "gpu":
        processor = f"{gpu_name()} ({processor})"
    return {
        "processor": processor,
        "cores": cores,
        "device": device,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def seconds_to_mnist(accuracy: float, device: str, cache: Path) -> tuple[float | None, int, float]:
    """Runs the LeNet experiment until its validation accuracy reaches `accuracy`.

    Args:
      accuracy: between 0 and 1.
      device: "cpu" or "gpu".
      cache: where compiled programs are kept; an empty directory makes a cold start.

    Returns:
      (seconds since the command was given or None if never reached, epochs done, the best
      accuracy seen). Imports, compilation and reading the data are included.
    """
    with tempfile.TemporaryDirectory() as directory:
        run_directory = Path(directory) / "run"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.mnist_lenet", "--run-dir", str(run_directory)],
            cwd=HERE.parent,
            env=environment(device) | {"XDG_CACHE_HOME": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while True:
                ended = process.poll() is not None
                scores = _validation_accuracies(run_directory / "metrics.jsonl")
                if scores and max(scores) >= accuracy:
                    return time.perf_counter() - start, len(scores), max(scores)
                if ended:
                    if process.returncode:
                        raise RuntimeError(f"the experiment ended with status {process.returncode}")
                    return None, len(scores), max(scores, default=0.0)
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()


def _validation_accuracies(path: Path) -> list[float]:
    try:
        text = path.read_text()
    except OSError:
        return []
    # The last line may be half written.
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [record["accuracy"] for record in records if record["kind"] == "validation"]
