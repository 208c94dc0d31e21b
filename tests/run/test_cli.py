import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import tyro

from cnnjax import commands
from cnnjax.errors import UserError
from cnnjax.run import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network."""

    epochs: int = 12
    """Passes over the data."""

    learning_rate: float = 0.1
    """Size of a step."""

    method: Literal["jit", "pmap"] = "jit"
    """How it is compiled."""

    smoke: bool = False
    """Shrink the run."""

    members: int | None = None
    """How many, if it is said."""

    limit: float | None = None
    """The most."""


def test_flags_become_typed_fields():
    config = cli.parse(Config, ["--epochs", "3", "--learning-rate", "1e-2", "--smoke"])
    assert config == Config(3, 0.01, "jit", True)


def test_flags_go_on_top_of_a_default():
    assert cli.parse(Config, ["--method", "pmap"], default=Config(epochs=5)).epochs == 5


def test_help_documents_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("--epochs INT", "Passes over the data.", "(default: 12)", "--smoke", "{jit,pmap}"):
        assert word in printed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], ["--epoch", "--epochs"]),
        (["--epochs", "many"], ["--epochs 'many': give a whole number (see --help)"]),
        (["--epochs", "0.5"], ["--epochs '0.5': give a whole number (see --help)"]),
        (["--learning-rate", "fast"], ["--learning-rate 'fast': give a number (see --help)"]),
        (["--members", "0.5"], ["--members '0.5': give a whole number (see --help)"]),
        (["--limit", "x"], ["--limit 'x': give a number (see --help)"]),
        (["--method", "magic"], ["--method 'magic': give one of 'jit', 'pmap' (see --help)"]),
        (["stray"], ["stray"]),
    ],
)
def test_errors_are_one_line_that_names_flag_and_value(argv, words):
    with pytest.raises(UserError) as error:
        cli.parse(Config, argv)
    text = str(error.value)
    assert "\n" not in text
    assert not set(text) & set("╭│─╰")
    assert all(word in text for word in words)


def test_user_errors_exit_with_2_and_no_traceback(capsys, monkeypatch):
    def main(config):
        raise UserError("the batch is too large: use 64.")

    with pytest.raises(SystemExit) as stop:
        cli.run(Config, main, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the batch is too large: use 64.\n"
    monkeypatch.setenv("CNNJAX_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.run(Config, main, [])


def test_mains_exit_code_is_the_programs():
    with pytest.raises(SystemExit) as stop:
        cli.run(Config, lambda config: 143, [])
    assert stop.value.code == 143


@dataclasses.dataclass(frozen=True)
class Places:
    """Name directories."""

    run_dir: str = ""
    out: Path = Path("out")
    files: tyro.conf.Positional[tuple[Path, ...]] = ()


def test_home_directory_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for argv in (["--run-dir", "~/a", "--out", "~/b"], ["--run-dir=~/a", "--out=~/b"]):
        found = cli.parse(Places, [*argv, "~/c.png", "d.png"])
        wanted = Places(f"{tmp_path}/a", tmp_path / "b", (tmp_path / "c.png", Path("d.png")))
        assert found == wanted
    # What a record says stays as it is.
    assert cli.parse(Places, [], default=Places("~/a")).run_dir == "~/a"
    parser = commands.Parser()
    parser.add_argument("--directory")
    assert parser.parse_args(["--directory=~/a"]).directory == f"{tmp_path}/a"


def test_settings_that_are_not_utf_8_are_refused():
    with pytest.raises(UserError, match=r"--run-dir 'caf\\udce9' is not UTF-8") as error:
        cli.parse(Places, ["--run-dir", "caf\udce9"])
    assert str(error.value).isprintable()
    # A file that is only read may have any name.
    assert cli.parse(Places, ["caf\udce9.png"]).files == (Path("caf\udce9.png"),)


def test_what_the_terminal_cannot_show_is_escaped():
    program = "from cnnjax.run import exits\nwith exits.one_line_errors():\n    "
    program += "print('caf\\udce9 \\u732b')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"caf\\udce9 \\u732b\n")
