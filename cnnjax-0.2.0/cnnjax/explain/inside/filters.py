"""The kernels of a network's convolutions, as its layers hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.errors import UserError, unknown_name
from cnnjax.models.interceptors import intercept_methods


class Kernel(NamedTuple):
    """The kernel of one convolution.

    Attributes:
      kernel: `[height, width, channels of a group, features]`.
      groups: that it divides channels and features into; as many as channels of a depthwise one.
      reads_image: whether its channels are those of the network's image.
    """

    kernel: jax.Array
    groups: int
    reads_image: bool


def kernels(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> dict[str, Kernel]:
    """Returns the kernel of every convolution by its path, in the order of computation.

    Of a fine-tuned model it is what the layer computes with: adapters of low rank are merged.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image_shape: `[height, width, channels]`; nothing is computed on it.

    Raises:
      UserError: the network has no convolution.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    found: dict[str, tuple[int, bool]] = {}

    def run(variables: Any, image: jax.Array) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}

        def record(
            call: Callable[..., Any],
            args: tuple,
            kwargs: dict,
            context: nn.module.InterceptorContext,
        ) -> Any:
            kernel: Any = context.module.variables.get("params", {}).get("kernel")
            name = "/".join(context.module.path)
            is_image = bool(args) and getattr(args[0], "ndim", 0) == 4
            if getattr(kernel, "ndim", 0) == 4 and is_image and name not in arrays:
                channels = args[0].shape[-1]
                # Alone the first one of a network may read its image: later ones, as many channels.
                reads = channels == image.shape[-1] and not any(
                    reads for _, reads in found.values()
                )
                found[name] = max(1, channels // kernel.shape[2]), reads
                arrays[name] = kernel
            return call(*args, **kwargs)

        with intercept_methods(record):
            model.apply(variables, image, train=False)
        return arrays

    jax.eval_shape(run, variables, image)
    order = dict(found)
    arrays = jax.jit(run)(variables, jnp.zeros(image.shape))
    if not order:
        raise UserError(f"{type(model).__name__} has no convolution whose filters could be drawn.")
    return {name: Kernel(arrays[name], *order[name]) for name in order}


def behind(found: dict[str, Kernel], layers: Sequence[str], layer: str) -> str:
    """Returns the convolution that a layer's activation shows: itself, or the last before it.

    Args:
      found: of `kernels`.
      layers: all layers and stages, in the order of computation (`explain.layer_shapes`).
      layer: one of them.

    Returns:
      Its path, of those before the layer one whose window is more than a pixel if there is one; ""
      if there is none.

    Raises:
      UserError: an unknown layer.
    """
    if layer not in layers:
        raise unknown_name("stage or layer", layer, layers)
    if layer in found:
        return layer
    before = [name for name in list(layers)[: list(layers).index(layer)] if name in found]
    own = [name for name in before if name.startswith(f"{layer}/")] or before
    wide = [name for name in own if max(found[name].kernel.shape[:2]) > 1]
    return next(reversed(wide or own), "")
