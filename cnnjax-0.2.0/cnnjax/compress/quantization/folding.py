"""Batch normalization folded into the layer before it.

    norm(conv(x)) = conv'(x)      kernel' = kernel * a      bias' = (bias - mean) * a + beta
    a = scale / sqrt(var + epsilon)

for each output channel (Jacob et al. 2018, arXiv 1712.05877, section 3.2): in evaluation a
BatchNorm is an affine function of each channel. Which norm follows which layer is read from the
traced program (`traced`), so every family is served as far as its norms can be folded at all: one
behind an addition or a concatenation, as in DenseNet and pre-activation ResNets, stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.compress.quantization import traced
from cnnjax.errors import UserError
from cnnjax.models.interceptors import intercept_methods
from cnnjax.trees import from_named_leaves, named_leaves

Variables = dict[str, Any]
NORM = nn.BatchNorm


@dataclasses.dataclass(frozen=True)
class Folded:
    """A model some of whose norms are folded; `init` and `apply` are those of a Linen module.

    Its variables are the model's without those of the folded norms; the layers before them have a
    `bias` whether or not the model's own have one.

    Attributes:
      model: a Linen module with the contract of `cnnjax.models`.
      folded: pairs (path of the layer, path of the norm).
    """

    model: nn.Module
    folded: tuple[tuple[str, str], ...] = ()

    def init(self, key: Any, image: jax.Array, *, train: bool = False) -> Variables:
        """Initializes the model, and folds what it has drawn."""
        variables: Any = self.model.init(key, image, train=train)
        return fold(variables, self.folded, _epsilons(self.model, variables, image.shape[1:]))

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        with folded_norms(self.folded, variables["params"]):
            return self.model.apply(variables, *args, **kwargs)


@contextlib.contextmanager
def folded_norms(pairs: Sequence[tuple[str, str]], params: Mapping[str, Any]) -> Any:
    """Within the context, models run without these norms, and with the biases of `params`."""
    layers = {tuple(layer.split("/")) for layer, _ in pairs}
    norms = {tuple(norm.split("/")) for _, norm in pairs}

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = context.module.path
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if path in norms:
            return args[0]
        output = call(*args, **kwargs)
        if path in layers and not context.module.use_bias:
            bias: Any = params
            for name in (*path, "bias"):
                bias = bias[name]
            output = output + bias.astype(output.dtype)
        return output

    with intercept_methods(intercept):
        yield


def fold_batch_norm(
    model: nn.Module, variables: Variables, image_shape: Sequence[int]
) -> tuple[Folded, Variables]:
    """Returns a model without the norms that can be folded, and its variables.

    In evaluation it computes the same up to rounding.

    Args:
      model: a Linen module with the contract of `cnnjax.models`, or a `Folded`.
      variables: its `params` and `batch_stats`.
      image_shape: `[height, width, channels]`.

    Returns:
      The model, whose `folded` names what was folded (nothing, where there is nothing to fold), and
      its variables.
    """
    before: tuple[tuple[str, str], ...] = ()
    if isinstance(model, Folded):
        model, before = model.model, model.folded
    found = traced.trace(Folded(model, before), variables, image_shape)
    pairs = {
        layer: norm
        for layer, norm in found.followers(NORM).items()
        if not hasattr(found.layers[layer].module, "activation") and _fits(found.layers[norm])
    }
    epsilons = {norm: found.layers[norm].module.epsilon for norm in pairs.values()}
    folded = fold(variables, tuple(pairs.items()), epsilons)
    return Folded(model, (*before, *pairs.items())), folded


def _fits(norm: traced.Layer) -> bool:
    return getattr(norm.module, "axis", -1) in (-1, len(norm.input_shape) - 1)


def _epsilons(
    model: nn.Module, variables: Variables, image_shape: Sequence[int]
) -> dict[str, float]:
    layers = traced.trace(model, variables, image_shape).layers
    return {path: x.module.epsilon for path, x in layers.items() if isinstance(x.module, NORM)}


def fold(
    variables: Variables, pairs: Sequence[tuple[str, str]], epsilons: Mapping[str, float]
) -> Variables:
    """Returns variables with each pair's norm folded into its layer.

    Args:
      variables: `params` and `batch_stats`.
      pairs: (path of the layer, path of the norm).
      epsilons: path of the norm -> what it adds to the variance.

    Raises:
      UserError: there are no such layers.
    """
    params = named_leaves(variables["params"])
    statistics = named_leaves(variables.get("batch_stats", {}))
    for layer, norm in pairs:
        if f"{layer}/kernel" not in params or f"{norm}/var" not in statistics:
            raise UserError(
                f"{norm} cannot be folded into {layer}: the variables lack one of them."
            )
        mean, var = statistics.pop(f"{norm}/mean"), statistics.pop(f"{norm}/var")
        # In float64 where the numbers are known; under a trace in what there is.
        concrete = not isinstance(var, jax.core.Tracer)
        xp: Any = np if concrete else jnp
        wide = np.float64 if concrete else jnp.float32
        factor = 1 / xp.sqrt(xp.asarray(var, wide) + epsilons[norm])
        if f"{norm}/scale" in params:
            factor = factor * xp.asarray(params.pop(f"{norm}/scale"), wide)
        kernel = params[f"{layer}/kernel"]
        bias = xp.asarray(params.get(f"{layer}/bias", xp.zeros(kernel.shape[-1])), wide)
        bias = (bias - xp.asarray(mean, wide)) * factor
        if f"{norm}/bias" in params:
            bias = bias + xp.asarray(params.pop(f"{norm}/bias"), wide)
        params[f"{layer}/kernel"] = jnp.asarray(xp.asarray(kernel, wide) * factor, kernel.dtype)
        params[f"{layer}/bias"] = jnp.asarray(bias, kernel.dtype)
    others = {k: v for k, v in variables.items() if k not in ("params", "batch_stats")}
    return {
        **others,
        "params": from_named_leaves(params),
        "batch_stats": from_named_leaves(statistics),
    }
