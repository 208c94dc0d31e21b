"""A caller's type checker sees the types of cnnjax, through lazy packages too."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cnnjax

ROOT = Path(__file__).parent.parent
CALLER = """
import cnnjax
from cnnjax import augment, convert, data, finetune, models
from cnnjax.run import load

reveal_type(cnnjax.__version__)
reveal_type(models.create("lenet5", num_classes=10))
reveal_type(data.load("mnist"))
reveal_type(data.load("mnist").train.image)
reveal_type(cnnjax.data.ResidentPipeline)
reveal_type(augment.make_augment("flip", num_classes=10))
reveal_type(convert.read("weights.npz"))
reveal_type(finetune.make_method)
reveal_type(load.load_trained("runs/a"))
cnnjax.data.lod("mnist")
"""
SEEN = (
    "str",
    "flax.linen.module.Module",
    "cnnjax.data.dataset.Dataset",
    "numpy.ndarray",
    "def (arrays: ",
    "def (jax.",
    "dict[str, numpy.ndarray",
    "def (text: str, model: Any",
    "cnnjax.run.load.TrainedModel",
)


def test_the_package_says_that_it_is_typed():
    assert (Path(cnnjax.__file__).parent / "py.typed").exists()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["cnnjax"]


@pytest.mark.slow
def test_a_callers_type_checker_sees_real_types(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)
    # With the configuration of the repository, whose cache serves this too.
    command = [sys.executable, "-m", "mypy", str(tmp_path / "caller.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seen = re.findall(r'Revealed type is "\(?(.*)"', done.stdout)
    assert len(seen) == len(SEEN), done.stdout + done.stderr
    for found, expected in zip(seen, SEEN, strict=True):
        assert found.startswith(expected)
    # Lazy packages do not make every name a valid one.
    assert 'Module has no attribute "lod"' in done.stdout
    assert done.stdout.count("error: ") == 1
