"""A command line from a frozen dataclass: typed flags, a quick `--help`, one line per error."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cnnjax import paths
from cnnjax.errors import UserError
from cnnjax.run import help
from cnnjax.run.exits import one_line_errors


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
