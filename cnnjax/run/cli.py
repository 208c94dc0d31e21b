"""A command line from a frozen dataclass: typed flags, a quick `--help`, one line per error."""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cnnjax import paths
from cnnjax.devices import processes
from cnnjax.devices.channel import PEER_LOST_EXIT_CODE, PeerLost
from cnnjax.errors import UserError
from cnnjax.run import files, help

USAGE_EXIT_CODE = 2
# 128 + the signal's number, as shells report it; schedulers requeue on it.
INTERRUPT_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


def parse(
    config_type: type,
    argv: Sequence[str] | None = None,
    default: Any = None,
    program: str | None = None,
    description: str | None = None,
) -> Any:
    """Returns the config that the flags in `argv` describe, on top of `default` if there is one.

    `program` is what help calls the program: by default, how it was started. `description` is what
    help says first: by default, the docstring of `config_type`.

    A config class may have a method `implied() -> dict`: defaults that follow from the config's
    other settings, such as those of a named recipe. Flags go before them, and so does `default`.

    In every flag that is a path, `~` is the home directory.

    Raises:
      UserError: an unknown flag, a value of the wrong type, or one that no record can hold.
      SystemExit: after printing the help that `--help` asked for.
    """
    argv = paths.expand_flags(argv)
    config = _parsed(config_type, argv, default, program, description)
    implied = config.implied() if default is None and hasattr(config, "implied") else {}
    if implied:
        config = _parsed(config_type, argv, config_type(**implied), program)
    _check_encoded(config)
    return config


def _parsed(
    config_type: type,
    argv: Sequence[str],
    default: Any,
    program: str | None,
    description: str | None = None,
) -> Any:
    import tyro

    # On top of a default that is True, the flag itself must be accepted too, not only its negation:
    # a run is resumed with the flags it was started with.
    markers = () if default is not None else (tyro.conf.FlagCreatePairsOff,)
    if {"-h", "--help"} & set(argv):
        config_type = help.with_listings(config_type)
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    if program is None and module:
        program = f"python -m {module}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                config_type,
                prog=program,
                description=description,
                args=argv,
                default=default,
                config=markers,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(help.one_line(printed.getvalue())) from None


def _check_encoded(config: Any) -> None:
    """Raises a UserError for a setting that is not UTF-8: records and reports could not hold it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any("\ud800" <= char <= "\udfff" for char in text):
                flag = "--" + field.name.replace("_", "-")
                raise UserError(f"{flag} {text!a} is not UTF-8: rename the file or directory")


def run(
    config_type: type, main: Callable[[Any], Any], argv: Sequence[str] | None = None, **parsing: Any
) -> None:
    """Parses the command line, calls `main(config)` and exits with its status.

    A `UserError` is printed as one line and exits with 2. The environment variable
    `CNNJAX_TRACEBACK=1` asks for the traceback instead.
    """
    with one_line_errors():
        sys.exit(main(parse(config_type, argv, **parsing)))


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are a `UserError` on one line, without the usage.

    In every word `~` is the home directory.
    """

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        return super().parse_known_args(paths.expand_flags(args), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@contextlib.contextmanager
def one_line_errors():
    """Turns a `UserError` into one line on stderr and exit code 2.

    So does it what no program here can mend: a platform that JAX has not got, a path that cannot be
    used, a full disk. Where the reader of the output has gone the program ends quietly.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    paths.forget_empty_variables()
    try:
        with files.output_errors(), _platform_errors():
            yield
    except PeerLost:
        processes.end(PEER_LOST_EXIT_CODE)
    except UserError as error:
        if os.environ.get("CNNJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        processes.end(USAGE_EXIT_CODE)


@contextlib.contextmanager
def _platform_errors():
    """Where JAX fails, says so if that is because it has no device to compute on."""
    try:
        yield
    except (RuntimeError, AssertionError, AttributeError) as error:
        if "jax" in sys.modules:
            from cnnjax.devices import backend

            backend.check_platform(error)
        raise
