"""Operations and bytes by layer, counted in a traced program: exact, and of no device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal

from cnnjax.cost.scopes import layer_of
from cnnjax.traced import inner_program

# One operation for each entry of the result.
_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh div eq erf
erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt
max min mul ne neg nextafter not or pow rem round rsqrt select_n sign sin sinh sqrt square sub
tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# One for each entry of the argument.
_REDUCTIONS = """
argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_max reduce_min
reduce_or reduce_precision reduce_prod reduce_sum reduce_xor
"""
REDUCTIONS = frozenset(_REDUCTIONS.split())


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs, for a batch.

    Attributes:
      layer: its path; "" for what belongs to no layer alone.
      products: multiplications and additions of convolutions and matrix products, 2 for each pair.
      others: all other arithmetic operations.
      bytes_read, bytes_written: of arrays that enter and leave it, parameters among them: the
        traffic with memory of a program in which each layer is one kernel.
    """

    layer: str
    products: int
    others: int
    bytes_read: int
    bytes_written: int

    @property
    def operations(self) -> int:
        """All arithmetic operations: FLOPs."""
        return self.products + self.others

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.bytes if self.bytes else math.inf


class Array:
    """An array of the flat program: the same object wherever it goes."""

    def __init__(self, aval: Any):
        self.bytes = _bytes(aval)


class Step(NamedTuple):
    """An operation of a flat program: its layer, the arrays it takes and makes, its costs."""

    layer: str
    inputs: list[Array]
    outputs: list[Array]
    products: int = 0
    others: int = 0


def layer_costs(function: Callable[..., Any], *arguments: Any) -> list[LayerCost]:
    """Returns what each layer of a function costs, in the order of computation.

    Nothing is computed: the function is traced. A loop counts as often as it runs where that is
    known (`scan`), once elsewhere (`while`). Of a condition the dearest branch counts; of forms for
    several platforms the cheapest, which is the definition.

    Args:
      function: such as `lambda variables, image: model.apply(variables, image)`.
      *arguments: arrays, or `jax.ShapeDtypeStruct`s.
    """
    program = jax.make_jaxpr(function)(*arguments)
    steps: list[Step] = []
    outputs = _flatten(program, [Array(v.aval) for v in program.jaxpr.invars], "", 1, steps)
    return _by_layer(steps, outputs)


def total(costs: Sequence[LayerCost]) -> tuple[int, int]:
    """Returns the operations and the bytes of all layers."""
    return sum(each.operations for each in costs), sum(each.bytes for each in costs)


def _by_layer(steps: list[Step], outputs: list[Array]) -> list[LayerCost]:
    layers = list(dict.fromkeys(step.layer for step in steps))
    made = {id(array): step.layer for step in steps for array in step.outputs}
    read: dict[str, dict[int, int]] = {layer: {} for layer in layers}
    written: dict[str, dict[int, int]] = {layer: {} for layer in layers}
    for step in steps:
        for array in step.inputs:
            maker = made.get(id(array))
            if maker != step.layer:
                read[step.layer][id(array)] = array.bytes
                if maker is not None:
                    written[maker][id(array)] = array.bytes
    for array in outputs:
        if id(array) in made:
            written[made[id(array)]][id(array)] = array.bytes
    costs = [
        LayerCost(
            layer,
            sum(step.products for step in steps if step.layer == layer),
            sum(step.others for step in steps if step.layer == layer),
            sum(read[layer].values()),
            sum(written[layer].values()),
        )
        for layer in layers
    ]
    return [each for each in costs if each.operations or each.bytes]


