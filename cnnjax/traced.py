"""Programs as JAX traces them: what is common to those who read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

# Calls that only group operations, and the parameter that holds their program.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def inner_program(equation: Any) -> ClosedJaxpr | None:
    """Returns the program of a call, whatever it is for (`jit`, remat, a derivative of one's own);
    None for an operation."""
    name = equation.primitive.name
    if name not in CALLS:
        return None
    # Their names differ from version to version of JAX.
    for parameter in (CALLS[name], "jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := equation.params.get(parameter)) is not None:
            return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
    return None


def bound(equation: Any, inputs: list[Any]) -> list[Any]:
    """Returns what a step of a traced program makes of its inputs."""
    parameters = equation.primitive.get_bind_params(equation.params)
    # Some versions of JAX give the functions among the parameters for themselves.
    functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
    outputs = equation.primitive.bind(*functions, *inputs, **parameters)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def evaluate(
    program: ClosedJaxpr,
    inputs: Sequence[Any],
    change: Callable[[Any, list[Any]], list[Any] | None],
    inside: Callable[[Any], ClosedJaxpr | None] = inner_program,
) -> list[Any]:
    """Computes a traced program step by step, some of the steps in another way.

    Args:
      program: what `jax.make_jaxpr` returned.
      inputs: its arguments.
      change: (step, its inputs) -> its results; None for a step that stays.
      inside: the program of a call of which the steps are looked at too; None for a call that is
        made as it is.

    Returns:
      Its results.
    """
    jaxpr: Any = program.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        results = change(equation, values)
        if results is None:
            inner = inside(equation)
            results = (
                bound(equation, values)
                if inner is None
                else evaluate(inner, values, change, inside)
            )
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def is_traced(value: Any) -> bool:
    """Whether a number is known only when the program runs, so that it cannot be checked before."""
    return isinstance(value, jax.core.Tracer)


def is_on(factor: Any) -> bool:
    """Whether a program has the term of this factor: of 0 it has none; of a traced one always."""
    return is_traced(factor) or bool(factor)
