"""The layers of a network, found in its traced program, and what they hand back to their inputs.

What depends on the image is followed forward; each step is noted on a tape, which is then walked
back. Steps are of three kinds: layers (affine functions, which a rule divides), moves (what goes
forward through a reshape, slice or maximum goes back the same way) and activations (a function of
one value hands back all that it gets).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from cnnjax.errors import UserError
from cnnjax.traced import bound, inner_program

MOVES = {
    *("reshape", "transpose", "squeeze", "expand_dims", "slice", "concatenate", "rev", "pad"),
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "cnnjax_written", "split"),
    *("reduce_max", "reduce_window_max", "optimization_barrier", "sharding_constraint"),
    *("layout_constraint", "dynamic_slice"),
}
# Each keeps 0 and the sign, as the names of functions under `jit` and as primitives.
ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "swish", "gelu"),
    *("hard_tanh", "hard_swish", "hard_silu", "soft_sign", "mish", "squareplus"),
}
ACTIVATION_PRIMITIVES = {"tanh", "asinh", "atan", "erf", "clamp"}
ELEMENTWISE = {"add", "sub", "mul", "div", "add_any"}
SUMS = {"reduce_sum", "reduce_window_sum", "neg", "add", "sub", "add_any"}
WEIGHTED = {"conv_general_dilated", "dot_general"}


class Value:
    """An array that depends on the image: its value, and what relevance came back to it.

    Attributes:
      value: the array.
      is_image: whether no layer with weights stands before it.
    """

    def __init__(self, value: jax.Array, is_image: bool) -> None:
        self.value, self.is_image = value, is_image


class Layer(NamedTuple):
    """An affine function `linear(x) + summand`: `scale * apply(x) + summand`.

    Attributes:
      apply: (inputs, kernel) -> result; kernel is None of a layer without weights.
      kernel: the weights.
      scale, summand: of the elementwise steps behind it, such as bias and batch normalization;
        shaped as the result.
      is_convolution, is_first: what the rules ask.
    """

    apply: Callable[..., jax.Array]
    kernel: jax.Array | None
    scale: jax.Array
    summand: jax.Array
    is_convolution: bool
    is_first: bool

    @property
    def has_weights(self) -> bool:
        """Whether it is a convolution or dense layer."""
        return self.kernel is not None

    def linear(self, x: Any) -> jax.Array:
        """Returns the layer's result without its summand."""
        return self.scale * self.apply(x, self.kernel)

    def whole(self, x: Any) -> jax.Array:
        """Returns the layer's result."""
        return self.linear(x) + self.summand

    def positive(self, x: jax.Array) -> jax.Array:
        """Returns `linear(x)` with the positive weights alone, those of kernel times scale."""
        return self._with_sign(x, jnp.maximum, jnp.minimum)

    def negative(self, x: jax.Array) -> jax.Array:
        """Returns `linear(x)` with the negative weights alone."""
        return self._with_sign(x, jnp.minimum, jnp.maximum)

    def _with_sign(self, x: jax.Array, same: Any, other: Any) -> jax.Array:
        assert self.kernel is not None
        up, down = jnp.maximum(self.scale, 0), jnp.minimum(self.scale, 0)
        return up * self.apply(x, same(self.kernel, 0)) + down * self.apply(
            x, other(self.kernel, 0)
        )


Divide = Callable[[Layer, Any, jax.Array], Any]


