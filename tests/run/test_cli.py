import dataclasses
from typing import Literal

import pytest

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
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--method", "magic"], ["magic", "--method", "pmap"]),
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
