"""Load: a run served here and by LitServe, single images as PNG and as tensors.

    python benchmarks/serve.py --run runs/mnist_lenet
    python benchmarks/serve.py --run runs/mnist_lenet --clients 1 8 64 256 --secs 10 --rounds 3

Each server is a process group of its own, stopped by signal while another is measured; they take
turns. `batching off` is one image at a time. Throughput is of a closed loop; p50 and p99 are of an
open loop, from when a request was due (see `load.py`), at the same rate for all servers: 80% of the
throughput of the slowest of them. CPU is the time of the server's processes per request of the
closed loop, which other work on the machine disturbs less. The generator shares the
machine's cores with the server. LitServe is left out where it is not installed
(`--litserve-python` names a Python that has it).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: its URL, the file that holds its body, its headers."""

    url: str
    body: Path
    headers: tuple[str, ...] = ()


class Server:
    """A server's processes, stopped while others are measured."""

    def __init__(self, name: str, words: Sequence[str], asked: dict[str, Asked]) -> None:
        """Args: its name, the command, and the requests by kind; waits until it answers."""
        self.name, self.asked = name, asked
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (as long as the process)
        self._process = subprocess.Popen(
            words, stdout=self._log, stderr=self._log, process_group=0, env=os.environ
        )
        self._wait_until_ready()
        self._signal(signal.SIGSTOP)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + 120
        asked = next(iter(self.asked.values()))
        while True:
            headers = dict(each.split(":", 1) for each in asked.headers)
            request = urllib.request.Request(asked.url, asked.body.read_bytes(), headers)
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                sys.exit(f"{self.name} does not answer: {self._log.read()[-2000:]}")
            time.sleep(0.5)

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
        return found | {"cpu_ms": 1e3 * used / sum(found["statuses"].values())}

    def _cpu_secs(self) -> float:
        """Returns the CPU time of the group's processes, those within the warm-up included."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._process.pid:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends the processes."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
        self._log.close()


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bodies(run: str, folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Writes the bodies of requests, and returns them with the headers of the binary tensor's."""
    from PIL import Image

    from cnnjax.run.files import read_json

    shape = tuple(read_json(Path(run) / "model.json", f"{run} is no run")["image_shape"])
    image = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image[0, ..., 0] if shape[-1] == 1 else image[0]).save(buffer, "PNG")
    content = image.tobytes()
    tensor: dict[str, Any] = {"name": "image", "shape": image.shape, "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": len(content)}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    lit = {"png": buffer.getvalue(), "tensor": content}
    lit_bodies = {
        name: json.dumps({name: base64.b64encode(each).decode()}).encode()
        for name, each in lit.items()
    }
    contents = {"png": buffer.getvalue(), "tensor": head + content}
    contents |= {f"litserve-{name}": each for name, each in lit_bodies.items()}
    for name, each in contents.items():
        (folder / name).write_bytes(each)
    header = f"Inference-Header-Content-Length:{len(head)}"
    return {name: folder / name for name in contents}, (header,)


@contextlib.contextmanager
def started(options: argparse.Namespace, folder: Path) -> Iterator[list[Server]]:
    """Starts every contender, and ends them."""
    found, headers = bodies(options.run, folder)
    servers: list[Server] = []
    try:
        for name, batch in (("cnnjax", 32), ("cnnjax, batching off", 1)):
            port = free_port()
            words = [sys.executable, "-m", "cnnjax", "serve", "--run", f"model={options.run}"]
            words += ["--port", str(port), "--max-batch", str(batch), "--prepare", "image"]
            words += ["--no-explain", "--log", os.devnull, "--queue", "512"]
            root = f"http://127.0.0.1:{port}"
            asked = {
                "png": Asked(f"{root}/v1/models/model:predict", found["png"]),
                "tensor": Asked(f"{root}/v2/models/model/infer", found["tensor"], headers),
            }
            servers.append(Server(name, words, asked))
        for name, batch in (("LitServe", 32), ("LitServe, batching off", 1)):
            if not has_litserve(options.litserve_python):
                print("LitServe is left out: it is not installed")
                break
            port = free_port()
            words = [options.litserve_python, str(HERE / "serve_litserve.py"), options.run]
            words += ["--port", str(port), "--max-batch", str(batch)]
            url = f"http://127.0.0.1:{port}/predict"
            kind = ("Content-Type:application/json",)
            asked = {
                each: Asked(url, found[f"litserve-{each}"], kind) for each in ("png", "tensor")
            }
            servers.append(Server(name, words, asked))
        yield servers
    finally:
        for server in servers:
            server.close()


def has_litserve(python: str) -> bool:
    """Whether a Python has LitServe."""
    return not subprocess.run([python, "-c", "import litserve"], capture_output=True).returncode


Rows = dict[tuple[str, int, str], list[dict[str, Any]]]


def table(rows: Rows) -> str:
    """Returns the medians over the rounds as a table in Markdown."""
    lines = [
        "| server | request | clients | requests/s | CPU ms | at rate | p50 ms | p99 ms "
        "| not 200 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, clients, name), rounds in sorted(rows.items()):
        rate, cpu, steady, p50, p99 = (
            statistics.median(each[column] for each in rounds)
            for column in ("throughput", "cpu_ms", "rate", "p50", "p99")
        )
        failed = sum(each["failed"] for each in rounds)
        lines.append(
            f"| {name} | {kind} | {clients} | {rate:.0f} | {cpu:.2f} | {steady:.0f} | {p50:.1f} | "
            f"{p99:.1f} | {failed} |"
        )
    return "\n".join(lines)


def compare(servers: Sequence[Server], kind: str, clients: int, secs: float, rows: Rows) -> None:
    """Measures every server's throughput, and then its latency at a rate that all of them have."""
    full = [server.measure(kind, clients, secs) for server in servers]
    rate = 0.8 * min(each["throughput"] for each in full)
    for server, most in zip(servers, full, strict=True):
        found = server.measure(kind, clients, secs, rate)
        failed = sum(
            count
            for each in (most, found)
            for status, count in each["statuses"].items()
            if status != "200"
        )
        columns = {"p50": found["p50"], "p99": found["p99"], "rate": rate, "failed": failed}
        rows.setdefault((kind, clients, server.name), []).append(most | columns)
        print(f"{server.name} {kind} {clients}: {json.dumps(most | columns)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every contender and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="a run directory of a classifier")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--secs", type=float, default=5.0, help="of each of the two loops")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", nargs="+", default=["png", "tensor"])
    parser.add_argument("--litserve-python", default=sys.executable)
    options = parser.parse_args(argv)
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder, started(options, Path(folder)) as servers:
        for _ in range(options.rounds):
            for clients in options.clients:
                for kind in options.requests:
                    compare(servers, kind, clients, options.secs, rows)
    print(f"load averages {os.getloadavg()} on {os.cpu_count()} cores\n\n{table(rows)}")


if __name__ == "__main__":
    main()
