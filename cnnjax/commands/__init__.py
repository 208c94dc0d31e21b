"""The program `cnnjax`, a file per command: what acts on a run, a model or a file of weights.

    cnnjax COMMAND [FLAG ...]
    python -m cnnjax COMMAND [FLAG ...]

A command's module has a dataclass `Config`, which becomes its flags, and `main(config)`; or only
`main(argv)`. It is imported when its command is called, and it imports JAX only when it runs, so
that `--help` is quick.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cnnjax import paths
from cnnjax.errors import UserError, unknown_name
from cnnjax.run import cli, exits


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are a `UserError` on one line, without the usage.

    In every word `~` is the home directory.
    """

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        return super().parse_known_args(paths.expand_flags(args), namespace)

    def parse_both(
        self, argv: Sequence[str] | None, taken: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """Returns the options, and the words that are left: the flags of an experiment.

        Raises:
          UserError: one of those is in `taken`, which the command gives the experiment itself.
        """
        options, rest = self.parse_known_args(argv)
        for word in rest:
            if word.partition("=")[0] in taken:
                raise UserError(f"{word} is set by {self.prog}: drop it.")
        return options, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


COMMANDS = {
    "compare": "whether one run, or one setting over its seeds, is better than another",
    "compress": "prune, factor or quantize a run's network, and leave a smaller run",
    "concepts": "whether concepts that you show in images speak for a run's classes",
    "convert": "weights of PyTorch, timm or Keras into a run, or a run into such a file",
    "cost": "operations, bytes, memory and time of a network by layer; limits for CI",
    "cross-validate": "validate an experiment on each part of its training images in turn",
    "doctor": "what is wrong with this installation, and how to mend it",
    "evaluate": "scores of a run, or of several as an ensemble; calibration; attacks",
    "explain": "which pixels a run's answers come from, and whether such maps can be believed",
    "export": "a run as ONNX, StableHLO, LiteRT or SavedModel, compared with the network",
    "finish-search": "test what a search found, beside the defaults, over several seeds",
    "inspect-labels": "training images whose labels look wrong",
    "models": "list the networks, or print one network's layers",
    "population": "many seeds and settings of an experiment as one program, a run of each",
    "predict": "classify image files with a trained run",
    "probe": "what few labels suffice for on a run's features, beside training from scratch",
    "search": "choose an experiment's settings by many runs, on validation scores",
    "serve": "serve runs and exported files over HTTP and gRPC, batched, with metrics",
    "serve-key": "make, list and revoke the API keys of a server",
    "serve-reference": "what a run's clean images look like, for drift while it is served",
    "show-batch": "draw what a training step sees",
    "show-network": "what a run's layers see: filters, maps, fields, what neurons respond to",
    "track": "send runs to Weights & Biases or MLflow after their training",
    "train": "train a classifier on MNIST, a folder of images or a dataset of tfds",
    "verify-resume": "kill and resume an experiment, and compare it with one that was not killed",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that the first word names, with the flags that follow, and exits.

    The exit code is the command's; 2 for a mistake of the user's, which is printed on one line; 141
    where the reader of its output has gone.
    """
    # As with `python -m`: networks of one's own lie there.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    with exits.one_line_errors():
        _run(sys.argv[1:] if argv is None else list(argv))


def usage() -> str:
    """Returns the list of commands, as `cnnjax` alone prints it."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: cnnjax COMMAND [FLAG ...]    (python -m cnnjax is the same)\n\n"
        f"{rows}\n\n"
        "cnnjax COMMAND --help lists a command's flags, cnnjax --version prints the version.\n"
        "Networks are trained by cnnjax train, or, in a checkout, by experiments such as\n"
        "python -m experiments.mnist_lenet."
    )


def _run(argv: list[str]) -> NoReturn:
    name, *flags = argv or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        import cnnjax

        print(f"cnnjax {cnnjax.__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS, cutoff=0.6)
    module = importlib.import_module(f"cnnjax.commands.{name.replace('-', '_')}")
    if not hasattr(module, "Config"):
        sys.exit(module.main(flags))
    config = cli.parse(module.Config, flags, program=f"cnnjax {name}", description=module.__doc__)
    sys.exit(module.main(config))
