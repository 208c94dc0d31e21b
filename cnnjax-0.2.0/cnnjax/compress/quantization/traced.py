"""What the traced program of a network says of its layers: which feeds which, and through what.

A layer's input and output are marked in the program while it is traced, so that no table by family
is needed: what lies between two marks is what the network really computes there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from cnnjax import ops
from cnnjax.models.interceptors import intercept_methods

Variables = Any
IN, OUT = "in:", "out:"
# By their class alone, not by subclasses, which may do more with their kernel.
KERNEL_LAYERS = (
    *(ops.Conv, ops.ConvPool, ops.ConvTranspose, ops.Dense),
    *(nn.Conv, nn.ConvTranspose, nn.Dense),
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A module with parameters, as it is called.

    Attributes:
      path: slash-joined, such as `stage1/block2/conv1`.
      module: not bound; its fields say what it computes.
      input_shape, output_shape: of one call.
      calls: how often one pass calls it.
    """

    path: str
    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    @property
    def has_kernel(self) -> bool:
        """Whether it is a convolution or a dense layer that uses its kernel as it is."""
        return type(self.module) in KERNEL_LAYERS

    @property
    def groups(self) -> int:
        """Groups of channels that do not see each other."""
        return getattr(self.module, "feature_group_count", 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """A network's evaluation of two images, traced.

    Attributes:
      layers: path -> layer, in the order of computation.
      jaxpr: with marks `in:PATH` and `out:PATH`.
    """

    layers: dict[str, Layer]
    jaxpr: core.ClosedJaxpr

    def followers(self, kind: type) -> dict[str, str]:
        """Returns `{layer with a kernel: layer of that kind}` where one feeds the other alone.

        Both are called once, and nothing else sees what is between them.
        """
        found = {}
        for jaxpr in _all(self.jaxpr.jaxpr):
            uses, makers = _uses(jaxpr), _makers(jaxpr)
            for equation in jaxpr.eqns:
                follower = _mark(equation, IN)
                source = equation.invars[0] if follower else None
                if not isinstance(source, core.Var) or uses[source] != 1:
                    continue
                maker = makers.get(source)
                layer = _mark(maker, OUT) if maker is not None else None
                if layer is None or follower is None:
                    continue
                here, there = self.layers[layer], self.layers[follower]
                once = here.calls == there.calls == 1
                if once and here.has_kernel and isinstance(there.module, kind):
                    found[layer] = follower
        return found

    def between(self) -> Iterator[tuple[str, str, Callable[[jax.Array], jax.Array]]]:
        """Yields (layer, next layer, function) where the next one's input is a function of the
        first one's output and of nothing else, and nothing else sees what is between them."""
        jaxpr = self.jaxpr.jaxpr
        uses, makers = _uses(jaxpr), _makers(jaxpr)
        outputs = {e.outvars[0]: _mark(e, OUT) for e in jaxpr.eqns if _mark(e, OUT)}
        constants = dict(zip(jaxpr.constvars, self.jaxpr.consts, strict=True))
        for equation in jaxpr.eqns:
            follower = _mark(equation, IN)
            if not follower or not self._is_plain(follower):
                continue
            target = equation.invars[0]
            slice_ = _slice(target, makers, outputs, constants)
            if slice_ is None:
                continue
            source, equations = slice_
            layer = outputs[source]
            inside = [source, *(v for e in equations for v in e.outvars)]
            kept = {id(e) for e in equations} | {id(equation)}
            leaks = any(
                uses[var] != sum(list(e.invars).count(var) for e in jaxpr.eqns if id(e) in kept)
                for var in inside
            )
            if layer and self._is_plain(layer) and not leaks:
                yield (
                    layer,
                    follower,
                    functools.partial(_evaluate, jaxpr, source, target, equations, constants),
                )

    def _is_plain(self, path: str) -> bool:
        return self.layers[path].has_kernel and self.layers[path].calls == 1


def trace(model: Any, variables: Variables, image_shape: Sequence[int]) -> Program:
    """Traces a model's evaluation; nothing is computed.

    Args:
      model: with the contract of `cnnjax.models`.
      variables: of the model, arrays or their shapes.
      image_shape: `[height, width, channels]`.
    """
    layers: dict[str, Layer] = {}
    open_paths: list[tuple[str, ...]] = []

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        path = module.path
        own = context.method_name == "__call__" and path and args and _has_parameters(module)
        # A subclass that calls its parent's `__call__` is intercepted twice.
        if not own or path in open_paths or not isinstance(args[0], jax.Array):
            return call(*args, **kwargs)
        name = "/".join(path)
        open_paths.append(path)
        try:
            output = call(checkpoint_name(args[0], IN + name), *args[1:], **kwargs)
        finally:
            open_paths.pop()
        if not isinstance(output, jax.Array):
            return output
        calls = layers[name].calls + 1 if name in layers else 1
        unbound = module.clone(parent=None, name=None)
        layers[name] = Layer(name, unbound, args[0].shape, output.shape, calls)
        return checkpoint_name(output, OUT + name)

    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    with intercept_methods(intercept):
        jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, image)
    return Program(layers, jaxpr)


def _has_parameters(module: nn.Module) -> bool:
    own = dict(module.variables).get("params", {})
    return any(not hasattr(leaf, "items") for leaf in own.values())


def _mark(equation: Any, kind: str) -> str | None:
    """Returns the path of the layer whose input or output an equation marks."""
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    return name.removeprefix(kind) if str(name).startswith(kind) else None


def _all(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from _all(inner)


def _uses(jaxpr: Any) -> dict[Any, int]:
    """Returns how often each variable is read."""
    counts: dict[Any, int] = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], 0)
    for equation in jaxpr.eqns:
        counts |= {var: 0 for var in equation.outvars}
        for var in equation.invars:
            if isinstance(var, core.Var):
                counts[var] += 1
    for var in jaxpr.outvars:
        if isinstance(var, core.Var):
            counts[var] += 1
    return counts


def _makers(jaxpr: Any) -> dict[Any, Any]:
    return {var: equation for equation in jaxpr.eqns for var in equation.outvars}


def _slice(target: Any, makers: Any, outputs: Any, constants: Any) -> tuple[Any, list[Any]] | None:
    """Returns the one layer's output that a variable is computed from, and the equations between.

    None where it is computed from several, or from an argument of the program.
    """
    source, needed, waiting, seen = None, [], [target], set()
    while waiting:
        var = waiting.pop()
        if not isinstance(var, core.Var) or var in seen or var in constants:
            continue
        seen.add(var)
        if var in outputs:
            if source not in (None, var):
                return None
            source = var
        elif var not in makers:
            return None
        else:
            needed.append(makers[var])
            waiting += makers[var].invars
    if source is None:
        return None
    order = {id(equation): None for equation in needed}
    return source, [e for e in dict.fromkeys(makers.values()) if id(e) in order]


def _evaluate(
    jaxpr: Any, source: Any, target: Any, equations: Sequence[Any], constants: Any, value: jax.Array
) -> jax.Array:
    part = jaxpr.replace(
        constvars=[],
        invars=[source, *constants],
        outvars=[target],
        eqns=list(equations),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return jax.core.eval_jaxpr(part, [], value, *constants.values())[0]
