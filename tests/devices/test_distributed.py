"""Several real processes over loopback: the numbers of one, one run directory, one end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cnnjax import checkpoint
from cnnjax.devices import channel
from cnnjax.devices import processes as distributed
from cnnjax.devices.channel import PEER_LOST_EXIT_CODE
from cnnjax.errors import UserError
from cnnjax.run.logs import read_metrics
from tests.devices import several

ROOT = Path(__file__).parents[2]
SMOKE = ("experiments.mnist_lenet", "--smoke", "--batch-size", "64")
# Quick to compile and to step, so that a signal comes in the middle of it.
LONG = ("experiments.classify", "--model", "mlp", "--classes", "3,8", "--epochs", "40")


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
        outputs = [process.communicate(timeout=580)[0] for process in running]
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
    items = ("params", "batch_stats", "opt_state", "progress")
    return checkpoint.restore_items(Path(directory) / "checkpoints", items)


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


def meet(*places):
    """What processes get that report as (num_processes, process_id), each in a thread."""
    address, results = f"localhost:{free_port()}", {}

    def come(number, num_processes, process_id):
        function = channel.report if process_id else channel.gather
        own = (process_id,) if process_id else ()
        try:
            results[number] = function(address, num_processes, *own, time.monotonic() + 20, 20)
        except UserError as error:
            results[number] = str(error)

    threads = [
        threading.Thread(target=come, args=(number, *place)) for number, place in enumerate(places)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(places))]


def test_each_process_is_told_that_the_counts_differ():
    assert (
        meet((3, 0), (2, 1))
        == ["process 1 has num_processes 2 and process 0 has 3: start all processes with the same."]
        * 2
    )


def test_each_process_is_told_that_two_have_one_number():
    assert (
        meet((4, 0), (4, 1), (4, 1))
        == ["two processes were started as --process-id 1: give each its own."] * 3
    )


def test_whatever_else_connects_is_no_process():
    address = f"localhost:{free_port()}"
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(channel.gather(address, 2, time.monotonic() + 20, 20))
    )
    waiting.start()
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process_id": 1}\n'):
        while True:
            try:
                stranger = socket.create_connection(("localhost", int(address[10:])))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        with stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            assert not stranger.recv(100)
    channel.report(address, 2, 1, time.monotonic() + 20, 20).close()
    waiting.join()
    assert list(found[0]) == [1]


# Several


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    """The same smoke run by one process of 8 devices and by two of 4."""
    directory = tmp_path_factory.mktemp("smoke")
    one, two = directory / "one", directory / "two"
    succeeded(run(*SMOKE, "--run-dir", one, processes=1, devices=8))
    outputs = succeeded(run(*SMOKE, "--run-dir", two, processes=2, devices=4))
    return one, two, outputs


def test_two_processes_agree():
    succeeded(run("tests.devices.several", "agree", ".", processes=2, devices=2))


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


@pytest.mark.exhaustive
def test_two_processes_of_4_devices_train_as_one_of_8(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for directory, processes in ((one, 1), (two, 2)):
        directory.mkdir()
        devices = 8 // processes
        succeeded(
            run("tests.devices.several", "train", directory, processes=processes, devices=devices)
        )
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
        for name in several.MODELS:
            expected = np.load(one / f"{name}-{dtype}.npz")
            found = np.load(two / f"{name}-{dtype}.npz")
            assert set(found) == set(expected)
            for leaf, value in expected.items():
                assert found[leaf].dtype == value.dtype
                # Biases near 0 are differences of larger numbers.
                scale = max(np.abs(value).max(), 0.1 if dtype == "float32" else 1e-30)
                assert np.abs(found[leaf] - value).max() < tolerance * scale, (name, dtype, leaf)


@pytest.mark.slow
def test_four_processes_save_and_any_number_restores(tmp_path):
    succeeded(run("tests.devices.several", "save", tmp_path, processes=4, devices=2))
    assert checkpoint.steps(tmp_path) == [3, 4]
    succeeded(run("tests.devices.several", "restore", tmp_path, processes=2, devices=2))
    several.restore(tmp_path)
    params = tmp_path / "00000004" / "params"
    assert len(list(params.glob("ocdbt.process_*"))) == 4
    plain = ocp.StandardCheckpointer().restore(params)
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, plain, several.sharded_state()["params"])
    files = [path for path in params.rglob("ocdbt.process_2/d/*") if path.stat().st_size]
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    assert checkpoint.restore_items(tmp_path, ("params",), warn=str)["step"] == 3
    several.save(tmp_path / "by one")
    succeeded(run("tests.devices.several", "restore", tmp_path / "by one", processes=2, devices=4))


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 1])
def test_sigterm_to_one_stops_all_at_the_same_step_and_one_process_goes_on(tmp_path, target):
    with started(*LONG, "--run-dir", tmp_path / "run", processes=2, devices=1) as running:
        wait_for_records(tmp_path / "run", 3, running)
        running[target].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [143, 143], outputs
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    records = read_metrics(tmp_path / "run")
    assert max(record["step"] for record in records) == step
    resume = (LONG[0], "--resume", tmp_path / "run")
    (output,) = succeeded(run(*resume, "--stop-after-epochs", 1, processes=1, devices=2))
    assert f"resumed      {tmp_path / 'run'} at step {step}" in output


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_killed_process_ends_the_other_and_both_resume_to_the_same_bits(tmp_path, target):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    short = (*LONG, "--epochs", "2", "--save-every-steps", "20")
    with started(*short, "--run-dir", killed, processes=2, devices=1) as running:
        while not checkpoint.steps(killed / "checkpoints"):
            time.sleep(0.05)
            assert all(process.poll() is None for process in running)
        running[target].kill()
        began = time.monotonic()
        output = running[1 - target].communicate(timeout=300)[0]
        assert time.monotonic() - began < 30
        # Without process 0 JAX may abort before the message is out.
        assert running[1 - target].returncode in (PEER_LOST_EXIT_CODE, *[-6] * (target == 0))
        assert f"process {target} of 2 at 127.0.0.1 ended" in output or target == 0
    assert not (killed / "summary.json").exists()
    outputs = succeeded(run(LONG[0], "--resume", killed, processes=2, devices=1))
    assert "resumed" in outputs[0]
    succeeded(run(*short, "--run-dir", straight, processes=2, devices=1))
    jax.tree.map(np.testing.assert_array_equal, final_state(straight), final_state(killed))
    assert (straight / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_different_settings_are_told(tmp_path):
    address = f"localhost:{free_port()}"
    results = []
    environment = os.environ | {"XLA_FLAGS": devices_flag(1), "PYTHONPATH": str(ROOT)}
    for index in range(2):
        argv = ["--coordinator", address, "--num-processes", 2, "--process-id", index]
        argv += ["--seed", index, "--run-dir", tmp_path / "run"]
        command = [sys.executable, "-m", "experiments.mnist_lenet", *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        results.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    outputs = [process.communicate(timeout=300)[0] for process in results]
    assert [process.returncode for process in results] == [2, 2]
    for output in outputs:
        assert errors(output) == [
            "error: process 1 was started with seed 1 and process 0 with 0: start all processes "
            "with the same settings."
        ]
    assert not (tmp_path / "run").exists()
