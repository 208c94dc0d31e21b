"""Constraints between settings, as text: comparisons and arithmetic, and nothing else.

`batch_size * accumulate <= 512 and optimizer != "sgd"`
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from cnnjax.errors import UserError, unknown_name

# Longer texts would be read recursively beyond what Python allows.
LONGEST = 1000


def _power(base: Any, exponent: Any) -> Any:
    # Of whole numbers it can take for ever.
    return float(base) ** float(exponent)


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


def check(text: str, known: Mapping[str, Any]) -> None:
    """Raises UserError for a constraint that cannot be read, or that names what is not known."""
    if len(text) > LONGEST:
        raise UserError(f"--where has {len(text):,} characters: give at most {LONGEST:,}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(
            f"--where {text!r} cannot be read: write it as batch_size * accumulate <= 512"
        ) from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in known:
            raise unknown_name("setting", node.id, known)
        allowed = (ast.Expression, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp)
        more = (ast.BoolOp, ast.And, ast.Or, ast.Compare, *_OPERATORS)
        if not isinstance(node, (*allowed, *more)):
            raise UserError(
                f"--where {text!r}: only comparisons and arithmetic of settings, joined by and/or"
            )


def holds(text: str, settings: Mapping[str, Any]) -> bool:
    """Returns the truth of a checked constraint; of one on what is not chosen: true.

    Raises:
      UserError: it cannot be computed with these settings.
    """

    def number(node: ast.AST) -> Any:
        found = value(node)
        if not isinstance(found, bool | int | float):
            raise TypeError(f"{found!r} is no number")
        return found

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return settings[node.id]
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](number(node.left), number(node.right))
        if isinstance(node, ast.UnaryOp):
            read = value if isinstance(node.op, ast.Not) else number
            return _OPERATORS[type(node.op)](read(node.operand))
        if isinstance(node, ast.BoolOp):
            joined = all if isinstance(node.op, ast.And) else any
            return joined(value(each) for each in node.values)
        assert isinstance(node, ast.Compare)
        sides = [value(each) for each in (node.left, *node.comparators)]
        pairs = zip(node.ops, sides[:-1], sides[1:], strict=True)
        return all(_OPERATORS[type(each)](left, right) for each, left, right in pairs)

    try:
        return bool(value(ast.parse(text.strip(), mode="eval").body))
    except KeyError:
        return True
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"--where {text!r} cannot be computed: {error}") from None
