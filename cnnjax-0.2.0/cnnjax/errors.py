"""The one exception for mistakes that a user can fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: its text names the thing, its value and the remedy, on one line.

    Command lines print the text alone; a traceback is shown only when asked for.
    """


class NotPreparedError(UserError):
    """A known dataset whose files are not on this machine."""


def unknown_name(kind: str, name: str, valid: Iterable[str], *, cutoff: float = 0.4) -> UserError:
    """Returns the error for a `name` that is not among the `valid` ones, nearest first.

    Names that are less alike than `cutoff` (1: the same) are not suggested; all are listed instead.
    """
    valid = sorted(valid)
    nearest = difflib.get_close_matches(name, valid, n=3, cutoff=cutoff)
    hint = (
        f"did you mean {' or '.join(nearest)}?" if nearest else f"choose from {', '.join(valid)}."
    )
    return UserError(f"unknown {kind} {name!r}: {hint}")
