"""Elementwise primitives of constants, in NumPy: no compilation for each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def same_rank(arrays: Sequence[np.ndarray], rank: int) -> list[np.ndarray]:
    """Returns the arrays with scalars as arrays of lengths 1."""
    return [array.reshape((1,) * rank) if array.ndim == 0 else array for array in arrays]


def _of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *arrays: function(*arrays)


def _divided(params: Mapping[str, Any], one: np.ndarray, other: np.ndarray) -> np.ndarray:
    if np.issubdtype(one.dtype, np.integer):
        return np.trunc(one / other).astype(one.dtype)
    return one / other


def _power(params: Mapping[str, Any], array: np.ndarray) -> np.ndarray:
    return array ** params["y"] if params["y"] >= 0 else 1 / array ** -params["y"]


def _selected(params: Mapping[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.where(which, cases[1], cases[0])


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": _of(np.add),
    "sub": _of(np.subtract),
    "mul": _of(np.multiply),
    "div": _divided,
    "max": _of(np.maximum),
    "min": _of(np.minimum),
    "neg": _of(np.negative),
    "abs": _of(np.abs),
    "exp": _of(np.exp),
    "log": _of(np.log),
    "sqrt": _of(np.sqrt),
    "square": _of(np.square),
    "rsqrt": _of(lambda array: (1 / np.sqrt(array)).astype(array.dtype)),
    "integer_pow": _power,
    "eq": _of(np.equal),
    "ne": _of(np.not_equal),
    "lt": _of(np.less),
    "le": _of(np.less_equal),
    "gt": _of(np.greater),
    "ge": _of(np.greater_equal),
    "select_n": _selected,
    "stop_gradient": _of(lambda array: array),
    "copy": _of(lambda array: array),
    "convert_element_type": lambda params, array: array.astype(params["new_dtype"]),
}
