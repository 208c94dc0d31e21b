"""A caller's type checker sees the types of cnnjax, through lazy packages too."""

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
    "builtins.str",
    "Module",
    "cnnjax.data.dataset.Dataset",
    "ndarray",
    "cnnjax.data.pipelines.ResidentPipeline",
    "def (",
    "ndarray",
    "cnnjax.finetune.methods.Method",
    "cnnjax.run.load.TrainedModel",
)


def test_the_package_says_that_it_is_typed():
    assert (Path(cnnjax.__file__).parent / "py.typed").exists()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["cnnjax"]


@pytest.mark.slow
def test_a_callers_type_checker_sees_real_types(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports"]
    command += ["--config-file=", f"--cache-dir={tmp_path}/cache", "caller.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(ROOT)}
    )
    revealed = [line for line in done.stdout.splitlines() if "Revealed type is" in line]
    assert len(revealed) == len(SEEN), done.stdout + done.stderr
    for line, words in zip(revealed, SEEN, strict=True):
        assert words in line
        assert '"Any"' not in line
    # A name that a lazy package does not have is an error, or mypy believes whatever is written.
    assert 'Module has no attribute "lod"' in done.stdout
