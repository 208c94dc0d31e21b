"""What the README shows is run: its Python, its flags, its files; and its tables are whole."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cnnjax import commands
from cnnjax.run import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    python -m (experiments\.\w+) (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
PROGRAM = re.findall(r"^    cnnjax ([\w-]+) (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


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


@pytest.mark.parametrize(("command", "flags"), PROGRAM)
def test_its_lines_of_the_program_parse(command, flags):
    assert command in commands.COMMANDS
    module = importlib.import_module(f"cnnjax.commands.{command.replace('-', '_')}")
    if hasattr(module, "Config"):
        assert isinstance(cli.parse(module.Config, shlex.split(flags)), module.Config)


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


def test_its_links_and_paths_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