class Pending(NamedTuple):
    """A layer that goes on as long as elementwise steps with constants follow.

    Attributes:
      inputs: its `Value`s.
      apply, kernel, is_convolution: as of `Layer`.
      steps: the functions of one array behind it.
    """

    inputs: tuple[Value, ...]
    apply: Callable[..., jax.Array]
    kernel: jax.Array | None
    is_convolution: bool
    steps: tuple[Callable[[jax.Array], jax.Array], ...]

    def finished(self, tape: Tape) -> Value:
        """Notes the layer on the tape; returns its result."""
        x = tuple(value.value for value in self.inputs)
        given = x[0] if len(x) == 1 else x

        def behind(result: jax.Array) -> jax.Array:
            for step in self.steps:
                result = step(result)
            return result

        product = self.apply(given, self.kernel)
        summand = behind(jnp.zeros_like(product))
        scale = behind(jnp.ones_like(product)) - summand
        is_image = all(value.is_image for value in self.inputs)
        has_weights = self.kernel is not None
        layer = Layer(
            self.apply, self.kernel, scale, summand, self.is_convolution, is_image and has_weights
        )
        result = Value(behind(product), is_image and not has_weights)

        def back(relevance: jax.Array, divide: Divide) -> tuple[jax.Array, ...]:
            found = divide(layer, given, relevance)
            return (found,) if len(x) == 1 else found

        tape.steps.append((result, self.inputs, back))
        return result


