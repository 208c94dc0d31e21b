"""Layer-wise relevance propagation: a target divided over the pixels, layer by layer.

Bach et al. 2015 (PLoS ONE 10(7)); the rules and their names are those of Montavon et al. 2019,
"Layer-Wise Relevance Propagation: An Overview", table 10.1. Each layer hands what it gets to its
inputs in proportion to what they contributed. The layers are found in the network's traced program
(`explain.layers_of_program`): a convolution or dense layer with bias and batch normalization behind
it is one. An activation hands on all that it gets, a max pool hands it to the largest, sums and
averages divide it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError, unknown_name
from cnnjax.explain import taps
from cnnjax.explain.gradients import CHANNELS, reduced
from cnnjax.explain.layers_of_program import Layer, Tape, follow
from cnnjax.explain.targets import Target

RULES = ("composite", "epsilon", "gamma", "z_plus", "alpha_beta")
FIRST = ("box", "same")


class Rules(NamedTuple):
    """Numbers of the rules; see `lrp`."""

    rule: str
    first: str
    epsilon: float
    gamma: float
    alpha: float
    low: float | None
    high: float | None


def lrp(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    rule: str = "composite",
    first: str = "box",
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    alpha: float = 2.0,
    low: float | None = None,
    high: float | None = None,
    channels: str = "sum",
) -> jax.Array:
    """How much of the target each pixel is given, by layer-wise relevance propagation.

    The map adds up to the target, less what biases are given (`checks.completeness` of a network
    without biases, baseline 0).

    Args:
      model: a Linen module with the contract of `cnnjax.models`, of convolutions, dense layers,
        pools, batch normalization, sums and activations that keep 0 and the sign: plain networks,
        ResNets and DenseNets; no products of activations, as in gates, attention, layer norm.
      variables: its `params` and, where it has them, `batch_stats`.
      image: float `[batch, height, width, channels]`, as the model expects it.
      target: of the outputs; what it divides is output times derivative, for a logit the logit.
      rule: of the layers with weights: `epsilon` (by signed contributions), `gamma` (positive
        weights count `gamma` times more), `z_plus` (positive contributions only), `alpha_beta`
        (positive `alpha` times, negative `alpha - 1` times), or `composite` (gamma for
        convolutions, epsilon for dense layers: Montavon et al. 2019, section 10.3).
      first: rule of the first layer: `box`, that of pixels between `low` and `high`; or `same`.
      epsilon: added to denominators, away from 0.
      gamma, alpha: see `rule`.
      low, high: bounds of a pixel, in the units of `image`; by default the least and the largest
        value of each image's channels, and 0.
      channels: as for `gradients.gradient`.

    Returns:
      `[batch, height, width]`.

    Raises:
      UserError: an unknown rule, numbers that make none, or a layer that has no rule.
    """
    taps.check_image(image)
    rules = _checked(Rules(rule, first, epsilon, gamma, alpha, low, high))
    if channels not in CHANNELS:
        raise unknown_name("channels", channels, CHANNELS)

    def forward(image: jax.Array) -> Any:
        return taps.outputs_of(model, variables, image)

    # The program with convolutions and pools as such, not in a form that computes several as one.
    with ops.lowering("lax"):
        traced, shape = jax.make_jaxpr(forward, return_shape=True)(image)
    tape = Tape()
    leaves, result = follow(traced, image, tape)
    outputs = jax.tree.unflatten(jax.tree.structure(shape), [leaf.value for leaf in leaves])
    slopes = jax.grad(lambda outputs: jnp.sum(taps.scores(target, outputs, image)))(outputs)
    given = [o * s for o, s in zip(jax.tree.leaves(outputs), jax.tree.leaves(slopes), strict=True)]
    divide = functools.partial(_divided, rules=rules)
    return reduced(tape.propagated(result, leaves, given, divide), channels)


def check_network(model: nn.Module, variables: Any, image: Any) -> None:
    """Raises the UserError that `lrp` would, for any class; nothing is computed.

    Arguments as for `lrp`; `image` may be a `jax.ShapeDtypeStruct`.
    """

    def target(outputs: Any) -> jax.Array:
        totals = [jnp.sum(leaf.reshape(len(leaf), -1), 1) for leaf in jax.tree.leaves(outputs)]
        return jnp.sum(jnp.stack(totals), 0)

    jax.eval_shape(lambda image: lrp(model, variables, image, target), image)


def _checked(rules: Rules) -> Rules:
    if rules.rule not in RULES:
        raise unknown_name("rule", rules.rule, RULES)
    if rules.first not in FIRST:
        raise unknown_name("rule of the first layer", rules.first, FIRST)
    if rules.epsilon <= 0 or rules.gamma < 0 or rules.alpha < 1:
        raise UserError(
            f"epsilon={rules.epsilon} must be positive, gamma={rules.gamma} 0 or more, "
            f"alpha={rules.alpha} 1 or more."
        )
    if rules.low is not None and rules.high is not None and rules.low >= rules.high:
        raise UserError(f"low={rules.low} must be below high={rules.high}.")
    return rules


def _divided(layer: Layer, x: Any, relevance: jax.Array, *, rules: Rules) -> Any:
    """Returns what a layer hands to its input, or to each of a tuple of inputs."""
    share = functools.partial(_share, x, relevance, epsilon=rules.epsilon)
    if not layer.has_weights:
        return share(layer.whole)
    if layer.is_first and rules.first == "box":
        return _box(layer, x, relevance, rules)
    rule = rules.rule
    if rule == "composite":
        rule = "gamma" if layer.is_convolution else "epsilon"
    if rule == "epsilon":
        return share(layer.whole)
    above, below = jnp.maximum(layer.summand, 0), jnp.minimum(layer.summand, 0)
    if rule == "gamma":
        favored = lambda x: layer.whole(x) + rules.gamma * (layer.positive(x) + above)  # noqa: E731
        return share(favored)

    def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(x, 0), jnp.minimum(x, 0)

    def speaking_for(x: jax.Array) -> jax.Array:
        up, down = split(x)
        return layer.positive(up) + layer.negative(down) + above

    def speaking_against(x: jax.Array) -> jax.Array:
        up, down = split(x)
        return layer.negative(up) + layer.positive(down) + below

    alpha = 1.0 if rule == "z_plus" else rules.alpha
    given = alpha * share(speaking_for)
    return given if alpha == 1 else given - (alpha - 1) * share(speaking_against)


def _share(
    x: Any, relevance: jax.Array, contribute: Callable[..., jax.Array], *, epsilon: float
) -> Any:
    """Divides relevance by the terms of the sums that `contribute` returns."""
    sums, pull = jax.vjp(contribute, x)
    (slopes,) = pull(relevance / _away_from_zero(sums, epsilon))
    return jax.tree.map(jnp.multiply, x, slopes)


def _box(layer: Layer, x: jax.Array, relevance: jax.Array, rules: Rules) -> jax.Array:
    """Montavon et al. 2017 (arXiv 1512.02479), equation 15: each pixel against its bounds."""
    axes = tuple(range(1, max(2, x.ndim - 1)))
    low, high = (
        jnp.broadcast_to(
            bound(x, axes, keepdims=True, initial=0) if given is None else given, x.shape
        )
        for bound, given in ((jnp.min, rules.low), (jnp.max, rules.high))
    )
    low, high = (bound.astype(x.dtype) for bound in (low, high))

    def sums(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return layer.linear(x) - layer.positive(low) - layer.negative(high)

    total, pull = jax.vjp(sums, x, low, high)
    slopes = pull(relevance / _away_from_zero(total, rules.epsilon))
    return sum(each * slope for each, slope in zip((x, low, high), slopes, strict=True))


def _away_from_zero(values: jax.Array, epsilon: float) -> jax.Array:
    return values + jnp.where(values < 0, -epsilon, epsilon).astype(values.dtype)
