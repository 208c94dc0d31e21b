"""What a release holds: one version, a valid citation, extras that README and errors name."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import cnnjax

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): *(.*)$", text, re.MULTILINE))
    assert fields["version"] == cnnjax.__version__
    assert fields["cff-version"] == "1.2.0" and fields["type"] == "software"
    assert {"message", "title", "authors", "license"} <= fields.keys()


def test_extras_that_texts_name_are_there():
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "cnnjax").rglob("*.py")]
    named = set()
    for path in paths:
        for found in re.findall(r"cnnjax\[([\w,]+)\]", path.read_text()):
            named |= set(found.split(","))
    assert {"gpu", "tpu", "wandb", "mlflow"} <= named <= EXTRAS.keys()
    assert EXTRAS["gpu"] == ["jax[cuda12]"] and EXTRAS["tpu"] == ["jax[tpu]"]


def test_training_from_the_package_alone_is_that_of_the_experiment():
    command = [sys.executable, "-m", "cnnjax", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for word in ("usage: cnnjax train", "--model STR", "--dataset STR", "--resume STR", "--track"):
        assert word in done.stdout
