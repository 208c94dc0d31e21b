"""The program as people use it: curl, a browser, tritonclient, signals, dying workers."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cnnjax
from cnnjax.devices import backend
from cnnjax.run import load
from cnnjax.serve import Client, ServeError
from cnnjax.serve.runtime import program_of
from tests.export.browser import PROGRAM, opened_browser

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx"):
    pytest.importorskip(package)
pytestmark = pytest.mark.slow
# A Python that has tritonclient, which needs another protobuf than TensorFlow: of an environment of
# its own, by `pip install 'tritonclient[all]'`.
TRITON = os.environ.get("CNNJAX_TRITON_PYTHON", "")
# A Python that has openapi-python-client.
OPENAPI = os.environ.get("CNNJAX_OPENAPI_PYTHON", "")


class Program:
    """`cnnjax serve`, started: its process, its address, what it has printed."""

    def __init__(self, folder, *flags):
        self.errors = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cnnjax", "serve", "--port", "0", *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        self.printed = ""
        while not (found := re.search(r"http://\S+:\d+", self.printed)):
            line = self.process.stdout.readline()
            assert line, self.errors.read_text()
            self.printed += line
        self.address = found[0]

    def lines(self):
        return [json.loads(line) for line in self.errors.read_text().splitlines() if line[0] == "{"]

    def stop(self):
        """Sends SIGTERM and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def program(folder, *flags):
    started = Program(folder, *flags)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.process.terminate()
            started.process.wait(60)


@pytest.fixture(scope="module")
def served(run, tmp_path_factory):
    """A server of two versions, over HTTP and gRPC."""
    folder = tmp_path_factory.mktemp("program")
    flags = ["--run", f"digits={run}", "--max-batch", "4", "--prepare", "image", "--grpc-port"]
    with program(folder, *flags, free_port()) as started:
        yield started


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    Image.fromarray(cnnjax.data.load("mnist").test.image[0, ..., 0]).save(path)
    return path


def test_a_full_disk_costs_log_lines_and_no_answer(run, tmp_path):
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit")
    logs = [tmp_path / "serve.log", tmp_path / "audit.jsonl"]
    flags = ["--run", f"digits={run}", "--max-batch", "1", "--no-explain", "--no-watch"]
    with program(tmp_path, *flags, "--log", logs[0], "--audit-log", logs[1]) as started:
        process, image = started.process.pid, np.zeros((1, 28, 28, 1), np.uint8)
        client = Client(started.address)
        client.infer("digits", image)
        limits = resource.prlimit(process, resource.RLIMIT_FSIZE)
        # No file of this process may grow beyond this: its writes fail as on a full disk.
        resource.prlimit(process, resource.RLIMIT_FSIZE, (1, limits[1]))
        sizes = [path.stat().st_size for path in logs]
        for _ in range(20):
            assert client.infer("digits", image)["label"].shape == (1,)
        assert [path.stat().st_size for path in logs] == sizes
        metrics = urllib.request.urlopen(f"{started.address}/metrics").read().decode()
        for name in ("cnnjax_log_lines_lost_total", "cnnjax_audit_lines_lost_total"):
            assert float(re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)[1]) >= 20
        resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
        client.infer("digits", image)
        for path, size in zip(logs, sizes, strict=True):
            assert path.stat().st_size > size and json.loads(path.read_text().splitlines()[-1])
        assert started.stop() == 0


def test_curl_gets_the_likeliest_classes(served, digit):
    curl = shutil.which("curl") or pytest.skip("no curl")
    url = f"{served.address}/v1/models/digits:predict"
    for words in (["-F", f"image=@{digit}"], ["--data-binary", f"@{digit}"]):
        done = subprocess.run([curl, "-sS", *words, url], capture_output=True, check=True)
        classes = json.loads(done.stdout)["classes"]
        assert len(classes) == 3 and classes[0]["probability"] >= classes[1]["probability"]


