"""The program `cnnjax`: its list, help without JAX, mistakes on one line, one version."""

import importlib
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cnnjax
from cnnjax import commands
from cnnjax.run import exits

ROOT = Path(__file__).parent.parent.parent
PROGRAM = [sys.executable, "-m", "cnnjax"]
# What the entry point of an installed cnnjax does.
INSTALLED = [sys.executable, "-c", "import cnnjax.commands as c; c.main()"]
# What is loaded when Python ends, on the last line.
LOADED = """
import atexit, sys
atexit.register(lambda: print(*sorted({name.split(".")[0] for name in sys.modules})))
from cnnjax.commands import main
main()
"""
HEAVY = {"jax", "flax", "optax", "orbax", "scipy", "tensorflow", "matplotlib", "PIL"}


def shell(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def call(capsys, *argv):
    """Returns exit code, output and errors of the program, called in this process."""
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_alone_it_lists_the_commands(argv, capsys):
    code, out, err = call(capsys, *argv)
    assert code == 0 and not err
    for name, text in commands.COMMANDS.items():
        assert f"  {name} " in out and text in out


def test_every_module_of_the_room_is_a_command():
    modules = {path.stem for path in Path(commands.__path__[0]).glob("[!_]*.py")}
    assert modules == {name.replace("-", "_") for name in commands.COMMANDS}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_commands_module_shows_its_lines(name):
    module = importlib.import_module(f"cnnjax.commands.{name.replace('-', '_')}")
    assert f"\n    cnnjax {name}" in module.__doc__


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_shows_how_to_call_it_and_loads_no_jax(name):
    done = shell(sys.executable, "-c", LOADED, name, "--help", check=True)
    *text, loaded = done.stdout.splitlines()
    assert text[0].startswith(f"usage: cnnjax {name} ")
    assert any(line.startswith(f"    cnnjax {name}") for line in text)
    assert not set(loaded.split()) & HEAVY
    assert not done.stderr


@pytest.mark.parametrize("argv", [(), ("models", "lenet5"), ("evaluat",), ("predict", "--nope")])
def test_both_spellings_are_alike(argv):
    first, second = (shell(*program, *argv) for program in (PROGRAM, INSTALLED))
    assert first.returncode == second.returncode
    assert (first.stdout, first.stderr) == (second.stdout, second.stderr)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nope"], "unknown command 'nope': choose from compare, compress, concepts, "),
        (["evaluat"], "unknown command 'evaluat': did you mean evaluate?"),
        (["--run", "x"], "unknown command '--run': choose from "),
        (["evaluate"], "no run given: name one, such as --run runs/mine, or give --weights"),
        (["predict", "x.png"], "Missing from cnnjax predict: --run STR (see --help)"),
        (["evaluate", "--run", "x", "--attak", "y"], "--attak, y; Perhaps you meant: --attack "),
        (["evaluate", "--run", "x", "--split", "all"], "--split 'all': give one of 'test', "),
        (["evaluate", "--run", "absent"], "absent is not a run directory"),
        (["inspect-labels", "--run", "absent"], "absent is not a run directory"),
        (["predict", "--run", "absent", "docs/worst_classified.png"], "absent is not a run direc"),
        (["show-batch", "--run", "absent"], "absent is not a run directory"),
        (["convert", "absent", "--out", "x"], "there is no absent: give a file of weights"),
        (["convert", "docs", "--out", "x.npz"], "docs is not a run directory"),
        (["models", "resnet5O"], "unknown model 'resnet5O': did you mean resnet50"),
        (["verify-resume"], "required: experiment (see cnnjax verify-resume --help)"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("argv", ["", "models 'vgg1*'", "evaluate --help", "--version"])
def test_a_reader_that_goes_gets_no_traceback(argv):
    # The reader is gone before the first line comes.
    line = f"{sys.executable} -m cnnjax {argv} | true"
    done = shell("bash", "-c", f"set -o pipefail; {line}")
    assert not done.stderr
    assert done.returncode in (0, exits.BROKEN_PIPE_EXIT_CODE)


def test_the_version_is_written_once(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and "version" in project["project"]["dynamic"]
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "cnnjax.__version__"}
    assert call(capsys, "--version") == (0, f"cnnjax {cnnjax.__version__}\n", "")
