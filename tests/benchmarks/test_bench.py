"""The benchmarks: what they count, what they choose, what they say; slow: tiny real runs."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cnnjax import models
from cnnjax.trees import count_parameters

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import input_pipelines  # noqa: E402
import peer_jax  # noqa: E402
import peer_processes  # noqa: E402
import peer_report  # noqa: E402
import peer_worker  # noqa: E402
import peers  # noqa: E402
import workloads  # noqa: E402

sys.path.remove(str(BENCHMARKS))

WORKLOADS = workloads.WORKLOADS


class Clock:
    """Time that passes only when someone works."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def work(self, call_secs, step_secs):
        """Returns a run of so many seconds a call and so many more a step."""

        def run(num_steps):
            self.now += call_secs + num_steps * step_secs
            return 0.0

        return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads", "lenet"], "unknown workload 'lenet': did you mean lenet5"),
        (["--contenders", "tourch"], "unknown contender 'tourch': did you mean torch"),
        (["--modes", "training"], "unknown mode 'training': did you mean train?"),
        (["--precisions", "fp32"], "unknown precision 'fp32': did you mean tf32"),
        (["--precisions", "tf32"], "precision tf32 exists on a GPU only: use float32 or bf16"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--seconds", "-1"], "--seconds -1: give a positive number"),
        (["--json", "nowhere/b.json"], "nowhere/b.json: there is no directory nowhere"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        peers.main(["--device", "cpu", *flags])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1
    assert printed.out == ""


def test_input_benchmark_refuses_what_it_cannot_stream(capsys):
    with pytest.raises(SystemExit) as stop:
        input_pipelines.main(["--dataset", "folder:photos", "--devices", "1"])
    assert stop.value.code == 2
    assert "--dataset 'folder:photos': give mnist or tfds:NAME" in capsys.readouterr().err


@pytest.mark.parametrize("call_secs", [0.0, 0.2])
def test_a_measurement_fills_its_time_with_steps(monkeypatch, call_secs):
    run = Clock(monkeypatch).work(call_secs, 0.001)
    timing = peer_worker.measure(run, 2.0)
    elapsed = call_secs + 0.001 * timing.num_steps
    assert 1.0 <= elapsed <= 2.5
    assert timing.wall_secs == pytest.approx(elapsed / timing.num_steps)


def test_a_step_longer_than_the_time_is_measured_once(monkeypatch):
    timing = peer_worker.measure(Clock(monkeypatch).work(0.0, 5.0), 2.0)
    assert (timing.num_steps, timing.wall_secs) == (1, 5.0)


def test_the_least_time_leaves_pauses_out(monkeypatch):
    clock = Clock(monkeypatch)
    pauses = iter([0.5, 0.0, 0.3, 0.0])

    def run(num_steps):
        clock.now += next(pauses, 0.2) + num_steps * 0.0001
        return 0.0

    timing = peer_worker.measure_least(run, 2.0)
    assert timing.wall_secs == pytest.approx(0.0001)
    assert 0.5 + 2.0 <= clock.now <= 0.5 + 2.0 + 0.3


def test_the_fastest_way_is_chosen_whatever_its_preparation_takes(monkeypatch):
    clock = Clock(monkeypatch)

    def slow_to_prepare():
        clock.now += 30.0
        return clock.work(0.0, 0.001)

    def broken():
        raise RuntimeError("no compiler\nmore")

    prepared = peer_worker.prepare(
        {"eager": lambda: clock.work(0.0, 0.002), "broken": broken, "compiled": slow_to_prepare},
        1.0,
    )
    assert prepared.variant == "compiled"
    assert prepared.first_secs == pytest.approx(30.001)
    assert prepared.trials == {
        "eager": pytest.approx(0.002),
        "compiled": pytest.approx(0.001),
        "broken": "RuntimeError: no compiler",
    }
    with pytest.raises(RuntimeError, match="no compiler"):
        peer_worker.prepare({"broken": broken}, 1.0)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peer_worker.importlib.util, "find_spec", lambda name: None)
    task = workloads.Task(WORKLOADS["lenet5"], "torch", "float32", "cpu", 8)
    with pytest.raises(ModuleNotFoundError) as missing:
        peer_worker.build(task)
    assert missing.value.name == "torch"


def row(contender, ms=(), **fields):
    return peer_report.Row("lenet5", "train", "float32", 64, contender, ms=list(ms), **fields)


def test_ratios_are_taken_round_by_round():
    # The second round was disturbed: both took ten times as long.
    fast, slow = row("cnnjax", [1.0, 10.0, 1.0]), row("torch", [3.0, 30.0, 3.0])
    assert peer_report.speed_ratio(fast, slow) == pytest.approx(3.0)
    assert math.isnan(peer_report.speed_ratio(fast, row("torch")))
    assert math.isnan(peer_report.speed_ratio(fast, None))
    assert peer_report.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.0)


