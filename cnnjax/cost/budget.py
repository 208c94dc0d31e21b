"""Limits of a network's cost, as a check of a project's CI holds them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from cnnjax.errors import UserError, unknown_name

# Powers of ten, and of two as they are written of memory.
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([KMGT]?I?)(B?)", re.IGNORECASE)


def parse(text: str, names: Collection[str], flag: str) -> dict[str, float]:
    """Returns name -> number of `flops=1.5G,memory=64MiB`.

    Raises:
      UserError: an unknown name, one that is given twice, or no such number.
    """
    found: dict[str, float] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in names:
            raise unknown_name(f"name in {flag}", name, names)
        number = _NUMBER.fullmatch(value.strip())
        if not equals or number is None:
            raise UserError(f"{flag} {part}: write NAME=NUMBER, such as {name}=1.5M or {name}=2e6.")
        if name in found:
            raise UserError(f"{flag} names {name} twice: give it once.")
        found[name] = float(number[1]) * UNITS[number[2].upper()]
        if not 0 < found[name] < math.inf:
            raise UserError(f"{flag} {part}: give a number above 0.")
    if not found:
        raise UserError(f"{flag} {text!r} names nothing: give some of {', '.join(names)}.")
    return found


def exceeded(budget: Mapping[str, float], costs: Mapping[str, float]) -> list[str]:
    """Returns a line for each limit that a cost is above."""
    return [
        f"{name} {costs[name]:,.0f} is over the budget of {limit:,.0f} "
        f"(by {costs[name] / limit - 1:.1%})"
        for name, limit in budget.items()
        if costs[name] > limit
    ]
