"""A network with other layers than it was written with: narrower, skipped or factored ones.

What is changed stands in a table by the layer's path, which `model.json` keeps among the arguments
as `layer_changes`:

    {"conv1": {"features": 3}, "stage1/block2": {"skip": true}, "dense1": {"ranks": [40]}}

- `features`, `feature_group_count`: of that convolution or dense layer, in place of its own.
- `skip`: the module returns its input.
- `ranks`: the layer is several with few channels between them: see `factored`.

Parameters keep their paths, so that all that acts on a network's layers acts on these.
"""

from __future__ import annotations

import contextvars
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import module as linen

from cnnjax import ops
from cnnjax.errors import UserError, unknown_name
from cnnjax.models.interceptors import intercept_methods, not_intercepted
from cnnjax.models.stages import unchanged_stages

Changes = Mapping[str, Mapping[str, Any]]
ARGUMENT = "layer_changes"
WIDTHS = ("features", "feature_group_count")
KINDS = (*WIDTHS, "skip", "ranks")
# The layers that a factored one is made of, in order.
REDUCE, CORE, EXPAND = "reduce", "core", "expand"
# Of the network as it was written: path of a module -> channels of its input; and the length of the
# path of the module that it stands in.
_widths: contextvars.ContextVar[tuple[int, Mapping[tuple[str, ...], int]] | None] = (
    contextvars.ContextVar("widths", default=None)
)


class Reshaped(nn.Module):
    """A network with `layer_changes`; parameters have the paths that they have without it.

    Attributes:
      network: as it was written.
      layer_changes: the table as JSON, as `written` makes it: a module's fields must be hashable.

    Call: as the network's.
    """

    network: nn.Module
    layer_changes: str = "{}"

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    def __call__(self, image: jax.Array, *, train: bool = False) -> Any:
        table, first = json.loads(self.layer_changes), len(self.path)

        def change(
            call: Callable[..., Any],
            args: tuple,
            kwargs: dict,
            context: nn.module.InterceptorContext,
        ) -> Any:
            module = context.module
            given = table.get("/".join(module.path[first:]))
            if given is None or context.method_name != "__call__":
                return call(*args, **kwargs)
            if given.get("skip"):
                return args[0]
            for name in WIDTHS:
                if name in given:
                    # Modules are made anew for each call of the network.
                    object.__setattr__(module, name, given[name])
            if "ranks" in given:
                return factored(module, args[0], given["ranks"])
            return call(*args, **kwargs)

        network = self.network.clone(parent=None, name=None)
        token = _widths.set((first, _input_widths(network, image.shape[1:])))
        try:
            with intercept_methods(change):
                return self.network(image, train=train)
        finally:
            _widths.reset(token)


def written(changes: Changes) -> str:
    """Returns the table as a module keeps it."""
    return json.dumps({path: dict(changes[path]) for path in sorted(changes)}, sort_keys=True)


def changes_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the changes of a model; none of one that is as it was written."""
    return json.loads(model.layer_changes) if isinstance(model, Reshaped) else {}


def reshaped(model: nn.Module, changes: Changes) -> nn.Module:
    """Returns the model with these changes, after those that it has.

    Raises:
      UserError: a change of no known kind, or that is no table.
    """
    if not isinstance(changes, Mapping):
        raise UserError(f"{ARGUMENT} is a {type(changes).__name__}: give a table by path.")
    for path, given in changes.items():
        for name in given:
            if name not in KINDS:
                raise unknown_name(f"change of layer {path}", name, KINDS)
    found = changes_of(model)
    for path, given in changes.items():
        found[path] = {**found.get(path, {}), **given}
    network = model.network if isinstance(model, Reshaped) else model
    return Reshaped(network, written(found)) if found else network


def input_width(x: jax.Array) -> int:
    """Returns the channels of `x`, the input of the calling module, as the network was written.

    What a block is made of follows from its widths there (whether its shortcut has a projection,
    say), and stays so when channels are taken out.
    """
    found = _widths.get()
    if found is None:
        return x.shape[-1]
    first, widths = found
    calling: Any = linen._context.module_stack[-1]
    return widths.get(calling.path[first:], x.shape[-1])


@functools.lru_cache(maxsize=32)
def _input_widths(
    network: nn.Module, image_shape: tuple[int, ...]
) -> Mapping[tuple[str, ...], int]:
    found: dict[tuple[str, ...], int] = {}

    def note(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name == "__call__" and args and hasattr(args[0], "shape"):
            found.setdefault(context.module.path, args[0].shape[-1])
        return call(*args, **kwargs)

    token = _widths.set(None)
    try:
        with not_intercepted(), unchanged_stages(), intercept_methods(note):
            jax.eval_shape(
                lambda image: network.init(jax.random.key(0), image, train=False),
                jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
            )
    finally:
        _widths.reset(token)
    return found


def factored(layer: nn.Module, x: jax.Array, ranks: Sequence[int]) -> jax.Array:
    """Returns what a layer of few ranks computes, in place of the layer that calls.

    A dense layer or a 1x1 convolution of rank `r` is two, `reduce` to `r` channels and `expand`.
    A larger convolution of ranks `(r, s)` is three: `reduce` to `r` channels by 1x1, the `core` of
    its size from `r` to `s`, `expand` by 1x1 (Tucker-2: Kim et al. 2016, arXiv 1511.06530, section
    3.1); where a rank is 0, that side has no factor. The last one has the bias.

    Args:
      layer: the convolution or dense layer, within whose scope the factors are.
      x: its input.
      ranks: one number, or two.

    Raises:
      UserError: the layer is neither, or has groups.
    """
    if isinstance(layer, nn.Dense):
        dense = functools.partial(type(layer), dtype=layer.dtype)
        hidden = dense(ranks[0], use_bias=False, name=REDUCE)(x)
        return dense(layer.features, use_bias=layer.use_bias, name=EXPAND)(hidden)
    if not isinstance(layer, nn.Conv | ops.ConvPool) or _groups(layer) > 1:
        raise UserError(f"{'/'.join(layer.path)} is no layer that can be factored: leave it whole.")
    kernel_size, options = layer.kernel_size, _window(layer)
    plain = functools.partial(ops.Conv, dtype=layer.dtype, use_bias=False)
    if len(ranks) == 1:
        # The stride may as well come first: fewer positions.
        x = plain(ranks[0], (1, 1), **options, name=REDUCE)(x)
        return _last(layer, (1, 1), {"padding": "VALID"}, EXPAND)(x)
    first, second = ranks
    if first:
        x = plain(first, (1, 1), name=REDUCE)(x)
    if not second:
        return _last(layer, kernel_size, options, CORE)(x)
    x = plain(second, kernel_size, **options, name=CORE)(x)
    return _last(layer, (1, 1), {"padding": "VALID"}, EXPAND)(x)


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "feature_group_count", 1)


def _window(layer: Any) -> dict[str, Any]:
    if isinstance(layer, ops.ConvPool):
        return {"padding": layer.padding}
    return {name: getattr(layer, name) for name in ("strides", "padding", "kernel_dilation")}


def _last(layer: Any, kernel_size: Any, options: dict[str, Any], name: str) -> nn.Module:
    """Returns the factor that ends a layer: with its bias, and with its activation and pool."""
    shared = {"use_bias": layer.use_bias, "dtype": layer.dtype, "name": name}
    if isinstance(layer, ops.ConvPool):
        shared |= {"activation": layer.activation, "pool": layer.pool}
        return ops.ConvPool(layer.features, kernel_size, **options, **shared)
    return ops.Conv(layer.features, kernel_size, **options, **shared)
