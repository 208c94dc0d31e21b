"""The one exception for mistakes that a user can fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: its text names the thing, its value and the remedy, on one line.

    Command lines print the text alone; a traceback is shown only when asked for.
    """


class NotPreparedError(UserError):
    """A known dataset whose files are not on this machine."""


def unknown_name(
    kind: str, name: str, valid: Iterable[str], *, cutoff: float = 0.4, listed_by: str = ""
) -> UserError:
    """Returns the error for a `name` that is not among the `valid` ones, nearest first.

    Names that are less alike than `cutoff` (1: the same) are not suggested. Then all are listed, or
    where there are too many for a message the command `listed_by` is named, which lists them.
    """
    valid = sorted(valid)
    nearest = difflib.get_close_matches(name, valid, n=3, cutoff=cutoff)
    if nearest:
        hint = f"did you mean {' or '.join(nearest)}?"
    elif listed_by:
        hint = f"`{listed_by}` lists what there is."
    else:
        hint = f"choose from {', '.join(valid)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")
