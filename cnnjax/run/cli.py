"""A command line from a frozen dataclass: typed flags, a quick `--help`, one line per error."""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, get_type_hints

from cnnjax.devices import processes
from cnnjax.devices.channel import PEER_LOST_EXIT_CODE, PeerLost
from cnnjax.errors import UserError
from cnnjax.run import files

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

    Raises:
      UserError: an unknown flag or a value of the wrong type.
      SystemExit: after printing the help that `--help` asked for.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config = _parsed(config_type, argv, default, program, description)
    implied = config.implied() if default is None and hasattr(config, "implied") else {}
    return _parsed(config_type, argv, config_type(**implied), program) if implied else config


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
        config_type = _with_listings(config_type)
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
        raise UserError(_one_line(printed.getvalue())) from None


def _with_listings(config_type: type) -> Any:
    """Returns the class with the names of its registries behind the help of its settings."""
    import tyro

    listings: dict[str, str] = {}
    for each in reversed(config_type.__mro__):
        listings |= vars(each).get("listings", {})
    if not listings:
        return config_type
    hints = get_type_hints(config_type)
    attributes: dict[str, Any] = {"__annotations__": {}, "__doc__": config_type.__doc__}
    for name, text in listings.items():
        hint = functools.partial("Choices: {} (default: {})".format, text)
        attributes["__annotations__"][name] = Annotated[
            hints[name], tyro.conf.arg(help_behavior_hint=hint)
        ]
        attributes[name] = getattr(config_type, name)
    return dataclasses.dataclass(frozen=True)(
        type(config_type.__name__, (config_type,), attributes)
    )


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
    """A parser whose mistakes are a `UserError` on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@contextlib.contextmanager
def one_line_errors():
    """Turns a `UserError` into one line on stderr and exit code 2.

    So does it what no program here can mend: a platform that JAX has not got, a path that cannot be
    used, a full disk. Where the reader of the output has gone the program ends quietly.
    """
    try:
        with files.output_errors(), _platform_errors():
            yield
    except PeerLost:
        processes.end(PEER_LOST_EXIT_CODE)
    except UserError as error:
        if os.environ.get("CNNJAX_TRACEBACK"):
            raise
        with contextlib.suppress(OSError):  # The code says it where nobody reads.
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


def _one_line(boxed: str) -> str:
    """Returns the sense of one of tyro's boxed messages without its frame and the flags' help."""
    sections: list[list[str]] = [[]]
    for line in boxed.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip("╭╮╰╯│+|")
        if re.fullmatch("[─-]{3,}", text.strip()):
            sections.append([])
        # Deeper than a flag stands what the flag means.
        elif not text.startswith(" " * 9):
            sections[-1].append(text.strip())
    sentences = [" ".join(lines).strip(" .") for lines in sections]
    skipped = ("Argument helptext", "For full helptext")
    return "; ".join(each for each in sentences if each and not each.startswith(skipped)) + (
        " (see --help)"
    )
