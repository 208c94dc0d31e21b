"""Class activation maps: where the last convolutions see what speaks for a target.

`layer` is a stage or layer whose output is an image, by default the last. `resize=False` returns
the map in that layer's own size; otherwise it is resized bilinearly to the image's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.errors import UserError
from cnnjax.explain import taps
from cnnjax.explain.targets import Target


def grad_cam(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    layer: str = "",
    relu: bool = True,
    resize: bool = True,
) -> jax.Array:
    """The activations, each channel weighted by the mean of its gradient.

    Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image: float `[batch, height, width, channels]`, as the model expects it.
      target: of the outputs; see `targets`.
      layer, resize: see this module.
      relu: whether what speaks against the target is cut off.

    Returns:
      `[batch, height, width]`.

    Raises:
      UserError: an unknown layer, or one whose output is no image; or the target refuses.
    """
    activations, gradients = _of_layer(model, variables, image, target, layer)
    weights = jnp.mean(gradients, (1, 2), keepdims=True)
    return _finished(jnp.sum(weights * activations, -1), image, relu, resize)


def grad_cam_plus_plus(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    layer: str = "",
    resize: bool = True,
) -> jax.Array:
    """Grad-CAM that counts every place of an object that occurs several times.

    Chattopadhyay et al. 2018 (arXiv 1710.11063), equations 5, 10 and 19, for the exponential of
    the target. Arguments, result and errors as for `grad_cam`.
    """
    activations, gradients = _of_layer(model, variables, image, target, layer)
    squares, cubes = jnp.square(gradients), gradients**3
    total = jnp.sum(activations, (1, 2), keepdims=True)
    below = 2 * squares + total * cubes
    shares = jnp.where(below == 0, 0, squares / jnp.where(below == 0, 1, below))
    weights = jnp.sum(shares * jnp.maximum(gradients, 0), (1, 2), keepdims=True)
    return _finished(jnp.sum(weights * activations, -1), image, True, resize)


def layer_cam(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    layer: str = "",
    resize: bool = True,
) -> jax.Array:
    """The activations, each pixel weighted by its own positive gradient.

    Jiang et al. 2021, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
    equations 4 to 6: it serves lower layers too. Arguments, result and errors as for `grad_cam`.
    """
    activations, gradients = _of_layer(model, variables, image, target, layer)
    map_ = jnp.sum(jnp.maximum(gradients, 0) * activations, -1)
    return _finished(map_, image, True, resize)


def score_cam(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    layer: str = "",
    baseline: float = 0.0,
    resize: bool = True,
) -> jax.Array:
    """The activations, each channel weighted by the target of the image seen through it.

    Wang et al. 2020 (arXiv 1910.01279), section 3.2 and algorithm 1: no gradients; one forward pass
    for each channel. Arguments, result and errors as for `grad_cam`.

    Args:
      baseline: value of a pixel that is not seen.
    """
    layer = layer or taps.maps(model, variables, image)[-1]
    _, found = taps.tap(model, variables, image, [layer])
    activations = _checked(found[layer], layer)
    masks = jnp.moveaxis(_resized(activations, image), -1, 0)[..., None]
    low, high = (f(masks, (2, 3, 4), keepdims=True) for f in (jnp.min, jnp.max))
    masks = jnp.where(high > low, (masks - low) / jnp.where(high > low, high - low, 1), 0)

    def through(mask: jax.Array) -> jax.Array:
        seen = baseline + mask * (image - baseline)
        return taps.score(model, variables, seen, target)

    weights = jax.nn.softmax(jax.lax.map(through, masks), 0)
    map_ = jnp.einsum("bhwk,kb->bhw", activations, weights)
    return _finished(map_, image, True, resize)


def _of_layer(
    model: nn.Module, variables: Any, image: jax.Array, target: Target, layer: str
) -> tuple[jax.Array, jax.Array]:
    taps.check_image(image)
    layer = layer or taps.maps(model, variables, image)[-1]
    activations, gradients = taps.activations_and_gradients(
        model, variables, image, target, [layer]
    )
    return _checked(activations[layer], layer), gradients[layer]


def _checked(activations: jax.Array, layer: str) -> jax.Array:
    if activations.ndim != 4:
        raise UserError(
            f"the output of {layer} is no image but of shape {tuple(activations.shape)}: choose a "
            "layer before the features are pooled or flattened."
        )
    return activations


def _finished(map_: jax.Array, image: jax.Array, relu: bool, resize: bool) -> jax.Array:
    map_ = jnp.maximum(map_, 0) if relu else map_
    return _resized(map_[..., None], image)[..., 0] if resize else map_


def _resized(maps: jax.Array, image: jax.Array) -> jax.Array:
    shape = (maps.shape[0], *image.shape[1:3], maps.shape[-1])
    return jax.image.resize(maps, shape, "bilinear", antialias=False)
