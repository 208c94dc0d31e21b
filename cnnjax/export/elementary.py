"""A program without the operations that TensorFlow's converter does not know.

JAX writes erf and erfc as composites of a newer StableHLO than TensorFlow reads. Here they are
polynomials in float32, as XLA and Eigen compute them. LiteRT has no maximum and minimum of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.traced import evaluate

# Eigen, `generic_fast_erf_float`; XLA's `ErfImpl32`. Beyond the bound erf is 1 in float32.
_BOUND = 3.832506856900711
_NUMERATOR = (
    *(0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861),
    *(0.18520832239976145, 1.128379143519084),
)
_DENOMINATOR = (
    *(-1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885),
    *(0.014070470171167667, 0.11098505178285362, 0.49746925110067538, 1.0),
)


def erf(x: jax.Array) -> jax.Array:
    """The error function of float32, within 4 units in the last place."""
    x = jnp.clip(x, -_BOUND, _BOUND)
    square = x * x
    numerator, denominator = (
        _polynomial(square, coefficients) for coefficients in (_NUMERATOR, _DENOMINATOR)
    )
    return x * numerator / denominator


def _polynomial(x: jax.Array, coefficients: Sequence[float]) -> jax.Array:
    result = jnp.full_like(x, coefficients[0])
    for each in coefficients[1:]:
        result = result * x + each
    return result


def _in_int32(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Computes a function of bytes in numbers that LiteRT has it for."""

    def of_bytes(*values: jax.Array) -> jax.Array:
        wide = [value.astype(jnp.int32) for value in values]
        return function(*wide).astype(values[0].dtype)

    return of_bytes


SUBSTITUTES: dict[tuple[str, str], Callable[..., jax.Array]] = {
    ("erf", "float32"): erf,
    ("erfc", "float32"): lambda x: 1 - erf(x),
    ("max", "uint8"): _in_int32(jnp.maximum),
    ("min", "uint8"): _in_int32(jnp.minimum),
}


def rewritten(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function of one array that computes the same without these operations."""

    def of_image(image: jax.Array) -> jax.Array:
        traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(image.shape, image.dtype))
        (result,) = evaluate(traced, [image], _substituted)
        return result

    return of_image


def _substituted(equation: Any, values: list[Any]) -> list[Any] | None:
    kind = equation.primitive.name, str(jnp.result_type(values[0])) if values else ""
    return [SUBSTITUTES[kind](*values)] if kind in SUBSTITUTES else None