def test_the_table_shows_ratios_and_what_is_missing():
    rows = [
        row("cnnjax", [2.0, 4.0, 3.0], cpu_ms=[5.0, 5.0, 5.0], num_parameters=44426),
        row("torch", [6.0, 12.0, 9.0], cpu_ms=[6.0, 6.0, 6.0], num_parameters=44426),
        row("keras-jax", trouble="missing: needs the package keras"),
    ]
    lines = peer_report.markdown(rows).splitlines()
    assert lines[0] == "### lenet5: training step, batch 64, float32, 44,426 parameters in each"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    header, _, ours, torch, keras = cells
    assert len({len(line) for line in cells}) == 1
    ours, torch = dict(zip(header, ours, strict=True)), dict(zip(header, torch, strict=True))
    assert ours["ms"] == "3.00" and ours["min"] == "2.00" and ours["CPU ms"] == "5.00"
    assert ours["images/s"] == "21,333" and ours["x PyTorch eager"] == "3.00"
    assert ours["x plain Flax"] == "-" and torch["x PyTorch eager"] == "1.00"
    assert keras[0] == "keras-jax" and keras[-1] == "missing: needs the package keras"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.0123"), (1.0, "1.00"), (43.21, "43.2"), (1234.5, "1,234"), (math.nan, "-")],
)
def test_numbers_have_three_digits(value, text):
    assert peer_report.figure(value) == text


def test_other_networks_and_devices_are_not_compared():
    facts = {"platform": "cpu", "num_parameters": 44426}
    peers.check_comparable(facts, "cpu", [row("cnnjax", num_parameters=44426), row("torch")])
    with pytest.raises(peers.WorkerError, match="has 44,426 parameters, the others 44,427"):
        peers.check_comparable(facts, "cpu", [row("cnnjax", num_parameters=44427)])
    with pytest.raises(peers.WorkerError, match="runs on the cpu"):
        peers.check_comparable(facts, "gpu", [])


@pytest.mark.parametrize("name", WORKLOADS)
def test_plain_flax_has_the_parameters_of_our_models(name):
    workload = WORKLOADS[name]
    image = jax.ShapeDtypeStruct((2, *workload.image_shape), np.float32)

    def count(model):
        variables = jax.eval_shape(
            lambda key, image: model.init(key, image, train=False), jax.random.key(0), image
        )
        return count_parameters(variables["params"])

    ours = models.create(workload.model, num_classes=workload.num_classes, **workload.arguments)
    assert count(ours) == count(peer_jax.plain_flax_model(workload.model, workload.num_classes))


@pytest.mark.parametrize("name", ["lenet5", "cnn_32_64_dense64"])
def test_plain_flax_computes_what_our_models_compute(name):
    image = jax.random.normal(jax.random.key(1), (3, 28, 28, 1))
    ours = models.create(name, num_classes=10)
    params = ours.init(jax.random.key(0), image)["params"]
    names = {"conv": "Conv", "dense": "Dense"}
    renamed = {
        f"{names[key[:-1]]}_{int(key[-1]) - 1}": leaf
        for key, leaf in params.items()
        if key != "head"
    }
    dense = sum(key.startswith("Dense") for key in renamed)
    renamed[f"Dense_{dense}"] = params["head"]
    theirs = peer_jax.plain_flax_model(name, 10).apply({"params": renamed}, image, train=False)
    np.testing.assert_allclose(theirs, ours.apply({"params": params}, image), atol=1e-5)


def test_data_are_whole_batches():
    image, label = workloads.load_data(WORKLOADS["resnet18"], 16)
    assert image.shape == (16 * workloads.SYNTHETIC_BATCHES, 32, 32, 3)
    assert image.dtype == np.uint8 and set(label) <= set(range(10))
    image, label = workloads.load_data(WORKLOADS["lenet5"], 64)
    assert len(image) == len(label) == 60_000 // 64 * 64
    floats = workloads.standardize(image)
    assert floats.dtype == np.float32
    assert floats.mean() == pytest.approx(0.0, abs=1e-3)
    assert floats.std() == pytest.approx(1.0, abs=1e-3)


