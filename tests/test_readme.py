"""What the README shows is run: its Python, its flags, its files."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cnnjax.run import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    python -m (experiments\.\w+) (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_its_python_runs_and_learns(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(block, names)
    total, count = names["metrics"]["loss"]
    assert float(total / count) < 1.0


@pytest.mark.parametrize(("experiment", "flags"), COMMANDS)
def test_its_commands_parse(experiment, flags):
    config_type = importlib.import_module(experiment).Config
    assert isinstance(cli.parse(config_type, shlex.split(flags)), config_type)


def test_its_links_and_paths_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
