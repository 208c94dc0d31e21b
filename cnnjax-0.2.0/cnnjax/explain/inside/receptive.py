"""The receptive field of every layer, derived from the network's traced program.

Araujo, Norris and Sim 2019, "Computing Receptive Fields of Convolutional Neural Networks", Distill:
element `i` of a layer's axis sees the pixels from `i * stride + low` to `i * stride + high`. Each
operation changes stride, low and high; of branches that meet, the union is taken. What mixes all
positions (a global pool, squeeze-and-excitation, attention) sees the whole image, of any size: then
the field is infinite, and is given twice, with and without what came that way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from flax import linen as nn
from jax.extend.core import Jaxpr, Literal

from cnnjax.explain.inside import program
from cnnjax.explain.inside.program import Program
from cnnjax.explain.inside.reach import NOTHING, RULES, Reach, Seen, everything, union
from cnnjax.traced import inner_program

# Along rows and along columns.
Both = tuple[Seen, Seen]
NEITHER = (NOTHING, NOTHING)


class Side(NamedTuple):
    """A receptive field along one dimension, in pixels of the image.

    Attributes:
      size: pixels that one unit sees; 0 where that is known to be nothing but through `whole`.
      stride: pixels between the fields of neighboring units ("jump").
      center: of the field of the first unit; the first pixel's is 0, its edges are -0.5 and 0.5.
      whole: the operation through which a unit sees every pixel besides; "" where there is none.
    """

    size: float
    stride: float
    center: float
    whole: str


class ReceptiveField(NamedTuple):
    """Of the units of one layer, along rows and columns."""

    rows: Side
    columns: Side

    @property
    def is_infinite(self) -> bool:
        """Whether a unit sees every pixel of an image of any size."""
        return bool(self.rows.whole or self.columns.whole)

    def box(
        self, row: int, column: int, image_shape: Sequence[int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns ((top, bottom), (left, right)) of what a unit sees without what sees all.

        The ends are exclusive, and may lie outside of the image, where it is padded. A layer that
        has nothing else sees the whole image.
        """
        ends = []
        for side, index, size in zip(self, (row, column), image_shape[:2], strict=True):
            low = side.center + index * side.stride - (side.size - 1) / 2
            first = math.ceil(low)
            ends.append((first, math.floor(low + side.size)) if side.size else (0, size))
        return ends[0], ends[1]

    def __str__(self) -> str:
        def number(pair: tuple[float, float]) -> str:
            first, second = (f"{value:g}" for value in pair)
            return first if first == second else f"{first} x {second}"

        sizes = self.rows.size, self.columns.size
        strides = self.rows.stride, self.columns.stride
        centers = self.rows.center, self.columns.center
        finite = f"{sizes[0]:g} x {sizes[1]:g} pixels, stride {number(strides)}, "
        finite += f"first center {number(centers)}"
        if not self.is_infinite:
            return finite
        cause = self.rows.whole or self.columns.whole
        text = f"the whole image through {cause}"
        return f"{text}; else {finite}" if all(sizes) else text


def receptive_fields(
    model: nn.Module, variables: Any, image_shape: Sequence[int]
) -> dict[str, ReceptiveField]:
    """Returns the receptive field of every stage and layer whose output is an image.

    Sizes are of units far from the border of a large image; at upsampled layers, whose units
    differ, they are an upper bound.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`; shapes are enough.
      image_shape: `[height, width, channels]`; nothing is computed on it.
    """
    return of_program(program.trace(model, variables, image_shape))


def of_program(traced: Program) -> dict[str, ReceptiveField]:
    """Returns what `receptive_fields` does, of a program that was traced before."""
    pixel = Reach(1, Fraction(1), Fraction(0), Fraction(0))
    image = Seen(pixel), Seen(pixel._replace(axis=2))
    arguments = [NEITHER] * (len(traced.jaxpr.invars) - 1) + [image]
    results = _followed(traced.jaxpr, arguments)
    return {
        name: ReceptiveField(_side(seen[0], 1), _side(seen[1], 2))
        for (name, shape), seen in zip(traced.shapes.items(), results, strict=True)
        if len(shape) == 4
    }


def _side(seen: Seen, axis: int) -> Side:
    reach = seen.reach
    if reach is None or reach.axis != axis:
        whole = seen.whole or ("a reshape" if reach else "")
        return Side(0.0, 0.0, 0.0, whole)
    size, center = reach.high - reach.low + 1, (reach.high + reach.low) / 2
    return Side(float(size), float(reach.stride), float(center), seen.whole)


def _followed(jaxpr: Jaxpr, arguments: Sequence[Both], outer: str = "") -> list[Both]:
    """Returns what the results of a program see, of what its arguments see."""
    known: dict[Any, Both] = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Both:
        return NEITHER if isinstance(atom, Literal) else known.get(atom, NEITHER)

    for equation in jaxpr.eqns:
        seen = [read(atom) for atom in equation.invars]
        if all(each == NEITHER for each in seen):
            continue
        inner = inner_program(equation)
        where = program.place(equation, outer)
        if inner is not None:
            results = _followed(inner.jaxpr, seen, f"{outer}/{equation.source_info.name_stack}")
        elif equation.primitive.name == "cond":
            of_branches = [
                _followed(branch.jaxpr, seen[1:], outer) for branch in equation.params["branches"]
            ]
            results = [_union(parts, where) for parts in zip(*of_branches, strict=True)]
        else:
            results = _applied(equation, seen, where)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _applied(equation: Any, seen: Sequence[Both], where: str) -> list[Both]:
    rule = RULES.get(equation.primitive.name, everything)
    rows, columns = (rule(equation, [each[side] for each in seen], where) for side in (0, 1))
    if not isinstance(rows, list):
        rows, columns = ([each] * len(equation.outvars) for each in (rows, columns))
    results = list(zip(rows, columns, strict=True))
    if equation.primitive.name == "reshape":
        # What makes tokens of rows and columns keeps neither.
        before, (after,) = seen[0], results
        if any(old.reach and not new.reach for old, new in zip(before, after, strict=True)):
            text = f"{where} (positions become tokens)"
            rows, columns = (Seen(None, old.whole or text) for old in before)
            results = [(rows, columns)]
    return results


def _union(parts: Sequence[Both], where: str) -> Both:
    rows, columns = (union([part[side] for part in parts], where) for side in (0, 1))
    return rows, columns