def test_the_page_shows_classes_and_their_map_in_a_browser(served, digit, tmp_path):
    if PROGRAM is None:
        pytest.skip("no chromium")
    with opened_browser(tmp_path / "profile") as page:
        page.call(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        page.call("Page.navigate", url=served.address)
        page.wait("document.querySelectorAll('#model option').length == 1")
        content = list(digit.read_bytes())
        # As the browser does when a file is dropped.
        page.value(
            f"""(() => {{
              const files = new DataTransfer();
              const file = new File([new Uint8Array({content})], "d.png", {{type: "image/png"}});
              files.items.add(file);
              const drop = new DragEvent("drop", {{dataTransfer: files, cancelable: true}});
              document.getElementById("drop").dispatchEvent(drop);
            }})()"""
        )
        page.wait("document.querySelectorAll('#classes tr').length == 5")
        page.wait("document.getElementById('heat').naturalWidth == 28")
        shown = page.value("document.querySelector('#classes tr.shown td').textContent")
        best = Client(served.address).predict("digits", digit).class_names[0]
        assert shown == best
        assert best in page.value("document.getElementById('of').textContent")
        page.value("document.querySelectorAll('#classes tr')[1].click()")
        page.wait("document.querySelectorAll('#classes tr')[1].className.includes('shown')")
        page.picture(tmp_path / "page.png")
        # What is no image is said, and the answer of before is gone.
        page.value("file = new File(['x'], 'x.txt'); classify()")
        page.wait("document.getElementById('state').textContent.includes('not an image')")
        assert page.value("document.getElementById('answer').hidden")
        assert not [each for each in page.events if each["method"] == "Runtime.exceptionThrown"]


def test_tritonclient_finds_every_method(served, run, digit, tmp_path):
    if not TRITON:
        pytest.skip("CNNJAX_TRITON_PYTHON names no Python with tritonclient")
    images = cnnjax.data.load("mnist").test.image[:4]
    backend.enable_compilation_cache()
    trained = load.load_classifier(run)
    # The optimizations of a user's server, which tests have turned off.
    options = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    program_ = program_of(trained).lower(trained.variables, {"image": images})
    logits, probabilities = program_.compile(options)(trained.variables, {"image": images})
    png = np.frombuffer(digit.read_bytes(), np.uint8)
    expected = {"images": images, "logits": logits, "probabilities": probabilities, "png": png}
    np.savez(tmp_path / "expected.npz", **expected)
    grpc_address = re.search(r"gRPC\s+at (\S+)", served.printed)[1]
    words = [Path(__file__).with_name("triton_conformance.py"), served.address[len("http://") :]]
    words += [grpc_address, tmp_path / "expected.npz", "digits"]
    done = subprocess.run([TRITON, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("conforms\n"), done.stdout + done.stderr


def test_the_client_that_is_generated_of_the_description_finds_every_method(
    served, digit, tmp_path
):
    if not OPENAPI:
        pytest.skip("CNNJAX_OPENAPI_PYTHON names no Python with openapi-python-client")
    script = Path(__file__).with_name("openapi_conformance.py")
    words = [OPENAPI, str(script), served.address, str(tmp_path), "digits", str(digit)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("conforms\n"), done.stdout + done.stderr


def test_nothing_compiles_after_the_start(served, digit):
    client = Client(served.address)
    for count in (1, 2, 3, 4, 5, 9):
        client.infer("digits", np.zeros((count, 28, 28, 1), np.uint8))
    client.predict("digits", digit)
    metrics = client._http.get("/metrics").text
    before = re.search(r"cnnjax_compilations_total (\S+)", metrics)[1]
    for count in (1, 2, 3, 4, 5, 9):
        client.infer("digits", np.ones((count, 28, 28, 1), np.uint8))
    client._http.post("/v1/models/digits:explain", content=digit.read_bytes())
    metrics = client._http.get("/metrics").text
    assert re.search(r"cnnjax_compilations_total (\S+)", metrics)[1] == before


def hammered(address, secs, during, threads=4):
    """Returns (seconds, error) of the requests of some threads while something happens."""
    told, over = [], threading.Event()

    def ask():
        client = Client(address, timeout_secs=20)
        image = np.zeros((1, 28, 28, 1), np.uint8)
        while not over.is_set():
            began = time.monotonic()
            try:
                client.infer("digits", image)
                error = ""
            except ServeError as refusal:
                error = str(refusal)
            told.append((time.monotonic() - began, error))

    running = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in running:
        thread.start()
    time.sleep(1)
    during()
    time.sleep(secs)
    over.set()
    for thread in running:
        thread.join()
    return told


def test_a_damaged_checkpoint_keeps_the_old_one_and_sigterm_drains(run, tmp_path):
    copy = tmp_path / "lenet"
    shutil.copytree(run, copy)
    flags = ["--run", f"digits={copy}", "--max-batch", "2", "--no-explain", "--queue", "2000"]
    with program(tmp_path, *flags) as started:
        client = Client(started.address, timeout_secs=60)
        image = np.zeros((1, 28, 28, 1), np.uint8)
        before = client.infer("digits", image)["logits"]
        for file in (copy / "checkpoints").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[:10])
        with pytest.raises(ServeError, match="the old one goes on answering") as error:
            client.load("digits")
        assert error.value.status == 400
        np.testing.assert_array_equal(client.infer("digits", image)["logits"], before)

        answers = []

        def ask():
            answers.append(client.infer("digits", np.zeros((512, 28, 28, 1), np.uint8)))

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        time.sleep(0.3)
        assert started.stop() == 0
        for thread in asking:
            thread.join()
        assert [each["logits"].shape for each in answers] == [(512, 10)] * 2
        events = [line["event"] for line in started.lines()]
        assert events[-1] == "stopped" and "stopping" in events


def test_a_killed_worker_is_started_again_and_its_requests_are_asked_again(run, tmp_path):
    flags = ["--run", f"digits={run}", "--max-batch", "1", "--no-explain", "--workers", "2"]
    with program(tmp_path, *flags) as started:

        def workers():
            return [line for line in started.lines() if line["event"] == "worker_started"]

        while [line["event"] for line in started.lines()].count("ready") < 2:
            time.sleep(0.1)

        def kill():
            os.kill(workers()[0]["process"], signal.SIGKILL)

        told = hammered(started.address, 3, kill)
        assert len(told) > 20 and not [error for _, error in told if error]
        assert max(secs for secs, _ in told) < 5
        assert len(workers()) == 3
        (died,) = [line for line in started.lines() if line["event"] == "worker_died"]
        assert died["code"] == -signal.SIGKILL
        # A change that any worker is asked for is made in all of them.
        client = Client(started.address, timeout_secs=60)
        client.unload("digits")
        states = [Client(started.address).models()[0]["state"] for _ in range(8)]
        assert states == ["UNAVAILABLE"] * 8
        assert started.stop() == 0
