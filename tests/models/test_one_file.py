"""A network is one file: in the package, or anywhere that Python can import from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cnnjax import models
from cnnjax.commands.models import main
from cnnjax.errors import UserError
from cnnjax.models.rows import package_rows
from cnnjax.train.step import with_axis

ROOT = Path(__file__).parents[2]

# 3x3 convolutions of 8 and 16 channels with BatchNorm, at 8x8x3 pixels, and ten classes:
# 8 * 27 + 2 * 8 + 16 * 72 + 2 * 16 + 16 * 10 + 10 parameters, 64 * (8 * 27 + 16 * 72) + 160 MACs.
FILE = '''
"""A network of two stages."""

import functools

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.layers import Layers
from cnnjax.models.rows import row


class Tiny(nn.Module):
    """Two stages of one block."""

    widths: tuple = (8, 16)
    num_classes: int | None = 10
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image, *, train=False):
        layers = self.layers.factories(train=train)
        stages = [[functools.partial(blocks.ConvNorm, width, 3)] for width in self.widths]
        return blocks.classify(blocks.run_stages(image, stages, layers), self.num_classes, layers)


tiny = functools.partial(row, Tiny, source="by hand", image=(8, 8, 3), num_classes=10)
ROWS = {
    "tiny": tiny(1_586, 48, 87_712),
    "tiny_wrong": tiny(1_587, 48, 87_712),
    "tiny_group": tiny(1_586, 0, 87_712, norm="group"),
}
'''


@pytest.fixture(params=["cnnjax.models.tiny_network", "tiny_network"])
def prefix(request, tmp_path, monkeypatch):
    """What precedes the names of the rows of a file in the package, and of one elsewhere."""
    (tmp_path / "tiny_network.py").write_text(FILE)
    if request.param == "tiny_network":
        monkeypatch.syspath_prepend(tmp_path)
        yield "tiny_network:"
    else:
        monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
        monkeypatch.setattr(models, "MODELS", package_rows("cnnjax.models"))
        yield ""
        del models.tiny_network
    del sys.modules[request.param]


def test_it_is_created_listed_and_counted(prefix, capsys):
    names = [f"{prefix}{name}" for name in ("tiny", "tiny_group", "tiny_wrong")]
    assert models.list_models(f"{prefix}tiny*") == names
    assert models.input_shape(names[0]) == (8, 8, 3)
    assert models.canonical_classes(names[0]) == 10
    assert models.presets(names[1]) == {"norm": "group"}
    assert models.model_fields(names[1])["norm"] == "group"
    for name in names[:2]:
        assert models.check_sizes(name).macs == 87_712
    with pytest.raises(UserError, match="parameters 1,587 in its row, 1,586 in the network"):
        models.check_sizes(names[2])
    assert main([names[0]]) == 0
    assert "Tiny()" in capsys.readouterr().out
    with pytest.raises(UserError, match="tiny_wrong: parameters 1,587"):
        main([names[2]])
    assert main([f"{prefix}tiny*"]) == 0
    assert "87,712" in capsys.readouterr().out


def test_it_takes_the_arguments_of_all_networks(prefix):
    model = models.create(
        f"{prefix}tiny", num_classes=3, widths=(4,), norm="group", activation="tanh", remat=True
    )
    assert models.stage_names(model, (8, 8, 3)) == ["stage1"]
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert jax.eval_shape(model.apply, variables, image).shape == (2, 3)
    assert models.fields(with_axis(model, "data"))["axis_name"] == "data"
    message = r"tiny\(nrom=group\)': unknown argument 'nrom': did you mean norm"
    with pytest.raises(UserError, match=message):
        models.create(f"{prefix}tiny", num_classes=3, nrom="group")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:tiny", "no module 'no_such_module': a model of your own is MODULE:NAME"),
        ("cnnjax.errors:tiny", "module cnnjax.errors has no network"),
        ("cnnjax.models.vgg:vgg61", "unknown model 'cnnjax.models.vgg:vgg61': did you mean"),
        (":vgg16", "'' is no module's name"),
    ],
)
def test_what_is_not_found_is_named(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        models.create(name, num_classes=3)


def test_two_files_may_not_have_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "tiny_network.py").write_text(FILE.replace('"tiny"', '"vgg16"'))
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    with pytest.raises(UserError, match="has a model 'vgg16', which exists already"):
        package_rows("cnnjax.models")
    del sys.modules["cnnjax.models.tiny_network"], models.tiny_network


def test_fields_are_read_and_set_wherever_they_stand():
    model = models.create("convnext_tiny", num_classes=3, norm_epsilon=0.5)
    assert models.fields(model)["norm_epsilon"] == 0.5
    assert models.fields(type(model))["norm_epsilon"] == 1e-6
    changed = models.with_fields(model, num_classes=4, dtype=jnp.bfloat16)
    assert (changed.num_classes, changed.layers.dtype) == (4, jnp.bfloat16)
    assert changed.layers.norm_epsilon == 0.5
    assert models.fields(object()) == {}
    for name, field in (("lenet5", "norm"), ("cnn_32_64", "remat")):
        other = models.create(name, num_classes=3)
        with pytest.raises(UserError, match=f"unknown field of .* '{field}'"):
            models.with_fields(other, **{field: None})


PLAIN = '''
from flax import linen as nn


class Net(nn.Module):
    """One dense layer."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train=False):
        return nn.Dense(self.num_classes, name="head")(image.reshape(len(image), -1))


class Part(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x
'''


def test_a_linen_module_is_a_model_by_its_name(tmp_path, monkeypatch, capsys):
    """Without a row: nobody published its sizes."""
    (tmp_path / "plain_network.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    assert models.list_models("plain_network:*") == ["plain_network:Net"]
    model = models.create("plain_network:Net", num_classes=3)
    assert model.num_classes == 3
    main(["plain_network:Net", "--image-shape", "4", "4", "1", "--num-classes", "10"])
    assert "170 parameters" in capsys.readouterr().out
    main(["plain_network:Net"])
    assert "150,529,000 parameters" in capsys.readouterr().out
    sys.modules.pop("plain_network")


@pytest.mark.slow
def test_the_installed_program_finds_networks_in_the_working_directory(tmp_path):
    (tmp_path / "plain_network.py").write_text(PLAIN)
    program = "import sys; sys.path.remove(''); from cnnjax import commands; commands.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "models", "plain_network:Net"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "150,529,000 parameters" in done.stdout
