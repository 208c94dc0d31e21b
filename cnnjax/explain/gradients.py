"""Maps from the gradient of a target with respect to the image.

Each function takes `channels`: "sum" adds the channels of a pixel, "max" takes the largest absolute
value (Simonyan et al. 2014, section 3.1), "keep" returns `[batch, height, width, channels]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import rng
from cnnjax.errors import UserError, unknown_name
from cnnjax.explain import rectifiers, taps
from cnnjax.explain.targets import Target

CHANNELS = ("sum", "max", "keep")
# Of a few images several passes are one; of more, larger batches were not faster (LeNet-5).
FEW, FULL = 4, 32


def gradient(
    model: nn.Module, variables: Any, image: jax.Array, target: Target, *, channels: str = "max"
) -> jax.Array:
    """How much the target changes with each pixel.

    Simonyan, Vedaldi and Zisserman 2014 (arXiv 1312.6034), section 3.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image: float `[batch, height, width, channels]`, as the model expects it.
      target: of the outputs; see `targets`.
      channels: see this module.

    Returns:
      `[batch, height, width]`.

    Raises:
      UserError: an image of another shape or dtype, an unknown `channels`, or the target refuses.
    """
    return reduced(_gradient(model, variables, target)(image), channels)


def gradient_times_input(
    model: nn.Module, variables: Any, image: jax.Array, target: Target, *, channels: str = "sum"
) -> jax.Array:
    """The gradient times the image: what each pixel adds to a linear model.

    Shrikumar et al. 2016 (arXiv 1605.01713), section 2. Arguments, result and errors as for
    `gradient`.
    """
    return reduced(image * _gradient(model, variables, target)(image), channels)


def smooth_grad(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    samples: int = 50,
    noise: float = 0.15,
    channels: str = "max",
) -> jax.Array:
    """The mean gradient over noisy copies of the image.

    Smilkov et al. 2017 (arXiv 1706.03825), section 3.

    Args:
      key: of the noise.
      model, variables, image, target, channels: as for `gradient`.
      samples: number of copies.
      noise: standard deviation, as a fraction of each image's range of values.

    Raises:
      UserError: as for `gradient`, or fewer than one sample.
    """
    _check_positive("samples", samples)
    axes = (1, 2, 3)
    spread = noise * (jnp.max(image, axes, keepdims=True) - jnp.min(image, axes, keepdims=True))
    of_image = _gradient(model, variables, target)

    def sample(key: jax.Array) -> jax.Array:
        return of_image(image + spread * rng.draw(jax.random.normal, key, image.shape, image.dtype))

    return reduced(_mean(sample, jax.random.split(key, samples), image), channels)


def integrated_gradients(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    baseline: jax.Array | float = 0.0,
    steps: int = 50,
    channels: str = "sum",
) -> jax.Array:
    """The gradient integrated along the line from a baseline, times the difference to it.

    Sundararajan, Taly and Yan 2017 (arXiv 1703.01365), section 3. The attributions of an image sum
    up to the difference of the target between image and baseline: see `checks.completeness`.

    Args:
      model, variables, image, target, channels: as for `gradient`.
      baseline: a number or an image that says nothing, in the units of `image`.
      steps: points of the Gauss-Legendre quadrature.

    Raises:
      UserError: as for `gradient`, or fewer than one step.
    """
    _check_positive("steps", steps)
    places, weights = np.polynomial.legendre.leggauss(steps)
    of_image = _gradient(model, variables, target)
    start = jnp.broadcast_to(jnp.asarray(baseline, image.dtype), image.shape)

    def point(place_and_weight: tuple[jax.Array, jax.Array]) -> jax.Array:
        place, weight = place_and_weight
        return weight * of_image(start + place * (image - start))

    points = (
        jnp.asarray((places + 1) / 2, image.dtype),
        jnp.asarray(weights * (steps / 2), image.dtype),
    )
    return reduced((image - start) * _mean(point, points, image), channels)


def expected_gradients(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    references: jax.Array,
    samples: int = 200,
    channels: str = "sum",
) -> jax.Array:
    """Integrated gradients averaged over baselines drawn from `references`: SHAP values.

    Erion et al. 2021 (arXiv 1906.10670), equation 3: one random baseline and one random place on
    the line to it for each sample.

    Args:
      key: of the draws.
      model, variables, image, target, channels: as for `gradient`.
      references: `[number, height, width, channels]`, such as training images.
      samples: number of draws.

    Raises:
      UserError: as for `gradient`, references of another shape, or fewer than one sample.
    """
    _check_positive("samples", samples)
    if references.shape[1:] != image.shape[1:] or not len(references):
        raise UserError(
            f"references are images of the same shape, not {tuple(references.shape)} for "
            f"{tuple(image.shape)}."
        )
    of_image = _gradient(model, variables, target)
    references = jnp.asarray(references, image.dtype)

    def sample(key: jax.Array) -> jax.Array:
        which, where = jax.random.split(key)
        start = references[jax.random.randint(which, image.shape[:1], 0, len(references))]
        place = jax.random.uniform(where, (len(image), 1, 1, 1), image.dtype)
        return (image - start) * of_image(start + place * (image - start))

    return reduced(_mean(sample, jax.random.split(key, samples), image), channels)


def guided_backpropagation(
    model: nn.Module, variables: Any, image: jax.Array, target: Target, *, channels: str = "max"
) -> jax.Array:
    """The gradient, of which each ReLU passes on the positive part only.

    Springenberg et al. 2015 (arXiv 1412.6806), section 3.4. Sharp pictures that say little about
    the network: they hardly change when its upper layers get random weights (Adebayo et al. 2018,
    arXiv 1810.03292, and `checks`). Arguments and result as for `gradient`.

    Raises:
      UserError: as for `gradient`, or the network has no ReLU.
    """
    taps.check_image(image)
    total = _total(model, variables, target)
    guided = jax.grad(rectifiers.with_rule(total, rectifiers.guided_relu))
    return reduced(guided(image), channels)


def _gradient(model: nn.Module, variables: Any, target: Target) -> Callable[..., jax.Array]:
    def of_image(image: jax.Array) -> jax.Array:
        taps.check_image(image)
        return jax.grad(_total(model, variables, target))(image)

    return of_image


def _total(model: nn.Module, variables: Any, target: Target) -> Callable[..., jax.Array]:
    """An image's score depends on no other image, so that the sum has the gradient of each."""
    return lambda image: jnp.sum(taps.score(model, variables, image, target))


def _mean(function: Callable[..., jax.Array], items: Any, image: jax.Array) -> jax.Array:
    """Returns the mean of `function` over the items, several at once where images are few."""
    count = len(jax.tree.leaves(items)[0])
    together = _together(count, len(image))
    groups = jax.tree.map(
        lambda leaf: leaf.reshape(count // together, together, *leaf.shape[1:]), items
    )

    def add(total: jax.Array, group: Any) -> tuple[jax.Array, None]:
        return total + jnp.sum(jax.vmap(function)(group), 0), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(image), groups)
    return total / count


def _together(count: int, images: int) -> int:
    """Returns how many of `count` passes are one: a divisor of it."""
    most = min(count, FULL // images) if images <= FEW else 1
    return max(each for each in range(1, most + 1) if count % each == 0)


def reduced(attributions: jax.Array, channels: str) -> jax.Array:
    """Returns `[batch, height, width]` of attributions of each channel: see this module."""
    if channels not in CHANNELS:
        raise unknown_name("channels", channels, CHANNELS)
    if channels == "sum":
        return jnp.sum(attributions, -1)
    return jnp.max(jnp.abs(attributions), -1) if channels == "max" else attributions


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}.")
