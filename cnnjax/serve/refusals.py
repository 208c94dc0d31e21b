"""Why a request is not answered, with the HTTP status that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Refused(Exception):
    """A request that is not answered.

    Attributes:
      status: of HTTP.
      text: one line for the client: what is wrong and what to do.
      reason: one word for metrics and logs.
      retry_after: seconds after which another try may succeed; None where none will.
    """

    status = 400
    reason = "invalid"

    def __init__(self, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.retry_after = retry_after


class Invalid(Refused):
    """What was sent cannot be understood."""


class Unknown(Refused):
    """There is no such model, version or tensor."""

    status, reason = 404, "unknown"


class Impossible(Refused):
    """What was asked cannot be done as things stand."""

    status, reason = 409, "impossible"


class TooLarge(Refused):
    """More bytes, pixels or images than are accepted."""

    status, reason = 413, "too_large"


class Busy(Refused):
    """The queue is full."""

    status, reason = 429, "busy"


class Unavailable(Refused):
    """The model is not loaded, or the server is stopping."""

    status, reason = 503, "unavailable"


class Late(Refused):
    """The deadline passed before there was an answer."""

    status, reason = 504, "deadline"


def unknown(kind: str, name: str, valid: Iterable[str]) -> Unknown:
    """Returns the refusal of a `name` that is not among the `valid` ones, nearest first."""
    valid = sorted(valid)
    nearest = difflib.get_close_matches(name[:100], valid, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(valid) or 'none'}."
    return Unknown(f"unknown {kind} {name[:100]!r}: {hint}")
