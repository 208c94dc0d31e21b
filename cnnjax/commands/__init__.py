"""The program `cnnjax`, a file a command: what acts on a run, a model or a file of weights.

A command's module has a dataclass `Config`, which becomes its flags, and `main(config)`; or only
`main(argv)`. It is imported when it is called for.
"""

import importlib
import sys
from collections.abc import Sequence

from cnnjax.errors import UserError, unknown_name
from cnnjax.run import cli

COMMANDS = {
    "convert": "weights of PyTorch, timm or Keras into a run, or a run into such a file",
    "evaluate": "scores of a run, or of several as an ensemble; calibration; attacks",
    "inspect-labels": "training images whose labels look wrong",
    "models": "list the networks, or print one network's layers",
    "predict": "classify image files with a trained run",
    "probe": "what few labels suffice for on a run's features, beside training from scratch",
    "show-batch": "draw what a training step sees",
    "verify-resume": "kill and resume an experiment, and compare it with one that was not killed",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first word names, with the flags that follow, and exits."""
    name, *flags = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    with cli.one_line_errors():
        if name == "--version":
            import cnnjax

            print(f"cnnjax {cnnjax.__version__}")
            sys.exit(0)
        if name not in COMMANDS:
            raise unknown_command(name)
        module = importlib.import_module(f"cnnjax.commands.{name.replace('-', '_')}")
        if hasattr(module, "Config"):
            cli.run(module.Config, module.main, flags, program=f"cnnjax {name}")
        sys.exit(module.main(flags))


def usage() -> str:
    """Returns the list of commands, as `cnnjax` alone prints it."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: cnnjax COMMAND [FLAG ...]    (python -m cnnjax is the same)\n\n"
        f"{rows}\n\n"
        "cnnjax COMMAND --help lists a command's flags. Networks are trained by experiments, such\n"
        "as python -m experiments.mnist_lenet."
    )


def unknown_command(name: str) -> UserError:
    """Returns the error for a word that is no command."""
    return unknown_name("command", name, list(COMMANDS))
