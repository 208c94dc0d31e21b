"""Follows channels through a traced program: what each of JAX's operations does to their labels.

What is not known here fixes the channels that enter it, so that nothing is removed wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from cnnjax.compress import labels as names
from cnnjax.compress.labels import Classes, Labels
from cnnjax.traced import inner_program

# Of JAX, but for the last, which is `ops.computed_once`.
_ENTRY_BY_ENTRY = """
abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos div eq erf erf_inv
erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
nextafter not optimization_barrier or pow reduce_precision rem round rsqrt select_n sign sin sqrt
square stop_gradient sub tan tanh xor cnnjax_written
"""
ELEMENTWISE = frozenset(_ENTRY_BY_ENTRY.split())
REDUCTIONS = frozenset(
    ("argmax", "argmin", *(f"reduce_{kind}" for kind in ("and", "max", "min", "or", "prod", "sum")))
)
WINDOWS = frozenset(("reduce_window_max", "reduce_window_min", "reduce_window_sum"))


def follow(closed: ClosedJaxpr, inputs: Sequence[Labels], classes: Classes) -> list[Labels]:
    """Returns the labels of a program's outputs, and joins the classes of what it couples."""
    jaxpr = closed.jaxpr
    known: dict[Any, Labels] = {
        variable: _of_constant(value)
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True)
    }
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Labels:
        return _of_constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        known |= dict(zip(equation.outvars, _outputs(equation, values, classes), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_constant(value: Any) -> Labels:
    """Along axes where a constant differs, it belongs to the entries that it was made for."""
    array = np.asarray(value) if np.ndim(value) else np.zeros(())
    return {axis: np.zeros(array.shape[axis], np.int64) for axis in names._varying(array)}


def _outputs(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    name, params = equation.primitive.name, equation.params
    inner = inner_program(equation)
    if inner is not None and len(inner.jaxpr.invars) == len(values):
        return follow(inner, values, classes)
    if name in ELEMENTWISE:
        if name == "optimization_barrier":
            return values
        return [names.merged(classes, values) for _ in equation.outvars]
    if name in REDUCTIONS:
        return [names.reduced(classes, values[0], params["axes"])]
    rule = RULES.get(name) or (_window if name in WINDOWS else None)
    if rule is not None:
        return rule(equation, values, classes)
    names.fix_all(classes, values)
    return [names.fixed(getattr(out.aval, "shape", ())) for out in equation.outvars]


def _broadcast(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    places = equation.params["broadcast_dimensions"]
    return [{places[axis]: numbers for axis, numbers in values[0].items()}]


def _transpose(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    order = list(equation.params["permutation"])
    return [{order.index(axis): numbers for axis, numbers in values[0].items()}]


def _reshape(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return [names.reshaped(classes, values[0], before, after)]


def _slice(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    start, stop = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or [1] * len(start)
    labels = names.without(classes, values[0], [a for a, step in enumerate(strides) if step != 1])
    return [{axis: names.part(classes, n, start[axis], stop[axis]) for axis, n in labels.items()}]


def _split(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    axis, ends = equation.params["axis"], np.cumsum(equation.params["sizes"]).tolist()
    pieces: list[Labels] = []
    for start, stop in zip([0, *ends], ends, strict=False):
        labels = {**values[0]}
        if axis in labels:
            labels[axis] = names.part(classes, labels[axis], start, stop)
        pieces.append(labels)
    return pieces


def _concatenate(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    axis = equation.params["dimension"]
    sizes = [atom.aval.shape[axis] for atom in equation.invars]
    return [names.joined(classes, values, sizes, axis)]


def _pad(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    config = equation.params["padding_config"]
    padded = {axis for axis, edges in enumerate(config) if tuple(edges) != (0, 0, 0)}
    result = dict(names.without(classes, values[0], padded))
    # How many channels are added follows from how many there are.
    for axis in padded & values[0].keys():
        result[axis] = np.zeros(equation.outvars[0].aval.shape[axis], np.int64)
    return [result]


def _iota(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    axis, shape = equation.params["dimension"], equation.outvars[0].aval.shape
    return [{axis: np.zeros(shape[axis], np.int64)}]


def _window(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    params = equation.params
    used = [
        axis
        for axis, size in enumerate(params["window_dimensions"])
        if size > 1 or params["window_strides"][axis] > 1 or any(params["padding"][axis])
    ]
    return [names.without(classes, values[0], used)]


def _dot(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    (left_axes, right_axes), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = values
    for one, other in zip(left_axes, right_axes, strict=True):
        couple(classes, left.get(one), right.get(other))
    result: dict[int, np.ndarray] = {}
    for place, (one, other) in enumerate(zip(left_batch, right_batch, strict=True)):
        couple(classes, left.get(one), right.get(other))
        if one in left or other in right:
            result[place] = left[one] if one in left else right[other]
    place = len(left_batch)
    for side, atom, used in (
        (left, equation.invars[0], {*left_axes, *left_batch}),
        (right, equation.invars[1], {*right_axes, *right_batch}),
    ):
        for axis in range(len(atom.aval.shape)):
            if axis not in used:
                if axis in side:
                    result[place] = side[axis]
                place += 1
    return [result]


def _convolution(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    image, kernel = values
    batch_axis, channel_axis = numbers.lhs_spec[:2]
    out_axis, in_axis = numbers.rhs_spec[:2]
    out_batch, out_channel = numbers.out_spec[:2]
    image = names.without(classes, image, set(numbers.lhs_spec[2:]))
    kernel = names.without(classes, kernel, set())
    channels, outputs = image.get(channel_axis), kernel.get(out_axis)
    if equation.params["batch_group_count"] > 1:
        names.fix_all(classes, [image, kernel])
    elif groups == 1:
        couple(classes, channels, kernel.get(in_axis))
    else:
        _grouped(equation, classes, channels, kernel.get(in_axis), outputs, groups)
    result = {} if outputs is None else {out_channel: outputs}
    if batch_axis in image:
        result[out_batch] = image[batch_axis]
    return [result]


def _grouped(
    equation: Any,
    classes: Classes,
    channels: np.ndarray | None,
    inputs: np.ndarray | None,
    outputs: np.ndarray | None,
    groups: int,
) -> None:
    """Couples the channels of a convolution in groups.

    Of one channel each, a group is removed whole: its channel and what is computed from it. Of
    more, all groups lose the same ones, and stay equal.
    """
    if channels is None or outputs is None:
        couple(classes, channels, None)
        couple(classes, outputs, None)
        couple(classes, inputs, None)
    elif inputs is None and len(channels) == groups:
        classes.join(np.repeat(channels, len(outputs) // groups), outputs)
    else:
        names.tie(classes, channels, groups)
        names.tie(classes, outputs, groups)
        couple(classes, channels[: len(channels) // groups], inputs)


def couple(classes: Classes, one: np.ndarray | None, other: np.ndarray | None) -> None:
    """Joins the channels of two axes that meet; those of an axis that meets none are fixed."""
    if one is not None and other is not None:
        classes.join(one, other)
    elif one is not None or other is not None:
        classes.fix(one if one is not None else other)  # type: ignore[arg-type]


def _cumulative(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    return [names.without(classes, values[0], [equation.params["axis"]])]


def _reverse(equation: Any, values: list[Labels], classes: Classes) -> list[Labels]:
    return [names.without(classes, values[0], equation.params["dimensions"])]


RULES: dict[str, Callable[[Any, list[Labels], Classes], list[Labels]]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumsum": _cumulative,
    "dot_general": _dot,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "transpose": _transpose,
}
