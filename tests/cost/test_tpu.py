"""Programs for TPUs, where there is none: lowered for export, and compiled by libtpu."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import export

from cnnjax import models
from cnnjax.commands import cost as command
from cnnjax.cost import compiled, operations, tpu
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables

ROOT = Path(__file__).parent.parent.parent
SOME = ("lenet5", "resnet18", "mobilenet_v2", "vit_b_32")
# What only a CPU's programs may hold.
OF_CPUS = re.compile(r"onednn|__cpu|lapack|xla\.cpu")


def network(name, batch_size=8):
    shape, classes = models.input_shape(name), models.canonical_classes(name)
    fields = {"dtype": jnp.bfloat16} if "dtype" in models.model_fields(name) else {}
    model = models.create(name, num_classes=classes, **fields)
    image = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    return model, abstract_variables(model, shape), image, classes


def lowered(function, *forms):
    """Returns the program of a function for TPUs, as text; nothing is computed."""
    exported = export.export(jax.jit(function), platforms=["tpu"])(*forms)
    assert exported.platforms == ("tpu",)
    return exported.mlir_module()


def check_lowering(name):
    model, variables, image, classes = network(name)
    predict = lowered(lambda v, x: model.apply(v, x, train=False), variables, image)
    step, forms = compiled.training_step(model, variables, image, num_outputs=classes)
    train = lowered(step, *forms)
    for program in (predict, train):
        assert not OF_CPUS.search(program)
        assert "bf16" in program
    products = [program.count("stablehlo.convolution") + program.count("dot_general")
                for program in (predict, train)]  # fmt: skip
    # Each product of the forward pass has one or two more behind it.
    assert products[1] >= 2 * products[0] - 1 > 0


def test_the_steps_of_a_network_lower_for_a_tpu():
    check_lowering("lenet5")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SOME[1:], "unet_2015"])
def test_steps_of_larger_networks_lower_for_a_tpu(name):
    check_lowering(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in SOME])
def test_the_steps_of_every_network_lower_for_a_tpu(name):
    check_lowering(name)


def test_a_convolution_for_a_tpu_is_one_of_stablehlo():
    model, variables, image, _ = network("cnn_32_64", batch_size=64)
    program = lowered(lambda v, x: model.apply(v, x, train=False), variables, image)
    assert program.count("stablehlo.convolution") == 2


def test_the_peaks_of_a_chip_are_known_or_asked_for():
    class Chip:
        device_kind = "TPU v5 lite"

    assert tpu.peaks(Chip()).operations_per_sec == 197e12
    Chip.device_kind = "TPU v99"
    with pytest.raises(UserError, match="the peaks of TPU v99 are not known: give --device"):
        tpu.peaks(Chip())


def test_without_libtpu_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cnnjax\[tpu\]'"):
        tpu.described("v5e:2x2")


def test_layers_that_padding_wastes_are_named_by_what_they_compute():
    shapes = {"a": (3, 3, 1, 6), "b": (3, 3, 6, 64), "c": (64, 65), "d": (65, 129), "e": (129, 257)}
    params = {name: {"kernel": jax.ShapeDtypeStruct(each, "f")} for name, each in shapes.items()}
    products = {"a": 10, "b": 60, "c": 20, "d": 5, "e": 5}
    costs = [operations.LayerCost(name, count, 0, 0, 0) for name, count in products.items()]
    found = tpu.padded_layers(params, costs)
    # 64 of 128 and 129 of 256 are half; 257 of 384 is more.
    assert found == [("a", 6, 0.1)]
    assert tpu.describe_padded(found) == (
        "less than half of the 128 are filled by the channels of a (6): 10% of the "
        "multiply-accumulates"
    )
    assert tpu.describe_padded([]) == "every layer fills half or more of the 128 lanes"
    many = [tpu.Padded(f"conv{number}", 3, 0.01) for number in range(11)]
    assert "conv7 (3) and 3 more: 11%" in tpu.describe_padded(many)


def test_the_command_names_them(capsys):
    assert (
        command.main(["lenet5", "--lanes", "--no-train", "--device", "flops=1T,bandwidth=1G"]) == 0
    )
    # 6 x 24 x 24 x 25 + 16 x 8 x 8 x 150 + 10 x 84 of 281,640 multiply-accumulates.
    assert "channels of conv2 (16), conv1 (6), head (10): 86% of the" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "dtype"), [((), "float32"), (("--tpu", "v5e:2x2"), "bfloat16")])
def test_a_tpu_that_is_described_computes_as_one_that_is_there(flags, dtype):
    named = command._named(command._options(["lenet5", *flags]))
    assert jnp.dtype(named.dtype) == dtype
    assert jnp.dtype(named.model.dtype or "float32") == dtype


def cost(*flags):
    command = [sys.executable, "-m", "cnnjax", "cost", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


@pytest.mark.exhaustive
def test_the_compiler_of_tpus_compiles_both_steps():
    pytest.importorskip("libtpu")
    flags = ("--batch-size", "128", "--precision", "bfloat16", "--tpu", "v5e:2x2", "--json")
    done = cost("lenet5", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device"] == "1 x TPU v5 lite (described)" and "measured_secs" not in found
    assert found["train_memory"] > found["memory"] > 0
    done = cost("lenet5", "--tpu", "v5e:3x3x3x3")
    assert done.returncode == 2 and "libtpu has no such slice" in done.stderr
