"""Which pixels can influence a unit at all, and how much they do.

`influence` asks the traced program, whatever the weights: each operation is replaced by the sum of
what it reads, and the derivative of the whole is positive exactly at the pixels from which a path
leads to the unit. It is exact at borders, of branches of different shapes, of windows with holes
and of upsampled layers. `effective_field` is the derivative of the network itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.extend.core import Jaxpr, Literal

from cnnjax.errors import UserError
from cnnjax.explain import taps
from cnnjax.explain.inside import program, reach
from cnnjax.ops.choice import RESULT
from cnnjax.traced import inner_program

Array = jax.Array


def influence(
    model: nn.Module,
    variables: Any,
    image_shape: Sequence[int],
    layer: str,
    units: Sequence[tuple[int, int]],
) -> Array:
    """Returns the pixels that can influence units of a layer, through any of its channels.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`; shapes are enough.
      image_shape: `[height, width, channels]`.
      layer: a stage or layer whose output is an image.
      units: (row, column) of each.

    Returns:
      bool `[units, height, width]`.

    Raises:
      UserError: an unknown layer, one whose output is no image, or a unit outside of it.
    """
    traced = program.trace(model, variables, image_shape)
    taps.check_layers(traced.shapes, [layer])
    _, height, width, _ = shape = traced.shapes[layer]
    for row, column in units:
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(f"{layer} has no unit ({row}, {column}): it is {height} x {width}.")
    number = list(traced.shapes).index(layer)

    def reached(image: Array) -> Array:
        marks = [None] * (len(traced.jaxpr.invars) - 1)
        (found,) = _marked(traced.jaxpr, [*marks, image], [number])
        return jnp.zeros(shape) if found is None else found

    @jax.jit
    def pixels(units: Array) -> Array:
        _, pullback = jax.vjp(reached, jnp.zeros((1, *image_shape)))

        def of_unit(unit: Array) -> Array:
            (derivative,) = pullback(jnp.zeros(shape).at[0, unit[0], unit[1]].set(1.0))
            return jnp.any(derivative[0] > 0, -1)

        return lax.map(of_unit, units)

    return pixels(jnp.asarray(units, jnp.int32).reshape(-1, 2))


@jax.custom_vjp
def _once(x: Array) -> Array:
    """`x`, whose derivative is 1 where a path leads, however many do: their number overflows."""
    return x


_once.defvjp(lambda x: (x, None), lambda _, cotangent: ((cotangent > 0).astype(cotangent.dtype),))

# What depends on the image, as floats; None what does not.
Mark = Array | None


def _marked(jaxpr: Jaxpr, arguments: Sequence[Mark], wanted: Sequence[int] | None) -> list[Mark]:
    """Returns the marks of (the `wanted`) results of a program."""
    known: dict[Any, Mark] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Mark:
        return None if isinstance(atom, Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        marks = [read(atom) for atom in equation.invars]
        if all(mark is None for mark in marks):
            continue
        inner = inner_program(equation)
        if inner is not None:
            results = _marked(inner.jaxpr, marks, None)
        elif equation.primitive.name == "cond":
            of_branches = [
                _marked(branch.jaxpr, marks[1:], None) for branch in equation.params["branches"]
            ]
            results = [_sum(each) for each in zip(*of_branches, strict=True)]
        else:
            rule = RULES.get(equation.primitive.name, _everything)
            result = rule(equation, marks)
            results = result if isinstance(result, list) else [result] * len(equation.outvars)
        results = [None if each is None else _once(each) for each in results]
        known |= dict(zip(equation.outvars, results, strict=True))
    outvars = jaxpr.outvars if wanted is None else [jaxpr.outvars[index] for index in wanted]
    return [read(atom) for atom in outvars]


def _sum(marks: Sequence[Mark]) -> Mark:
    found = [mark for mark in marks if mark is not None]
    return functools.reduce(jnp.add, found) if found else None


def _everything(equation: Any, marks: Sequence[Mark]) -> list[Mark]:
    total = sum(jnp.sum(mark) for mark in marks if mark is not None)
    return [jnp.broadcast_to(total, variable.aval.shape) for variable in equation.outvars]


def _elementwise(equation: Any, marks: Sequence[Mark]) -> Mark:
    shape = equation.outvars[0].aval.shape
    return _sum([None if mark is None else jnp.broadcast_to(mark, shape) for mark in marks])


def _same_operation(equation: Any, marks: Sequence[Mark]) -> Mark | list[Mark]:
    """Of an operation that moves or adds elements of its first operand."""
    if any(mark is not None for mark in marks[1:]):
        return _everything(equation, marks)
    return _bound(equation, [marks[0]])


def _bound(equation: Any, operands: Sequence[Any], **changed: Any) -> Any:
    result = equation.primitive.bind(*operands, **{**equation.params, **changed})
    return list(result) if equation.primitive.multiple_results else result


def _with_zeros(equation: Any, marks: Sequence[Mark]) -> Mark | list[Mark]:
    """The same, where what does not depend on the image stands beside what does."""
    operands = [
        jnp.zeros(atom.aval.shape) if mark is None else mark
        for atom, mark in zip(equation.invars, marks, strict=True)
    ]
    return _bound(equation, operands)


def _reduction(equation: Any, marks: Sequence[Mark]) -> Mark:
    (mark,) = marks
    assert mark is not None
    return jnp.sum(mark, equation.params["axes"])


def _pool(equation: Any, marks: Sequence[Mark]) -> Any:
    if marks[0] is None or any(mark is not None for mark in marks[1:]):
        return _everything(equation, marks)
    names = "window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"
    return lax.reduce_window(marks[0], 0.0, lax.add, *(equation.params[name] for name in names))


def _bilinear(equation: Any, marks: Sequence[Mark], **changed: Any) -> Mark:
    """Of a convolution or product: the sum over what meets."""
    ones = [jnp.ones(atom.aval.shape) for atom in equation.invars]
    terms = []
    for index, mark in enumerate(marks):
        if mark is not None:
            operands = [*ones[:index], mark, *ones[index + 1 :]]
            terms.append(_bound(equation, operands, **changed))
    return _sum(terms)


def _of_floats(equation: Any, marks: Sequence[Mark]) -> Mark:
    return _bilinear(equation, marks, preferred_element_type=jnp.float32)


def _own_convolution(equation: Any, marks: Sequence[Mark]) -> Any:
    if equation.params["form"].of != RESULT:
        return _everything(equation, marks)
    return _bilinear(equation, marks)


RULES: dict[str, Callable[..., Any]] = {
    **{name: _elementwise for name in reach.ELEMENTWISE},
    **{name: _reduction for name in reach.REDUCTIONS},
    **{name: _pool for name in reach.POOLS},
    **{
        name: _same_operation
        for name in ("broadcast_in_dim", "reshape", "rev", "slice", "split", "squeeze", "transpose")
    },
    "cnnjax_convolution": _own_convolution,
    "concatenate": _with_zeros,
    "conv_general_dilated": _of_floats,
    "dot_general": _of_floats,
    "pad": _with_zeros,
}


def effective_field(
    model: nn.Module,
    variables: Any,
    image: Array,
    layer: str,
    *,
    unit: tuple[int, int] | None = None,
) -> Array:
    """Returns how much each pixel moves a unit of a layer.

    It is the absolute derivative of the sum of the unit's channels, summed over the image's
    channels, averaged over images.

    Luo et al. 2016 (arXiv 1701.04128), section 2: it is Gaussian, and smaller than the theoretical.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image: float `[batch, height, width, channels]`, as the model expects it.
      layer: a stage or layer whose output is an image.
      unit: (row, column); by default the middle.

    Returns:
      `[height, width]`, the largest 1; zeros where nothing moves the unit.

    Raises:
      UserError: an unknown layer, one whose output is no image, or a unit outside of it.
    """
    taps.check_image(image)
    shapes = taps.layer_shapes(model, variables, image[:1])
    taps.check_layers(shapes, [layer])
    _, height, width, _ = shapes[layer]
    row, column = unit or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(f"{layer} has no unit ({row}, {column}): it is {height} x {width}.")

    def total(image: Array) -> Array:
        return jnp.sum(taps.tap(model, variables, image, [layer])[1][layer][:, row, column])

    field = jnp.mean(jnp.sum(jnp.abs(jax.grad(total)(image)), -1), 0)
    largest = jnp.max(field)
    return field / jnp.where(largest == 0, 1, largest)


def effective_size(field: Any, threshold: float = 1 - 0.9545) -> float:
    """Returns the side of the square with as many pixels as are above a part of the largest.

    Luo et al. 2016, section 4.1: those within two standard deviations, were the field Gaussian.

    Args:
      field: `[height, width]` of `effective_field`.
      threshold: that part.
    """
    field = np.asarray(field)
    return math.sqrt(float(np.sum(field > threshold * field.max())))
