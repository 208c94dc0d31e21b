"""The benchmark of all families: means, bounds, tables, what a network's layers are; a tiny run."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjax import models

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import operations  # noqa: E402
import operations_jax  # noqa: E402
import peer_jax  # noqa: E402
import peer_report  # noqa: E402
import workloads  # noqa: E402
import zoo  # noqa: E402
import zoo_bounds  # noqa: E402
import zoo_networks  # noqa: E402
import zoo_operations  # noqa: E402
import zoo_report  # noqa: E402

sys.path.remove(str(BENCHMARKS))

CONV = {"kernel": (3, 3), "features": 8, "strides": (2, 2), "pads": ((1, 1), (1, 1)), "groups": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--networks", "mobilenet_v4"], "unknown network 'mobilenet_v4': did you mean mobilenet_"),
        (["--operations", "resnet"], "unknown network 'resnet': did you mean resnet"),
        (["--contenders", "tourch"], "unknown contender 'tourch': did you mean torch"),
        (["--modes", "training"], "unknown mode 'training': did you mean train?"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--batch-size", "-8"], "--batch-size -8: give 1 or more"),
        (["--seconds", "0"], "--seconds 0: give a positive number"),
        (["--json", "nowhere/b.json"], "nowhere/b.json: there is no directory nowhere"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        zoo.main(flags)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith(f"error: {message}") and printed.err.count("\n") == 1
    assert printed.out == ""


def test_networks_have_families_peers_and_batches():
    assert set(zoo_networks.DEFAULT) <= set(zoo_networks.names())
    assert all(zoo_networks.has_peer(name) for name in zoo_networks.DEFAULT)
    lacking = zoo_networks.without_peer()
    assert {"mobilenet_v1", "nfnet_f0", "airbench94", "unet", "se_resnet50"} <= set(lacking)
    assert not {"vgg19_bn", "resnet18_cifar", "regnet_x_32gf"} & set(lacking)
    assert zoo_networks.workload("resnet18_cifar").image_shape == (32, 32, 3)
    assert zoo_networks.workload("resnet18").image_shape == (224, 224, 3)
    assert zoo_networks.workload("lenet5").cpu_batch_size == 64
    assert zoo_networks.workload("inception_v3").cpu_batch_size == 8
    families = {"efficientnet_b7": "efficientnet", "resnext101_32x8d": "resnext", "unet": "unet"}
    assert {name: zoo_networks.family(name) for name in families} == families


def row(contender, ms=(), **fields):
    return peer_report.Row("vgg16", "train", "float32", 8, contender, ms=list(ms), **fields)


def entry(network, family, ours, theirs, **fields):
    rows = {"cnnjax": row("cnnjax", [ours], **fields), "torch": row("torch", [theirs])}
    bound = zoo_bounds.Bound(flop_ms=2.0, byte_ms=0.5)
    return zoo_report.Entry(network, family, "train", rows, bound, has_peer=True)


def test_families_count_once_in_the_geometric_mean():
    assert zoo_report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(zoo_report.geometric_mean([]))
    # Members of 1 and 4 make a family of 2; with one of 0.5 the mean is 1.
    entries = [entry("a", "x", 1, 1), entry("b", "x", 1, 4), entry("c", "y", 2, 1)]
    ratios = zoo_report.family_ratios(entries, "train")
    assert ratios == {"x": pytest.approx(2.0), "y": pytest.approx(0.5)}
    said = zoo_report.conclusion(entries, ["train", "infer"]).splitlines()
    assert said[0].startswith("training step: 1.00 times as fast as PyTorch")
    assert said[0].endswith("the worst is y, 0.500. By the fastest rounds: 1.00.")
    assert said[1] == "inference: no network was measured beside PyTorch."


def test_the_table_shows_costs_bounds_and_what_is_missing():
    measured = entry("vgg16", "vgg", 4.0, 8.0, compile_secs=3.0, start_secs=2.0, first_secs=5.0)
    alone = zoo_report.Entry(
        "unet",
        "unet",
        "train",
        {"cnnjax": row("cnnjax", [4.0]), "torch": row("torch", trouble="missing: torch")},
        zoo_bounds.Bound(0.5, 1.0),
        has_peer=False,
        load=3.66,
        cores=2,
    )
    lines = zoo_report.markdown([measured, alone], "train").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert len({len(line) for line in cells}) == 1
    header, _, first, second = cells
    first, second = dict(zip(header, first, strict=True)), dict(zip(header, second, strict=True))
    assert first["ms"] == "4.00" and first["x PyTorch"] == "2.00" and first["x lax"] == "-"
    assert first["compile, s"] == "3.00" and first["first step, s"] == "7.00"
    assert first["x bound"] == "2.00" and first["note"] == "bound by FLOPs"
    assert second["x PyTorch"] == "-" and second["x bound"] == "4.00"
    assert second["note"] == "bound by bytes; load 3.7; no peer; torch: missing: torch"


def test_the_fastest_rounds_have_a_ratio_of_their_own():
    rows = {"cnnjax": row("cnnjax", [2.0, 9.0]), "torch": row("torch", [4.0, 3.0])}
    both = zoo_report.Entry("a", "a", "train", rows, zoo_bounds.Bound(1.0, 1.0), has_peer=True)
    assert both.least_ratio == 1.5 and both.ratio == pytest.approx((2.0 + 1 / 3) / 2)
    alone = both._replace(rows={"cnnjax": rows["cnnjax"]})
    assert math.isnan(alone.least_ratio) and alone.record()["least_ratio"] is None


def test_bounds_follow_from_counts():
    workload = workloads.Workload("mlp", {}, (28, 28, 1), 10, 64, 64)
    facts = models.summary(models.create("mlp", num_classes=10), (28, 28, 1))
    assert facts.macs == sum(row.parameters - row.output_shape[-1] for row in facts.rows)
    infer = zoo_bounds.step_cost(workload, 4, "infer")
    train = zoo_bounds.step_cost(workload, 4, "train")
    assert infer.flops == 2 * 4 * facts.macs and train.flops == 3 * infer.flops
    outputs = sum(row.output_shape[-1] for row in facts.rows)
    assert infer.bytes == 4 * (2 * 4 * outputs + facts.parameters)
    assert train.bytes == 4 * (5 * 4 * outputs + 8 * facts.parameters)
    bound = zoo_bounds.bound(zoo_bounds.Cost(6e9, 1e9), zoo_bounds.Machine(300.0, 40.0))
    assert bound == (pytest.approx(20.0), pytest.approx(25.0))
    assert bound.ms == pytest.approx(25.0) and bound.name == "bytes"


def test_time_within_the_compiler_is_counted_once():
    assert peer_jax.covered([]) == 0.0
    assert peer_jax.covered([(5.0, 6.0), (0.0, 3.0), (1.0, 2.0), (2.0, 4.0)]) == 5.0


def kinds(name, mode="train"):
    workload = zoo_networks.workload(name)
    found, modules = operations_jax.collect(workload, 2, mode)
    counts = {}
    for operation, count in found.values():
        counts[operation.label] = counts.get(operation.label, 0) + count
    assert set(modules) <= set(found)
    return counts, [operation for operation, _ in found.values()]


def test_every_layer_of_a_network_is_found_once():
    counts, found = kinds("mobilenet_v3_small")
    assert counts == {
        "convolution": 1,
        "batch norm": 34,
        "1x1 convolution": 22,
        "depthwise convolution": 11,
        "squeeze-excite": 9,
        "activation": 24,
        "sum": 6,
        "dense": 2,
        "global average pool": 1,
    }
    assert [each.first for each in found].count(True) == 1
    assert kinds("mobilenet_v3_small", "infer")[0] == counts
    counts, found = kinds("lenet5")
    assert counts == {"convolution and pool": 2, "dense": 3, "activation": 2}
    assert found[0].shapes == ((2, 28, 28, 1),)
    assert found[0].details == "5x5, to 6, bias, relu, max"


def test_an_operation_survives_its_key():
    operation = operations.Operation("convolution", ((8, 14, 14, 32),), {**CONV, "groups": 32})
    again, mode = operations.read_mode(operations.mode_of(operation, "infer"))
    assert again.key == operation.key and mode == "infer" and again.shapes == operation.shapes
    assert again.label == "depthwise convolution" and again.details == "3x3, to 8, stride 2"


def test_lost_time_is_summed_by_kind():
    conv = operations.Operation("convolution", ((8, 14, 14, 32),), CONV)
    norm = operations.Operation("batch norm", ((8, 14, 14, 32),), {})
    measured = [
        zoo_operations.Measured(norm, "train", 1, [1.0], [2.0]),
        zoo_operations.Measured(conv, "train", 3, [9.0, 2.0], [1.0, 1.5]),
        zoo_operations.Measured(norm, "train", 2, [1.0], [], "torch: missing"),
    ]
    assert measured[1].ms == (2.0, 1.0) and measured[1].lost_ms == 3.0
    assert math.isnan(measured[2].lost_ms)
    sums = list(zoo_operations.sums_by_kind(measured))
    assert sums == [("convolution", 3, 6.0, 3.0), ("batch norm", 1, 1.0, 2.0), ("all", 4, 7.0, 5.0)]
    lines = zoo_operations.operations_table(measured).splitlines()
    assert lines[2].startswith("| convolution | 8x14x14x32 | 3x3, to 8, stride 2 | 3 | 2.00 | 1.00")
    assert "| -1.00 |" in lines[3] and lines[4].endswith("| torch: missing |")
    assert "| all | 4 | 7.00 | 5.00 | 0.714 | 2.00 |" in zoo_operations.kinds_table(measured)


IMAGE = ((2, 8, 8, 6),)
POOL = {"window": (3, 3), "strides": (2, 2), "pads": ((0, 1), (0, 1))}
GATE = {"features": 2, "activation": "relu", "gate": "hard_sigmoid"}
FUNCTIONS = [
    operations.Operation("sum", IMAGE * 2, {}),
    operations.Operation("concatenation", IMAGE * 2, {}),
    operations.Operation("scale", IMAGE, {}),
    operations.Operation("global average pool", IMAGE, {}),
    operations.Operation("activation", IMAGE, {"activation": "hard_swish"}),
    operations.Operation("channel shuffle", IMAGE, {"parts": 2}),
    operations.Operation("max pool", IMAGE, POOL),
    operations.Operation("average pool", IMAGE, POOL),
]


@pytest.mark.parametrize("mode", workloads.MODES)
def test_operations_run_alone(mode):
    for operation in FUNCTIONS:
        operations_jax.prepare(operation, mode, None)(1)
    found, modules = operations_jax.collect(zoo_networks.workload("lenet5"), 2, mode)
    for key in list(modules)[:1]:
        operations_jax.prepare(found[key][0], mode, modules[key])(1)


@pytest.mark.parametrize("mode", workloads.MODES)
def test_peers_operations_run_alone(mode):
    pytest.importorskip("torch")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import operations_torch
    finally:
        sys.path.remove(str(BENCHMARKS))
    conv = {**CONV, "dilation": (1, 1), "bias": True}
    layers = [
        operations.Operation("convolution", IMAGE, {**conv, "pads": ((0, 1), (0, 1))}, True),
        operations.Operation("convolution and pool", IMAGE, {**conv, **GATE, "pool": "max"}),
        operations.Operation("squeeze-excite", IMAGE, GATE),
        operations.Operation("batch norm", IMAGE, {}),
        operations.Operation("layer norm", IMAGE, {}),
        operations.Operation("dense", IMAGE, {"features": 3, "bias": True}),
    ]
    for operation in [*FUNCTIONS, *layers]:
        for layout in operations_torch.LAYOUTS.values():
            operations_torch.prepare(operation, mode, layout)(1)


@pytest.mark.slow
def test_a_tiny_run_writes_tables_and_json(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "zoo.py"), "--smoke"]
    command += ["--json", str(tmp_path / "zoo.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "### training step" in done.stdout and "### inference" in done.stdout
    assert "| lenet5 | 8 |" in done.stdout and "No peer in PyTorch" in done.stdout
    record = json.loads((tmp_path / "zoo.json").read_text())
    rows = {(each["contender"], each["mode"]): each for each in record["rows"]}
    for mode in workloads.MODES:
        ours, torch = rows["cnnjax", mode], rows["torch", mode]
        assert 0 < ours["compile_secs"] < ours["first_secs"]
        assert ours["start_secs"] > 0 and ours["peak_mib"] > 0
        if importlib.util.find_spec("torch") is None:
            assert torch["trouble"] == "missing: needs the package torch"
        else:
            assert torch["trouble"] == "" and torch["ms"]


@pytest.mark.slow
def test_a_tiny_run_of_the_operations():
    command = [sys.executable, str(BENCHMARKS / "zoo.py"), "--operations", "lenet5"]
    command += ["--rounds", "1", "--seconds", "0.01", "--batch-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "### lenet5: training step, batch 2, forward and backward" in done.stdout
    # Two layers in each mode; without PyTorch there is nothing to add up by kind.
    peer = importlib.util.find_spec("torch") is not None
    assert done.stdout.count("| convolution and pool |") == (6 if peer else 4)
