"""Several real processes over loopback: the numbers of one, one run directory, one end."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cnnjax import checkpoint, distributed
from cnnjax.errors import UserError
from cnnjax.logs import read_metrics

ROOT = Path(__file__).parent.parent
SMOKE = ("experiments.mnist_lenet", "--smoke", "--batch-size", "64")


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def devices_flag(count):
    return (
        f"--xla_force_host_platform_device_count={count}"
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )


@contextlib.contextmanager
def started(module, *argv, processes, devices):
    """Starts a module as so many processes of so many devices each; kills what is left of them."""
    address = f"localhost:{free_port()}"
    environment = os.environ | {"XLA_FLAGS": devices_flag(devices), "PYTHONPATH": str(ROOT)}
    running = []
    try:
        for index in range(processes):
            launch = ("--coordinator", address, "--num-processes", processes, "--process-id", index)
            command = [sys.executable, "-m", module, *map(str, (*launch, *argv))]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def run(module, *argv, processes, devices):
    """Returns (exit code, output) of each process."""
    with started(module, *argv, processes=processes, devices=devices) as running:
        outputs = [process.communicate(timeout=240)[0] for process in running]
        return [(p.returncode, out) for p, out in zip(running, outputs, strict=True)]


def succeeded(results):
    for code, output in results:
        assert code == 0, output
    return [output for _, output in results]


def errors(output):
    return [line for line in output.splitlines() if line.startswith("error: ")]


def assert_metrics_close(first, second, tolerance):
    records = [read_metrics(directory) for directory in (first, second)]
    assert len(records[0]) == len(records[1]) > 16
    for one, other in zip(*records, strict=True):
        assert (one["step"], one["kind"]) == (other["step"], other["kind"])
        for name in set(one) - {"step", "kind"}:
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), one


def wait_for_records(directory, count, running):
    path = Path(directory) / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        time.sleep(0.05)
        assert all(process.poll() is None for process in running)


def final_state(directory):
    items = checkpoint.restore_items(
        Path(directory) / "checkpoints", ("params", "batch_stats", "opt_state", "ema", "progress")
    )
    return jax.tree.map(np.asarray, items)


# One process


def test_one_process_agrees_with_itself():
    assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)
    assert distributed.exchange("x", 3) == [3]
    assert distributed.from_first("x", "y") == "y"
    assert distributed.agreed("stop", lambda: "SIGTERM")() == "SIGTERM"
    distributed.check_same("settings", {"seed": 1})
    with pytest.raises(SystemExit) as stop:
        distributed.end(143)
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", 2, 0), "'nowhere' is no address: give HOST:PORT"),
        (("localhost:1", 0, 0), "num_processes is 0"),
        (("localhost:1", 2, 2), "process_id is 2, but 2 .* are numbered 0 to 1"),
        (("localhost:1", 2, -1), "process_id is -1"),
        (("auto", 2, -1), "need an address: give --coordinator"),
        (("off", 0, 1), "need an address: give --coordinator"),
    ],
)
def test_wrong_counts_and_missing_parts_are_told_at_once(arguments, words):
    with pytest.raises(UserError, match=words):
        distributed.start(*arguments)


def test_an_ordinary_machine_is_not_asked_for_its_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_")):
            monkeypatch.delenv(name)
    distributed.start()
    # A shell inside an allocation is no step of several tasks.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    distributed.start()
    assert distributed.count() == 1


def test_a_slurm_step_knows_its_place(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[007-009],other",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.create_connection", refuse)
    with pytest.raises(UserError, match=r"process 2 could not reach the coordinator node007:61441"):
        distributed.start(timeout_secs=0.3)


def refuse(address, timeout):
    raise ConnectionRefusedError(111, "Connection refused")


def test_an_unreachable_coordinator_is_told_in_time():
    with pytest.raises(UserError, match=r"could not reach .* within 0.5 s \(Connection refused\)"):
        distributed.start(f"localhost:{free_port()}", 2, 1, timeout_secs=0.5)


def test_a_process_that_never_comes_is_named():
    address = f"localhost:{free_port()}"
    with pytest.raises(UserError, match=f"1 of 3 processes came to {address} .* process 1, 2 did"):
        distributed.start(address, 3, 0, timeout_secs=0.5)


def test_a_port_in_use_is_told():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot listen at the coordinator {address}"):
            distributed.start(address, 2, 0, timeout_secs=0.5)


# Several


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """The same smoke run by one process of 8 devices and by two of 4."""
    directory = tmp_path_factory.mktemp("smoke")
    one, two = directory / "one", directory / "two"
    succeeded(run(*SMOKE, "--run-dir", one, processes=1, devices=8))
    outputs = succeeded(run(*SMOKE, "--run-dir", two, processes=2, devices=4))
    return one, two, outputs


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(smoke_runs):
    one, two, outputs = smoke_runs
    assert_metrics_close(one, two, 1e-4)
    names = [sorted(path.name for path in directory.iterdir()) for directory in (one, two)]
    assert names[0] == names[1]
    assert "test         accuracy" in outputs[0]
    assert "accuracy" not in outputs[1]
    settings = [json.loads((d / "config.json").read_text())["settings"] for d in (one, two)]
    assert {k: v for k, v in settings[0].items() if k != "run_dir"} == {
        k: v for k, v in settings[1].items() if k != "run_dir"
    }
