"""How each operation of a traced program changes what the elements of an array see.

Along one dimension of the image: see `receptive`. An operation that is not known here is taken to
mix all positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple


class Reach(NamedTuple):
    """Element `i` of `axis` sees the pixels from `i * stride + low` to `i * stride + high`."""

    axis: int
    stride: Fraction
    low: Fraction
    high: Fraction


class Seen(NamedTuple):
    """What an array sees of the image along one dimension: `reach`, and all if there is a `whole`,
    the name of the operation through which it does."""

    reach: Reach | None = None
    whole: str = ""


NOTHING = Seen()


def union(seen: Sequence[Seen], where: str) -> Seen:
    """Returns what is seen by what several arrays of one shape are put together to."""
    reaches = [each.reach for each in seen if each.reach]
    whole = next((each.whole for each in seen if each.whole), "")
    if not reaches:
        return Seen(None, whole)
    if len({(reach.axis, reach.stride) for reach in reaches}) > 1:
        return Seen(None, whole or where)
    low, high = min(reach.low for reach in reaches), max(reach.high for reach in reaches)
    return Seen(reaches[0]._replace(low=low, high=high), whole)


def everything(equation: Any, seen: Sequence[Seen], where: str) -> Seen:
    """Of an operation that may mix all positions."""
    return Seen(None, next((each.whole for each in seen if each.whole), "") or where)


def _elementwise(equation: Any, seen: Sequence[Seen], where: str) -> Seen:
    return union(seen, where)


def _moved(reach: Reach, axis: int, offset: int = 0, factor: Fraction = Fraction(1)) -> Reach:
    """Returns the reach of an axis whose element `i` is element `i * factor + offset` of this."""
    shift = offset * reach.stride
    return Reach(axis, reach.stride * factor, reach.low + shift, reach.high + shift)


def _of_one_array(change: Callable[[Any, Reach, str], Reach | None]) -> Callable[..., Seen]:
    """Returns the rule of an operation whose first operand alone depends on the image.

    `change(equation, reach, where)` returns the reach of the result, None where it mixes positions.
    """

    def rule(equation: Any, seen: Sequence[Seen], where: str) -> Seen:
        (reach, whole), *others = seen
        if any(each != NOTHING for each in others):
            return everything(equation, seen, where)
        if reach is None:
            return seen[0]
        after = change(equation, reach, where)
        return Seen(after, whole or ("" if after else where))

    return rule


def _window(
    reach: Reach,
    axis: int,
    taps: int,
    stride: int,
    pads: tuple[int, int],
    dilation: int = 1,
    spread: int = 1,
) -> Reach:
    """Returns the reach behind a window of `taps`, `dilation` apart, on an axis whose elements are
    `spread` apart: with zeros between them, that is, as of a transposed convolution."""
    step = reach.stride / spread
    start = -pads[0] * step
    extent = ((taps - 1) * dilation) * step
    return Reach(axis, step * stride, reach.low + start, reach.high + start + extent)


def _convolution(equation: Any, reach: Reach, where: str) -> Reach | None:
    parameters = equation.params
    image, kernel, result = parameters["dimension_numbers"]
    if reach.axis == image[0] and parameters["batch_group_count"] == 1:
        return reach._replace(axis=result[0])
    if reach.axis not in image[2:]:
        return None
    place = image[2:].index(reach.axis)
    return _window(
        reach,
        result[2 + place],
        equation.invars[1].aval.shape[kernel[2 + place]],
        parameters["window_strides"][place],
        parameters["padding"][place],
        parameters["rhs_dilation"][place],
        parameters["lhs_dilation"][place],
    )


def _own_convolution(equation: Any, reach: Reach, where: str) -> Reach | None:
    """Of `cnnjax.ops.primitive`, images `[batch, height, width, channels]`."""
    form = equation.params["form"]
    geometry, lanes = form.geometry, len(form.lanes)
    if reach.axis == lanes:
        return reach
    place = reach.axis - lanes - 1
    if place not in (0, 1):
        return None
    return _window(
        reach,
        reach.axis,
        form.window[place],
        geometry.strides[place],
        geometry.pads[place],
        geometry.kernel_dilation[place],
    )


def _pool(equation: Any, reach: Reach, where: str) -> Reach:
    names = "window_dimensions", "window_strides", "padding", "window_dilation", "base_dilation"
    return _window(reach, reach.axis, *(equation.params[name][reach.axis] for name in names))


def _reduction(equation: Any, reach: Reach, where: str) -> Reach | None:
    axes = equation.params["axes"]
    if reach.axis in axes:
        return None
    return reach._replace(axis=reach.axis - sum(axis < reach.axis for axis in axes))


def _squeeze(equation: Any, reach: Reach, where: str) -> Reach | None:
    dropped = equation.params["dimensions"]
    if reach.axis in dropped:
        return None
    return reach._replace(axis=reach.axis - sum(axis < reach.axis for axis in dropped))


def _broadcast(equation: Any, reach: Reach, where: str) -> Reach | None:
    axis = equation.params["broadcast_dimensions"][reach.axis]
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return reach._replace(axis=axis) if before[reach.axis] == after[axis] else None


def _transpose(equation: Any, reach: Reach, where: str) -> Reach:
    return reach._replace(axis=equation.params["permutation"].index(reach.axis))


def _slice(equation: Any, reach: Reach, where: str) -> Reach:
    strides = equation.params["strides"]
    factor = Fraction(strides[reach.axis] if strides else 1)
    return _moved(reach, reach.axis, equation.params["start_indices"][reach.axis], factor)


def _pad(equation: Any, reach: Reach, where: str) -> Reach:
    low, _, between = equation.params["padding_config"][reach.axis]
    spread = _moved(reach, reach.axis, 0, Fraction(1, between + 1))
    return _moved(spread, reach.axis, -low)


def _cumulated(equation: Any, reach: Reach, where: str) -> Reach | None:
    axis = equation.params.get("axis", equation.params.get("dimension"))
    return None if axis == reach.axis else reach


def _same_size(equation: Any, reach: Reach, where: str) -> Reach | None:
    """Of `dynamic_slice`, along axes that it takes whole."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return reach if before[reach.axis] == after[reach.axis] else None