def _flatten(
    program: ClosedJaxpr, inputs: list[Array], scope: str, times: int, steps: list[Step]
) -> list[Array]:
    """Adds the operations of a program, calls opened, to `steps`; returns its outputs."""
    jaxpr: Any = program.jaxpr
    known: dict[Any, Any] = {variable: Array(variable.aval) for variable in jaxpr.constvars}
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return Array(atom.aval) if isinstance(atom, Literal) else known[atom]

    platforms = _platform_indices(jaxpr)
    for equation in jaxpr.eqns:
        path = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        values = [read(atom) for atom in equation.invars]
        opened, layer = _opened(equation, platforms), layer_of(path)[0]
        made = [Array(variable.aval) for variable in equation.outvars]
        if opened is not None:
            inner, often, taken = opened
            results = _flatten(inner, taken(values), path, times * often, steps)
            if often == 1 and len(results) == len(made):
                made = results
            else:
                # What a loop stacks is an array of its own.
                steps.append(Step(layer, [], made))
        elif _is_view(equation):
            # No traffic of its own: the array goes on under another shape.
            made = [values[0]]
        else:
            costs = (times * each for each in equation_operations(equation))
            # Literals are part of the program.
            arrays = [
                value
                for value, atom in zip(values, equation.invars, strict=True)
                if not isinstance(atom, Literal)
            ]
            steps.append(Step(layer, arrays, made, *costs))
        known |= dict(zip(equation.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_view(equation: Any) -> bool:
    return equation.primitive.name in ("reshape", "squeeze", "expand_dims", "cnnjax_written") and (
        len(equation.outvars) == 1
    )


def _platform_indices(jaxpr: Any) -> set[Any]:
    return {eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "platform_index"}


def _opened(
    equation: Any, platforms: set[Any]
) -> tuple[ClosedJaxpr, int, Callable[[list[Any]], list[Any]]] | None:
    """Returns the program inside an operation, how often it runs, and which inputs it takes.

    Args:
      equation: the operation.
      platforms: the variables that say for which platform a program is compiled.
    """
    name, params = equation.primitive.name, equation.params
    if (inner := inner_program(equation)) is not None:
        count = len(inner.jaxpr.invars)
        return inner, 1, lambda values: values[len(values) - count :]
    if name == "scan":
        body = params["jaxpr"]
        fixed = params["num_consts"] + params["num_carry"]
        forms = [Array(variable.aval) for variable in body.jaxpr.invars]
        return body, params["length"], lambda values: [*values[:fixed], *forms[fixed:]]
    if name == "while":
        body, skipped = params["body_jaxpr"], params["cond_nconsts"]
        return body, 1, lambda values: values[skipped:]
    if name == "cond":
        # What one platform computes in another way, with more operations, means the same.
        choose = min if equation.invars[0] in platforms else max
        branch = choose(params["branches"], key=_operations_inside)
        return branch, 1, lambda values: values[1:]
    if name in ("shard_map", "smap"):
        inner = params["jaxpr"]
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return closed, 1, lambda values: values
    return None


def _operations_inside(program: ClosedJaxpr) -> int:
    return sum(
        sum(equation_operations(equation)) * often for equation, often in _equations(program, 1)
    )


def _equations(program: ClosedJaxpr, times: int) -> Iterator[tuple[Any, int]]:
    platforms = _platform_indices(program.jaxpr)
    for equation in program.jaxpr.eqns:
        opened = _opened(equation, platforms)
        if opened is None:
            yield equation, times
        else:
            yield from _equations(opened[0], times * opened[1])


def equation_operations(equation: Any) -> tuple[int, int]:
    """Returns the operations of products, and all others, of an operation of JAX."""
    name = equation.primitive.name
    results = sum(_size(variable.aval) for variable in equation.outvars)
    if name in PRODUCTS:
        return 2 * PRODUCTS[name](equation), 0
    if name in ELEMENTWISE:
        return 0, results
    if name in REDUCTIONS:
        return 0, _size(equation.invars[0].aval)
    if name.startswith("reduce_window") or name == "select_and_scatter_add":
        window = equation.params.get("window_dimensions", ())
        return 0, results * math.prod(window)
    if name in ("scatter-add", "scatter_add"):
        return 0, _size(equation.invars[-1].aval)
    return 0, 0


def _convolution(equation: Any) -> int:
    """Multiply-accumulates of lax's convolution; zeros put between pixels count nothing."""
    kernel, numbers = equation.invars[1].aval, equation.params["dimension_numbers"]
    features = kernel.shape[numbers.rhs_spec[0]]
    between = math.prod(equation.params["lhs_dilation"])
    each = kernel.size // max(features, 1)
    return equation.outvars[0].aval.size * each // max(between, 1)


def _own_convolution(equation: Any) -> int:
    """Multiply-accumulates of `cnnjax.ops.primitive`: of a gradient as many as forward."""
    from cnnjax.ops.choice import KERNEL, RESULT

    form = equation.params["form"]
    shapes = dict(zip(form.operands(), (atom.aval.shape for atom in equation.invars), strict=True))
    shapes[form.of] = equation.outvars[0].aval.shape
    lanes = len(form.lanes)
    # Without the axes of `vmap`, which the widest of the three tells.
    widest = math.prod(max(_lane(s, lanes, i) for s in shapes.values()) for i in range(lanes))
    result = math.prod(shapes[RESULT][-4:])
    return widest * result * math.prod(shapes[KERNEL][-4:-1])


def _lane(shape: Sequence[int], lanes: int, index: int) -> int:
    return shape[index] if len(shape) == 4 + lanes else 1


def _dot(equation: Any) -> int:
    (left_axes, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return equation.outvars[0].aval.size * math.prod(shape[axis] for axis in left_axes)


PRODUCTS = {
    "conv_general_dilated": _convolution,
    "cnnjax_convolution": _own_convolution,
    "dot_general": _dot,
}


def _size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def _bytes(aval: Any) -> int:
    """Returns the bytes of an array; of a key, which no memory is counted for, 0."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 0
    return _size(aval) * dtype.itemsize