def test_verdicts_name_the_stage_that_starves_the_step():
    stages = {
        input_pipelines.READ: [50.0],
        input_pipelines.DECODE: [5.0],
        input_pipelines.HOST_AUGMENT: [20.0],
        input_pipelines.TRANSFER: [900.0],
    }
    trained = {
        input_pipelines.STEP_ALONE: [10.0],
        input_pipelines.WHOLE_EPOCH: [12.0],
        "resident": [8.0],
        "stream_arrays": [9.5],
        "stream_tfds": [4.0],
        "stream_arrays, augmented on the host": [6.0],
    }
    alone = {"resident": [99.0], "stream_arrays": [80.0], "stream_tfds": [5.0]}
    step, resident, arrays, tfds, augmented = input_pipelines.verdicts(stages, alone, trained)
    assert "eats 10 images/s" in step
    assert "resident: starves the step (80%" in resident and "an epoch a call saves" in resident
    assert arrays == "stream_arrays: feeds the step (95% of its speed)."
    assert tfds.startswith("stream_tfds: starves the step (40% of its speed); its slowest stage is")
    assert "to decode, 5 images/s" in tfds
    assert "no stage alone is slower" in augmented and "host" in augmented


def state_of(process_id):
    """Returns the letter by which Linux reports a process's state; T is stopped."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_that_waits_is_stopped_and_ends_with_its_context():
    task = workloads.Task(WORKLOADS["lenet5"], "flax-loop", "float32", "cpu", 8)
    with peer_processes.Worker(task, ["infer"], 0.05, 300.0) as worker:
        facts = worker.ready()
        assert facts["num_parameters"] == 44426 and facts["platform"] == "cpu"
        process_id = worker._process.pid
        assert state_of(process_id) == "T"
        answer = worker.measure("infer", 0.05)
        assert answer["wall_secs"] > 0 and answer["cpu_secs"] > 0
        assert state_of(process_id) == "T"
    assert not Path(f"/proc/{process_id}").exists()


@pytest.mark.slow
def test_a_tiny_run_writes_table_json_and_figure(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--device", "cpu", "--rounds", "2"]
    command += ["--workloads", "lenet5", "--contenders", "cnnjax", "flax-loop", "flax-scan"]
    command += ["--seconds", "0.05", "--batch-size", "8", "--no-mnist"]
    command += ["--json", str(tmp_path / "b.json"), "--figure", str(tmp_path / "b.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "### lenet5: training step, batch 8, float32, 44,426 parameters in each" in done.stdout
    assert "### lenet5: inference, batch 8" in done.stdout
    record = json.loads((tmp_path / "b.json").read_text())
    rows = {(each["contender"], each["mode"]): each for each in record["rows"]}
    # One compiled loop is a way to train: inference is the same call for both.
    assert ("flax-loop", "infer") in rows and ("flax-scan", "infer") not in rows
    for each in rows.values():
        assert each["trouble"] == "" and len(each["ms"]) == len(each["cpu_ms"]) == 2
        assert min(each["ms"]) > 0
        assert set(each) == {field.name for field in dataclasses.fields(peer_report.Row)}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["torch", "keras"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_peers_have_the_parameters_of_our_models(peer, name):
    pytest.importorskip(peer)
    workload = WORKLOADS[name]
    ours = models.create(workload.model, num_classes=workload.num_classes, **workload.arguments)
    image = jax.ShapeDtypeStruct((2, *workload.image_shape), np.float32)
    variables = jax.eval_shape(ours.init, jax.random.key(0), image)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        if peer == "torch":
            from peer_torch import torch_model

            weights = torch_model(workload.model, workload.num_classes).parameters()
        else:
            from peer_keras import keras_model

            model = keras_model(workload.model, workload.image_shape, workload.num_classes)
            weights = model.trainable_weights
    finally:
        sys.path.remove(str(BENCHMARKS))
    assert sum(math.prod(weight.shape) for weight in weights) == count_parameters(
        variables["params"]
    )


@pytest.mark.exhaustive
def test_a_tiny_run_of_the_input_benchmark():
    command = [sys.executable, str(BENCHMARKS / "input_pipelines.py"), "--rounds", "1"]
    command += ["--seconds", "0.05", "--batch-size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("decode", "transfer to the device", "stream_tfds, augmented on the host"):
        assert f"| {name} |" in done.stdout
    verdicts = done.stdout.strip().splitlines()[-5:]
    assert all("feeds the step" in line or "starves the step" in line for line in verdicts)


@pytest.mark.slow
def test_the_cost_of_saving_is_measured():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "saving.py"), "--smoke", "--devices", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "without saving",
        "with saving",
        "saving costs",
    ]
    assert "2 MB a checkpoint" in lines[0]
