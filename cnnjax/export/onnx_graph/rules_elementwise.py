"""Rules of primitives that work element by element."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cnnjax.export.onnx_graph.lowering import Context, rule
from cnnjax.export.onnx_graph.values import Constant, Tensor, Value, completed, is_one, numbers

# Primitives that are one operator of ONNX.
OPERATORS = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "exp": "Exp",
    "log": "Log",
    "tanh": "Tanh",
    "sin": "Sin",
    "cos": "Cos",
    "erf": "Erf",
    "logistic": "Sigmoid",
    "sqrt": "Sqrt",
    "neg": "Neg",
    "abs": "Abs",
    "sign": "Sign",
    "floor": "Floor",
    "ceil": "Ceil",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "and": "And",
    "or": "Or",
    "not": "Not",
    "xor": "Xor",
}


def elementwise(context: Context, op: str, *values: Value, **attributes: Any) -> Tensor:
    """Writes an operator that broadcasts its operands, and returns its result."""
    rank = len(context.shape)
    values = tuple(_of_rank(value, rank) for value in values)
    sizes = [
        next((size for size in along if not is_one(size)), 1)
        for along in zip(*(value.sizes for value in values), strict=True)
    ]
    lead = max(
        (value for value in values if isinstance(value, Tensor)),
        key=lambda tensor: int(np.prod(numbers(tensor.sizes))),
    )
    order = completed(lead, rank, [not is_one(size) for size in sizes])
    names = [context.graph.arranged(value, order) for value in values]
    lengths = [1 if axis is None else sizes[axis] for axis in order]
    output = context.graph.node(op, names, lengths, **attributes)
    return Tensor(output, order, context.shape, tuple(sizes), context.dtype)


def _of_rank(value: Value, rank: int) -> Value:
    """Returns a scalar as an array of lengths 1."""
    if len(value.shape) == rank:
        return value
    if isinstance(value, Constant):
        return Constant(value.array.reshape((1,) * rank), (1,) * rank)
    return Tensor(value.name, value.axes, (1,) * rank, (1,) * rank, value.dtype)


def _number(context: Context, value: Any, like: Value) -> Constant:
    rank = len(like.shape)
    return Constant(np.full((1,) * rank, value, like.dtype), (1,) * rank)


@rule(*OPERATORS)
def _operator(context: Context, *values: Value) -> Value:
    is_bits = context.primitive in ("and", "or", "not", "xor") and context.dtype != np.bool_
    if is_bits:
        raise context.unsupported("of integers")
    return elementwise(context, OPERATORS[context.primitive], *values)


@rule("stop_gradient", "copy", "copy_p", "optimization_barrier", "cnnjax_written")
def _same(context: Context, *values: Value) -> Value | list[Value]:
    return list(values)


@rule("max", "min")
def _bound(context: Context, one: Value, other: Value) -> Value:
    for value, bound in ((one, other), (other, one)):
        number = bound.scalar() if isinstance(bound, Constant) else None
        if number is None or context.dtype != np.float32:
            continue
        if context.primitive == "max" and number == 0:
            return elementwise(context, "Relu", value)
        limit = context.graph.constant(np.asarray(number, value.dtype))
        inputs = ["", limit] if context.primitive == "min" else [limit]
        return _clipped(context, value, inputs)
    op = "Max" if context.primitive == "max" else "Min"
    if context.dtype.itemsize >= 4:
        return elementwise(context, op, one, other)
    # ONNX Runtime has none of bytes, such as those of a median filter.
    wide = dataclasses.replace(context, dtype=np.dtype(np.int32))
    result = elementwise(wide, op, _cast(wide, one), _cast(wide, other))
    return _cast(context, result)


def _clipped(context: Context, value: Value, limits: list[str]) -> Tensor:
    result = elementwise(context, "Clip", value)
    context.graph.nodes[-1].inputs.extend(limits)
    return result


@rule("clamp")
def _clamp(context: Context, low: Value, value: Value, high: Value) -> Value:
    numbers_ = [each.scalar() if isinstance(each, Constant) else None for each in (low, high)]
    if None in numbers_ or context.dtype != np.float32:
        return elementwise(context, "Min", elementwise(context, "Max", value, low), high)
    limits = [context.graph.constant(np.asarray(each, value.dtype)) for each in numbers_]
    return _clipped(context, value, limits)


@rule("rsqrt")
def _rsqrt(context: Context, value: Value) -> Value:
    return elementwise(context, "Reciprocal", elementwise(context, "Sqrt", value))


@rule("square")
def _square(context: Context, value: Value) -> Value:
    return elementwise(context, "Mul", value, value)


@rule("integer_pow")
def _integer_pow(context: Context, value: Value) -> Value:
    exponent = context.params["y"]
    if exponent == 2:
        return elementwise(context, "Mul", value, value)
    if exponent == -1:
        return elementwise(context, "Reciprocal", value)
    return elementwise(context, "Pow", value, _number(context, exponent, value))


@rule("erfc")
def _erfc(context: Context, value: Value) -> Value:
    erf = elementwise(context, "Erf", value)
    return elementwise(context, "Sub", _number(context, 1, value), erf)


@rule("log1p")
def _log1p(context: Context, value: Value) -> Value:
    return elementwise(
        context, "Log", elementwise(context, "Add", value, _number(context, 1, value))
    )


@rule("expm1")
def _expm1(context: Context, value: Value) -> Value:
    return elementwise(
        context, "Sub", elementwise(context, "Exp", value), _number(context, 1, value)
    )


@rule("ne")
def _ne(context: Context, one: Value, other: Value) -> Value:
    return elementwise(context, "Not", elementwise(context, "Equal", one, other))


@rule("is_finite")
def _is_finite(context: Context, value: Value) -> Value:
    # Neither infinite nor not a number: both differ from themselves after subtraction.
    zero = elementwise(context, "Sub", value, value)
    return elementwise(context, "Equal", zero, _number(context, 0, value))


@rule("round")
def _round(context: Context, value: Value) -> Value:
    # ONNX rounds halves to even numbers, as TO_NEAREST_EVEN does.
    if int(context.params["rounding_method"]) != 1:
        raise context.unsupported("halves away from zero")
    return elementwise(context, "Round", value)


@rule("convert_element_type")
def _convert(context: Context, value: Value) -> Value:
    return _cast(context, value)


def _cast(context: Context, value: Value) -> Value:
    """Returns the value in the type of the context."""
    if isinstance(value, Constant):
        return Constant(value.array.astype(context.dtype), value.shape)
    if value.dtype == context.dtype:
        return value
    from onnx import helper

    return elementwise(context, "Cast", value, to=helper.np_dtype_to_tensor_dtype(context.dtype))


@rule("select_n")
def _select(context: Context, which: Value, *cases: Value) -> Value:
    if len(cases) != 2 or which.dtype != np.bool_:
        raise context.unsupported(f"of {len(cases)} cases")
    return elementwise(context, "Where", which, cases[1], cases[0])