class Tape:
    """The steps that were followed: (result, inputs, what hands relevance back to the inputs)."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, tuple[Value, ...], Callable[..., tuple[jax.Array, ...]]]] = []

    def move(self, function: Callable[..., Any], *inputs: Value) -> list[Value]:
        """Notes a step that hands relevance back by its derivative."""
        arrays = [value.value for value in inputs]
        results, pull = jax.vjp(lambda *arrays: list(function(*arrays)), *arrays)
        is_image = all(value.is_image for value in inputs)
        values = [Value(result, is_image) for result in results]
        for index, value in enumerate(values):

            def back(relevance: jax.Array, _: Divide, index: int = index) -> Any:
                cotangents = [jnp.zeros_like(result) for result in results]
                cotangents[index] = relevance
                return pull(cotangents)

            self.steps.append((value, inputs, back))
        return values

    def activation(self, function: Callable[[jax.Array], jax.Array], x: Value) -> Value:
        """Notes a step that hands back all that it gets."""
        result = Value(function(x.value), False)
        self.steps.append((result, (x,), lambda relevance, _: (relevance,)))
        return result

    def propagated(
        self, image: Value, outputs: list[Value], given: list[jax.Array], divide: Divide
    ) -> jax.Array:
        """Returns the relevance of the image, where the outputs are given some."""
        found: dict[int, jax.Array] = {}

        def add(value: Value, relevance: jax.Array) -> None:
            known = found.get(id(value))
            found[id(value)] = relevance if known is None else known + relevance

        for value, relevance in zip(outputs, given, strict=True):
            add(value, relevance)
        for result, inputs, back in reversed(self.steps):
            if id(result) in found:
                shares = back(found.pop(id(result)), divide)
                for value, share in zip(inputs, shares, strict=True):
                    add(value, share)
        return found.get(id(image), jnp.zeros_like(image.value))


def follow(program: ClosedJaxpr, image: jax.Array, tape: Tape) -> tuple[list[Value], Value]:
    """Runs a program of one image, and notes its steps.

    Returns:
      Its outputs, and the image.

    Raises:
      UserError: a step that has no rule; it names the layer.
    """
    start = Value(image, True)
    outputs = _run(program, [start], tape)
    # A constant output depends on no pixel.
    return [_finished(each, tape) if _is_live(each) else Value(each, False) for each in outputs], (
        start
    )


def _run(program: ClosedJaxpr, arguments: list[Any], tape: Tape) -> list[Any]:
    """Returns the outputs: arrays, or `Value` or `Pending` where they depend on the image."""
    jaxpr: Any = program.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))
    uses: dict[Any, int] = {}
    for atom in [*jaxpr.outvars, *(each for e in jaxpr.eqns for each in e.invars)]:
        if not isinstance(atom, Literal):
            uses[atom] = uses.get(atom, 0) + 1
    for equation in jaxpr.eqns:
        inputs = []
        for atom in equation.invars:
            value = atom.val if isinstance(atom, Literal) else known[atom]
            if isinstance(value, Pending):
                goes_on = equation.primitive.name in ELEMENTWISE and uses[atom] == 1
                if not goes_on:
                    known[atom] = value = value.finished(tape)
            inputs.append(value)
        if any(map(_is_live, inputs)):
            outputs = _step(equation, inputs, tape)
        else:
            outputs = bound(equation, inputs)
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [atom.val if isinstance(atom, Literal) else known[atom] for atom in jaxpr.outvars]


def _is_live(value: Any) -> bool:
    return isinstance(value, Value | Pending)


def _finished(value: Value | Pending, tape: Tape) -> Value:
    return value.finished(tape) if isinstance(value, Pending) else value


def _step(equation: Any, inputs: list[Any], tape: Tape) -> list[Any]:
    """Follows one step of which some inputs depend on the image."""
    name = equation.primitive.name
    inner = inner_program(equation)
    live = [index for index, value in enumerate(inputs) if _is_live(value)]
    if inner is not None:
        if equation.params.get("name") not in ACTIVATIONS or len(live) > 1:
            return _run(inner, inputs, tape)
        return [
            tape.activation(
                lambda x: bound(equation, _replaced(inputs, live[0], x))[0], inputs[live[0]]
            )
        ]
    if len(live) == 1 and name in ELEMENTWISE and not (name == "div" and live == [1]):
        return [_elementwise(equation, inputs, live[0])]
    finished = [_finished(each, tape) if _is_live(each) else each for each in inputs]

    def of_live(*arrays: jax.Array) -> list[Any]:
        filled = list(finished)
        for index, array in zip(live, arrays, strict=True):
            filled[index] = array
        return bound(equation, filled)

    values = [finished[index] for index in live]
    if name in WEIGHTED and len(live) == 1 and (name == "dot_general" or live == [0]):
        return [_weighted(equation, finished, live[0])]
    if name in SUMS:
        return [Pending(tuple(values), lambda x, _: of_live(*_as_tuple(x))[0], None, False, ())]
    if name == "max" and len(live) == 1:
        return [tape.activation(lambda x: of_live(x)[0], values[0])]
    if name in (*ACTIVATION_PRIMITIVES, "min") and len(live) == 1:
        return [tape.activation(lambda x: of_live(x)[0], values[0])]
    if name in MOVES or (name in ("select_n", "gather") and (live[0] == 0) == (name == "gather")):
        return list(tape.move(of_live, *values))
    if name in ("max", "min"):
        return list(tape.move(of_live, *values))
    raise _refused(equation)


def _replaced(items: list[Any], place: int, item: Any) -> list[Any]:
    return [*items[:place], item, *items[place + 1 :]]


def _as_tuple(x: Any) -> tuple[jax.Array, ...]:
    return x if isinstance(x, tuple) else (x,)


def _elementwise(equation: Any, inputs: list[Any], live: int) -> Pending:
    value = inputs[live]

    def step(x: jax.Array) -> jax.Array:
        return bound(equation, _replaced(inputs, live, x))[0]

    if isinstance(value, Pending):
        return value._replace(steps=(*value.steps, step))
    return Pending((value,), lambda x, _: x, None, False, (step,))


def _weighted(equation: Any, inputs: list[Any], live: int) -> Pending:
    other = 1 - live

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return bound(equation, [x, kernel] if live == 0 else [kernel, x])[0]

    is_convolution = equation.primitive.name == "conv_general_dilated"
    return Pending((inputs[live],), apply, inputs[other], is_convolution, ())


def _refused(equation: Any) -> UserError:
    path = str(equation.source_info.name_stack)
    # The network's class stands first.
    layer = path.partition("/")[2] or path or "the network"
    what = {
        "mul": "multiplies two activations",
        "dot_general": "multiplies two activations",
        "integer_pow": "squares activations",
        "square": "squares activations",
        "logistic": "has a sigmoid, which is not 0 at 0",
        "exp": "has an exponential (softmax or the like)",
        "div": "divides by activations",
    }.get(equation.primitive.name, f"has a step ({equation.primitive.name})")
    return UserError(
        f"layer-wise relevance has no rule for {layer}: it {what}. lrp is for networks of "
        "convolutions, dense layers, pools, batch normalization, sums and plain activations: take "
        "another method."
    )
