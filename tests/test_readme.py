"""What the README shows is true: its Python learns, its files are there, its tables are whole.

Its commands, and those of docs/, are checked in tests/test_check_docs.py.
"""

import importlib
import re
from pathlib import Path

import pytest

from cnnjax import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_its_python_runs_and_learns(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(block, names)
    total, count = names["metrics"]["loss"]
    assert float(total / count) < 1.0


def test_it_says_how_a_network_of_ones_own_is_named():
    # tests/models/test_one_file.py holds it true.
    assert "--model my_nets:Net" in README and "`MODULE:NAME`" in README


def test_its_tables_name_every_command_and_every_room():
    named = set(re.findall(r"^\| `cnnjax ([\w-]+)", README, re.MULTILINE))
    assert named == set(commands.COMMANDS)
    layout = README[README.index("## Layout") : README.index("## Dependencies")]
    rooms = set(re.findall(r"`(\w+)(?:/|\.py)`", layout))
    package = [path for path in (ROOT / "cnnjax").iterdir() if path.name[0] not in "_."]
    there = {
        path.stem for path in package if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there <= rooms


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_the_guides_name_are_there(file):
    text = (ROOT / file).read_text()
    paths = re.findall(
        r"`((?:cnnjax|experiments|scripts|benchmarks|tests|docs)/[\w/]+\.\w+)`", text
    )
    for path in paths:
        assert "FAMILY" in path or (ROOT / path).exists(), path
    for module in re.findall(r"\| `[\w.]+`[^|]*\| `(cnnjax(?:\.\w+)+)`", text):
        importlib.import_module(module)
