"""A network's program as JAX traces it, with the arrays that its layers return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import Jaxpr

from cnnjax import ops
from cnnjax.explain import taps


class Program(NamedTuple):
    """What a network computes for one image, in evaluation mode.

    Attributes:
      jaxpr: its first arguments are the leaves of the variables, its last is the image `[1, height,
        width, channels]`; its results are the activations of `shapes`, in that order.
      shapes: of each stage's and layer's activation, in the order of computation.
    """

    jaxpr: Jaxpr
    shapes: dict[str, tuple[int, ...]]


def trace(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> Program:
    """Returns the program of a network; nothing is computed.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`; shapes are enough.
      image_shape: `[height, width, channels]`.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def activations(variables: Any, image: jax.Array) -> list[jax.Array]:
        found = taps.all_layers(model, variables, image)
        shapes.update({name: tuple(x.shape) for name, x in found.items()})
        return list(found.values())

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # One primitive a convolution and a pool, whatever they are lowered to.
    with ops.lowering("lax"):
        closed = jax.make_jaxpr(activations)(variables, image)
    return Program(closed.jaxpr, shapes)


def place(equation: Any, outer: str = "") -> str:
    """Returns in which layer an operation is, as far as the program tells, and its name."""
    parts = [part for part in f"{outer}/{equation.source_info.name_stack}".split("/") if part]
    # The first is the network's own class.
    return "/".join([*parts[1:], equation.primitive.name])
