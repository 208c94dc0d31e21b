"""What a step takes of each device's memory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.data.streaming import stream_arrays
from cnnjax.devices import host
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated, state_shardings
from cnnjax.errors import UserError
from cnnjax.train import memory
from tests.tiny import BatchNormNet, random_arrays, setup

ARRAYS = random_arrays(64)
COMMAND = (sys.executable, "-m", "experiments.mnist_lenet")
# The program itself makes as many CPU devices as its mesh needs.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def planned(axes, *, stream=False, method="jit", rules=((".*kernel", (("fsdp", -1),)),)):
    mesh = make_mesh(axes)
    place = batch_sharding(mesh)
    if stream:
        data = stream_arrays(ARRAYS, 32, seed=0, sharding=place)
    else:
        data = ResidentPipeline(ARRAYS, 32, seed=0, sharding=place, replicated=replicated(mesh))
    state, make_step = setup(BatchNormNet(), ema_decay=0.9)
    form = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda: state),
        state_shardings(state, mesh, rules),
    )
    return memory.memory_plan(make_step, form, data, method=method, mesh=mesh)


def test_the_parts_of_a_plan_are_counted_from_shapes():
    whole, divided = planned("data=1"), planned("fsdp=2", stream=True)
    # Convolutions of 3x3 with 1 -> 4 -> 8 channels, two norms with scale and bias, a head of 10.
    kernels, rest = 4 * (9 * 4 + 9 * 4 * 8 + 8 * 10), 4 * (2 * 4 + 2 * 8 + 10)
    assert whole.parameters == whole.optimizer == whole.averages == kernels + rest
    assert divided.parameters == divided.optimizer == divided.averages == kernels // 2 + rest
    assert whole.statistics == divided.statistics == 4 * 2 * (4 + 8)
    example = 28 * 28 + 4 + 1
    assert whole.data == 64 * (example - 1) + 32 * example
    assert divided.data == 4 * 16 * example
    assert whole.total == sum((3 * whole.parameters, whole.statistics, whole.data, whole.workspace))
    # The first convolution's output, which the gradient needs, is 14 x 14 x 4.
    assert whole.workspace > 32 * 14 * 14 * 4 * 4
    assert divided.workspace < whole.workspace
    assert whole.available == host.memory_bytes()
    assert divided.available == whole.available // 2


def test_a_plan_of_chunks_holds_the_examples_once():
    assert planned(1, method="scan").data == 64 * (28 * 28 + 4)


def test_what_does_not_fit_is_an_error_that_says_what_to_do():
    small = memory.MemoryPlan(*[10**6] * 6, available=10**6, title="one device")
    assert "does not fit" in memory.format_plan(small)
    with pytest.raises(UserError, match=r"needs 6\.00 MB on each device, and 1\.00 MB are avail"):
        memory.check_fits(small)
    unknown = dataclasses.replace(small, available=None)
    memory.check_fits(unknown)
    assert memory.format_plan(unknown).endswith("unknown")


def test_bytes_of_a_tree_are_those_of_one_device():
    place = jax.sharding.NamedSharding(make_mesh(8), jax.sharding.PartitionSpec("data"))
    tree = {"a": jnp.zeros((8, 3)), "b": jax.device_put(jnp.zeros((16, 2), jnp.bfloat16), place)}
    assert memory.device_bytes(tree) == 8 * 3 * 4 + 2 * 2 * 2
    assert memory.device_bytes({"key": jax.random.key(0), "none": None}) == 0


@pytest.mark.slow
def test_remat_and_parts_show_in_the_plan_of_the_command_line():
    def megabytes(*flags):
        command = ["-m", "experiments.classify", "--smoke", "--plan", "--model", "cifar_resnet20"]
        result = subprocess.run(
            [sys.executable, *command, *flags], capture_output=True, text=True, check=True
        )
        (line,) = (line for line in result.stdout.splitlines() if "activations" in line)
        return float(line.split()[-2].replace(",", ""))

    plain = megabytes()
    assert megabytes("--remat") < 0.7 * plain
    assert megabytes("--accumulate", "4") < 0.6 * plain


@pytest.mark.slow
def test_the_command_line_plans_trains_and_resumes_on_another_mesh(tmp_path):
    directory = tmp_path / "run"

    def run(*flags):
        return subprocess.run([*COMMAND, *flags], capture_output=True, text=True, env=ENVIRONMENT)

    planned = run("--smoke", "--mesh", "data=2,model=2", "--plan", "--run-dir", directory)
    assert planned.returncode == 0, planned.stderr
    assert "memory of each device (4 x cpu, data=2,model=2, step by jit)" in planned.stdout
    assert "fits" in planned.stdout
    assert not directory.exists()

    saving = ("--save-every-steps", "8", "--run-dir", directory)
    first = run("--smoke", "--mesh", "data=2,model=2", *saving)
    assert first.returncode == 0, first.stderr
    assert "data=2,model=2 in use, step by jit" in first.stdout
    scores = json.loads((directory / "summary.json").read_text())
    # As a kill after step 8 leaves it.
    (directory / "summary.json").unlink()
    shutil.rmtree(directory / "checkpoints/00000016")
    second = run("--resume", directory, "--mesh", "fsdp=4")
    assert second.returncode == 0, second.stderr
    assert "at step 8" in second.stdout
    assert "fsdp=4 in use, step by jit" in second.stdout
    again = json.loads((directory / "summary.json").read_text())
    assert again["step"] == scores["step"] == 16
    assert again["test_loss"] == pytest.approx(scores["test_loss"], rel=0.02)

    for flags in (["--mesh", "data=8,devices=2"], ["--mesh", "data=4", "--devices", "2"]):
        refused = run("--smoke", *flags)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
