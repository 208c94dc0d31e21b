"""A function whose ReLUs have another derivative, found in its traced program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.traced import evaluate


@jax.custom_vjp
def guided_relu(x: jax.Array) -> jax.Array:
    """ReLU, whose derivative passes on what is positive: Springenberg et al. 2015, section 3.4."""
    return jnp.maximum(x, 0)


def _guided_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(x, 0), x > 0


def _guided_backward(positive: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(positive, jnp.maximum(cotangent, 0), 0),)


guided_relu.defvjp(_guided_forward, _guided_backward)


def with_rule(
    function: Callable[[jax.Array], jax.Array], relu: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """Returns `function` with `relu` in place of every `flax.linen.relu` that it calls.

    Raises:
      UserError: when it is called, it calls none.
    """

    def changed(x: jax.Array) -> jax.Array:
        # Without forms that compute activation and pool as one.
        with ops.lowering("onednn"):
            traced = jax.make_jaxpr(function)(x)
        found: list[bool] = []

        def replaced(equation: Any, inputs: list[Any]) -> list[Any] | None:
            if not _is_relu(equation):
                return None
            found.append(True)
            return [relu(*inputs)]

        (result,) = evaluate(traced, [x], replaced, _grouped)
        if not found:
            raise UserError(
                "the network has no ReLU whose derivative could be changed: take another method."
            )
        return result

    return changed


def has_relus(function: Callable[[jax.Array], jax.Array], x: Any) -> bool:
    """Whether `function` calls `flax.linen.relu`; nothing is computed, `x` may be a shape."""

    def within(jaxpr: Jaxpr) -> bool:
        inner = (_grouped(equation) for equation in jaxpr.eqns)
        return any(map(_is_relu, jaxpr.eqns)) or any(each and within(each.jaxpr) for each in inner)

    with ops.lowering("onednn"):
        return within(jax.make_jaxpr(function)(x).jaxpr)


def _is_relu(equation: Any) -> bool:
    """Whether it is `jax.nn.relu`: a function with a derivative of its own, and of that name."""
    if equation.primitive.name != "custom_jvp_call":
        return False
    return [inner.params.get("name") for inner in equation.params["call_jaxpr"].eqns] == ["relu"]


def _grouped(equation: Any) -> ClosedJaxpr | None:
    """Returns the program of a call that only groups operations."""
    return equation.params["jaxpr"] if equation.primitive.name in ("jit", "pjit") else None
