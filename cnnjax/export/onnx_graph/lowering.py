"""From a traced program to an ONNX graph: one rule a primitive.

What does not depend on the images is computed here and becomes a constant. Functions within the
program (`jit`, derivatives of one's own, rematerialization) are written in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cnnjax.errors import UserError
from cnnjax.export.onnx_graph.graph import Graph
from cnnjax.export.onnx_graph.values import Constant, Tensor, Value, is_symbolic
from cnnjax.export.program import INPUT, Program
from cnnjax.traced import inner_program

Rule = Callable[..., Value | list[Value]]
RULES: dict[str, Rule] = {}
# Jitted functions, by name, that are written as a whole: what they compute is an operator of ONNX.
FUNCTIONS: dict[str, Rule] = {}
# Of images: so many are a plane each before anything else.
FEW_CHANNELS = 4


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule knows: the graph, the equation's parameters, and the results it must give."""

    graph: Graph
    primitive: str
    params: dict[str, Any]
    shape: tuple[Any, ...]
    dtype: np.dtype

    def unsupported(self, what: str) -> UserError:
        """Returns the error for an operation that has no rule, or none for these parameters."""
        return unsupported(self.primitive, self.graph.path, what)


def unsupported(primitive: str, path: str, what: str = "") -> UserError:
    """Returns the error that names the primitive and the layer's path."""
    where = f" in layer {path}" if path else ""
    detail = f" ({what})" if what else ""
    return UserError(
        f"ONNX export has no rule for the operation {primitive}{detail}{where}: export as "
        "stablehlo or tflite, which take any, or write the layer by other operations."
    )


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of primitives: `rule(context, *values) -> value or values`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def function_rule(name: str) -> Callable[[Rule], Rule]:
    """Registers the rule of a jitted function: `rule(context, *values) -> value`."""

    def register(function: Rule) -> Rule:
        FUNCTIONS[name] = function
        return function

    return register


def lower(program: Program, *, channels_first: bool) -> tuple[Graph, Tensor]:
    """Returns the graph of a program and its output; the input is called `image`.

    Args:
      program: of a network.
      channels_first: whether the input lies as `[batch, channels, height, width]`.

    Raises:
      UserError: an operation without a rule; it names the primitive and the layer.
    """
    # The rules register themselves.
    from cnnjax.export.onnx_graph import (  # noqa: F401
        quantized,
        rules_arrays,
        rules_elementwise,
        rules_layers,
    )

    graph = Graph(batch=INPUT)
    shape = program.jaxpr.in_avals[-1].shape
    planes = (0, 3, 1, 2)
    axes = planes if channels_first else (0, 1, 2, 3)
    image = Tensor(INPUT, axes, shape, shape, np.dtype(program.signature.dtype))
    if shape[3] <= FEW_CHANNELS:
        # First of all, so that the mean and the deviation of each channel are one number for many
        # pixels: ONNX Runtime broadcasts along an innermost axis of 1 or 3 a pixel at a time.
        image = Tensor(graph.arranged(image, planes), planes, shape, shape, image.dtype)
    leaves: list[Value] = [Constant(leaf, leaf.shape) for leaf in program.leaves]
    constants = [as_constant(value) for value in program.jaxpr.consts]
    (output,) = _run(graph, program.jaxpr.jaxpr, constants, [*leaves, image])
    return graph, graph.whole(output)


def as_constant(value: Any) -> Constant:
    """Returns a concrete array as a constant."""
    array = np.asarray(value)
    return Constant(array, array.shape)


def _run(
    graph: Graph, jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value]
) -> list[Value]:
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return as_constant(atom.val) if hasattr(atom, "val") else known[atom]

    used = _used(jaxpr)
    for equation in jaxpr.eqns:
        if not any(variable in used for variable in equation.outvars):
            continue
        with _within(graph, str(equation.source_info.name_stack)):
            results = _equation(graph, equation, [read(atom) for atom in equation.invars])
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _used(jaxpr: Any) -> set[Any]:
    """Returns the variables that the results depend on."""
    used = {atom for atom in jaxpr.outvars if not hasattr(atom, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(variable in used for variable in equation.outvars):
            used |= {atom for atom in equation.invars if not hasattr(atom, "val")}
    return used


@contextlib.contextmanager
def _within(graph: Graph, path: str) -> Iterator[None]:
    """Writes what is written in the context as of the layer `path` within the current one."""
    before = graph.path
    graph.path = "/".join(filter(None, (before, path)))
    try:
        yield
    finally:
        graph.path = before


def _equation(graph: Graph, equation: Any, values: list[Value]) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    inner = inner_program(equation)
    function = FUNCTIONS.get(params.get("name", "")) if inner is not None else None
    if inner is not None and function is None:
        return _run(graph, inner.jaxpr, [as_constant(each) for each in inner.consts], values)
    if name == "cond" and isinstance(values[0], Constant):
        branch = params["branches"][int(values[0].array)]
        return _run(graph, branch.jaxpr, [as_constant(c) for c in branch.consts], values[1:])
    shapes = [variable.aval.shape for variable in equation.outvars]
    if all(any(_is_zero(dim) for dim in shape) for shape in shapes):
        # Such as padding by no rows. ONNX reads a length of 0 as "the same as before".
        return [_empty(variable.aval) for variable in equation.outvars]
    if function is None and all(isinstance(value, Constant) for value in values):
        folded = _folded(equation, values)
        if folded is not None:
            return folded
    written = function or RULES.get(name)
    if written is None:
        raise unsupported(name, graph.path)
    dtype = np.dtype(equation.outvars[0].aval.dtype)
    context = Context(graph, name, params, shapes[0], dtype)
    results = written(context, *values)
    return results if isinstance(results, list) else [results]


def _is_zero(dim: Any) -> bool:
    return not is_symbolic(dim) and int(dim) == 0


def _empty(aval: Any) -> Constant:
    sizes = [1 if is_symbolic(dim) else int(dim) for dim in aval.shape]
    return Constant(np.zeros(sizes, aval.dtype), aval.shape)


def _folded(equation: Any, values: Sequence[Value]) -> list[Value] | None:
    """Computes an equation of constants; None where only a rule can, as a length is symbolic."""
    from cnnjax.export.onnx_graph.folding import ELEMENTWISE, same_rank

    name, shape = equation.primitive.name, equation.outvars[0].aval.shape
    if name in ELEMENTWISE:
        arrays = same_rank([value.array for value in values], len(shape))  # type: ignore[union-attr]
        array = ELEMENTWISE[name](equation.params, *arrays)
        return [Constant(np.asarray(array, equation.outvars[0].aval.dtype), shape)]
    # Broadcasts stay short.
    symbolic = any(is_symbolic(dim) for value in values for dim in value.shape)
    symbolic |= any(is_symbolic(dim) for out in equation.outvars for dim in out.aval.shape)
    if symbolic or name in ("broadcast_in_dim", "transpose", "squeeze"):
        return None
    with jax.ensure_compile_time_eval():
        results = equation.primitive.bind(*(value.whole() for value in values), **equation.params)  # type: ignore[union-attr]
    results = results if equation.primitive.multiple_results else [results]
    return [as_constant(result) for result in results]
