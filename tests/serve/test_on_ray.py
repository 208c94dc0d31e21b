"""The application on a Ray Serve of this machine: replicas come with load and go again."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import cnnjax

pytest.importorskip("ray.serve")
pytest.importorskip("httpx")

CLIENTS, PATIENCE_SECS = 24, 400.0
FLAGS = (
    *("--ray", "1:3", "--ray-cpus", "0.3", "--ray-requests", "2", "--ray-upscale", "3"),
    *("--ray-downscale", "10", "--no-explain", "--no-watch-embeddings", "--max-batch", "8"),
)


@contextlib.contextmanager
def serving(run, log):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cnnjax", "serve", "--run", f"lenet={run}"]
    environment = os.environ | {"XLA_FLAGS": "", "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--port", str(port), *FLAGS], stdout=file, stderr=file, env=environment
        )
    try:
        until(lambda: "serving " in log.read_text() or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_SECS) == 0


def until(holds):
    deadline = time.monotonic() + PATIENCE_SECS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.exhaustive
def test_replicas_come_with_load_and_go_again(tmp_path):
    import httpx
    import ray
    from ray import serve

    run, statuses, stop = tmp_path / "lenet", [], threading.Event()
    train = [sys.executable, "-m", "experiments.mnist_lenet", "--smoke", "--run-dir", str(run)]
    subprocess.run(train, check=True, capture_output=True)
    pixels = cnnjax.data.load("mnist").test.image[:32].ravel().tolist()
    tensor = {"name": "image", "shape": [32, 28, 28, 1], "datatype": "UINT8", "data": pixels}
    # Written once: to ask must cost less than to answer.
    content = json.dumps({"inputs": [tensor]}).encode()
    with serving(run, tmp_path / "log") as port:
        ray.init(address="auto", log_to_driver=False)

        def running():
            found = serve.status().applications["cnnjax"].deployments["cnnjax"].replica_states
            return {str(getattr(key, "value", key)): count for key, count in found.items()}.get(
                "RUNNING", 0
            )

        def ask():
            url = f"http://127.0.0.1:{port}/v2/models/lenet/infer"
            with httpx.Client(timeout=120) as client:
                while not stop.is_set():
                    statuses.append(client.post(url, content=content).status_code)

        try:
            assert running() == 1
            with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
                asking = [pool.submit(ask) for _ in range(CLIENTS)]
                try:
                    until(lambda: running() == 3)
                finally:
                    stop.set()
                for each in asking:
                    each.result()
            until(lambda: running() == 1)
        finally:
            ray.shutdown()
    assert set(statuses) <= {200, 429} and statuses.count(200) > 100