def _concatenation(equation: Any, seen: Sequence[Seen], where: str) -> Seen:
    axis, start, moved = equation.params["dimension"], 0, []
    for each, operand in zip(seen, equation.invars, strict=True):
        reach = each.reach
        if reach and reach.axis == axis:
            reach = _moved(reach, axis, -start)
        moved.append(Seen(reach, each.whole))
        start += operand.aval.shape[axis]
    along = {each.reach.low for each in moved if each.reach and each.reach.axis == axis}
    # Parts that do not go on where those before end: as of an image that is rolled.
    return union(moved, where) if len(along) < 2 else everything(equation, moved, where)


def _parts(equation: Any, seen: Sequence[Seen], where: str) -> list[Seen]:
    """Of `split`, each of whose results has its own place."""
    (reach, whole), axis = seen[0], equation.params["axis"]
    results, start = [], 0
    for size in equation.params["sizes"]:
        moved = _moved(reach, axis, start) if reach and reach.axis == axis else reach
        results.append(Seen(moved, whole))
        start += size
    return results


def _each_its_own(equation: Any, seen: Sequence[Seen], where: str) -> list[Seen]:
    return list(seen)


def _product(equation: Any, seen: Sequence[Seen], where: str) -> Seen:
    """Of `dot_general`: an axis that is summed over is seen whole."""
    contracted, batched = equation.params["dimension_numbers"]
    free = [
        [axis for axis in range(operand.aval.ndim) if axis not in (*summed, *shared)]
        for operand, summed, shared in zip(equation.invars, contracted, batched, strict=True)
    ]
    starts = len(batched[0]), len(batched[0]) + len(free[0])
    after = []
    for each, shared, others, start in zip(seen, batched, free, starts, strict=True):
        reach, whole = each
        if reach and reach.axis in shared:
            reach = reach._replace(axis=list(shared).index(reach.axis))
        elif reach and reach.axis in others:
            reach = reach._replace(axis=start + others.index(reach.axis))
        elif reach:
            reach, whole = None, whole or where
        after.append(Seen(reach, whole))
    return union(after, where)


def _reshape(equation: Any, reach: Reach, where: str) -> Reach | None:
    """An axis is kept, or split, or put together with what is behind it in memory."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    outer, inner = math.prod(before[: reach.axis]), math.prod(before[reach.axis + 1 :])
    for axis, size in enumerate(after):
        ahead, behind = math.prod(after[:axis]), math.prod(after[axis + 1 :])
        if ahead != outer or size == 1:
            continue
        # Element `c` of the new axis begins at `c * behind` of what `inner` is one element of.
        first, last = Fraction(0), Fraction(behind - 1, inner)
        if behind % inner == 0:
            last = Fraction(behind, inner) - 1
        elif inner % behind == 0:
            first, last = Fraction(behind, inner) - 1, Fraction(0)
        else:
            first = Fraction(1, inner) - 1
        return Reach(
            axis,
            reach.stride * behind / inner,
            reach.low + first * reach.stride,
            reach.high + last * reach.stride,
        )
    return None


ELEMENTWISE = (
    *("abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "cnnjax_written"),
    *("convert_element_type", "copy", "copy_p", "cos", "custom_lin", "div", "eq", "erf"),
    *("erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "layout_constraint", "le", "log", "log1p", "logistic", "lt", "max", "min"),
    *("mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision", "rem"),
    *("round", "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "sqrt", "square"),
    *("stop_gradient", "sub", "tan", "tanh", "xor"),
)
POOLS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
REDUCTIONS = (
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
    *("reduce_xor", "argmax", "argmin"),
)

RULES: dict[str, Callable[..., Any]] = {
    **{name: _elementwise for name in ELEMENTWISE},
    **{name: _of_one_array(_pool) for name in POOLS},
    **{name: _of_one_array(_reduction) for name in REDUCTIONS},
    **{
        name: _of_one_array(_cumulated)
        for name in ("cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp")
    },
    "broadcast_in_dim": _of_one_array(_broadcast),
    "cnnjax_convolution": _of_one_array(_own_convolution),
    "concatenate": _concatenation,
    "conv_general_dilated": _of_one_array(_convolution),
    "dot_general": _product,
    "dynamic_slice": _of_one_array(_same_size),
    "optimization_barrier": _each_its_own,
    "pad": _of_one_array(_pad),
    "reshape": _of_one_array(_reshape),
    "slice": _of_one_array(_slice),
    "split": _parts,
    "squeeze": _of_one_array(_squeeze),
    "transpose": _of_one_array(_transpose),
}
