"""Random changes of the brightness and color of single images in [0, 1].

The `adjust_*` functions change a float image by a given amount; the factories draw the amount and
follow the contract of `cnnjax.augment.change`. Images are in [0, 1] (uint8 too in the factories),
before normalization, and so are the results: they are clipped. Definitions are those of Pillow's
`ImageEnhance` and torchvision's `ColorJitter`. Images of one channel are gray: saturation and hue
leave them as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.augment.change import Augment, Magnitude, check_magnitude, on_floats
from cnnjax.errors import UserError

# The luma of ITU-R BT.601, as Pillow turns colors into gray.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def adjust_brightness(image: jax.Array, factor: Magnitude) -> jax.Array:
    """`factor * image`: 0 is black, 1 the image."""
    return _clipped(image + (factor - 1.0) * image)


def adjust_contrast(image: jax.Array, factor: Magnitude) -> jax.Array:
    """Scales the distance from the mean gray of the image: 0 is that gray, 1 the image."""
    return _clipped(image + (factor - 1.0) * (image - jnp.mean(luma(image))))


def adjust_saturation(image: jax.Array, factor: Magnitude) -> jax.Array:
    """Scales the distance of each pixel from its own gray: 0 is a gray image, 1 the image."""
    if is_gray(image):
        return image
    return _clipped(image + (factor - 1.0) * (image - luma(image)))


def adjust_hue(image: jax.Array, turns: Magnitude) -> jax.Array:
    """Rotates the hue of the hexcone model: 1/3 of a turn makes red green, 1 is the image."""
    if is_gray(image):
        return image
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.max(image, axis=-1)
    chroma = value - jnp.min(image, axis=-1)
    nonzero = jnp.where(chroma > 0, chroma, 1.0)
    sixths = jnp.where(
        value == red,
        (green - blue) / nonzero,
        jnp.where(value == green, (blue - red) / nonzero + 2.0, (red - green) / nonzero + 4.0),
    )
    # Smith 1978, "Color Gamut Transform Pairs": of each channel the distance from its sixth.
    place = jnp.mod(np.array([5.0, 3.0, 1.0]) + (sixths + 6.0 * turns)[..., None], 6.0)
    depth = jnp.clip(jnp.minimum(place, 4.0 - place), 0.0, 1.0)
    return _clipped(value[..., None] - chroma[..., None] * depth)


def random_brightness(strength: Magnitude) -> Augment:
    """Multiplies the image by a factor, uniform in [1 - strength, 1 + strength], at least 0."""
    return _jitter(adjust_brightness, strength)


def random_contrast(strength: Magnitude) -> Augment:
    """`adjust_contrast` by a factor, uniform in [1 - strength, 1 + strength], at least 0."""
    return _jitter(adjust_contrast, strength)


def random_saturation(strength: Magnitude) -> Augment:
    """`adjust_saturation` by a factor, uniform in [1 - strength, 1 + strength], at least 0."""
    return _jitter(adjust_saturation, strength)


def random_hue(max_turns: Magnitude) -> Augment:
    """`adjust_hue` by turns uniform in [-max_turns, max_turns]; 0.5 is any hue."""
    check_magnitude(max_turns=max_turns)

    @on_floats
    def hue(key: jax.Array, image: jax.Array) -> jax.Array:
        return adjust_hue(image, max_turns * jax.random.uniform(key, minval=-1.0))

    return hue


def luma(image: jax.Array) -> jax.Array:
    """The gray of each pixel: `[height, width, channels] -> [height, width, 1]`."""
    if is_gray(image):
        return image
    return jnp.sum(image * LUMA.astype(image.dtype), axis=-1, keepdims=True)


def is_gray(image: jax.Array) -> bool:
    """Whether an image has one channel; a UserError if it has neither one nor three."""
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise UserError(
            f"an image of {channels} channels has no colors to change: give 1 (gray) or 3 (red, "
            "green, blue)"
        )
    return channels == 1


def _jitter(adjust, strength: Magnitude) -> Augment:
    check_magnitude(strength=strength)

    @on_floats
    def jitter(key: jax.Array, image: jax.Array) -> jax.Array:
        factor = 1.0 + strength * jax.random.uniform(key, minval=-1.0)
        return adjust(image, jnp.maximum(factor, 0.0))

    return jitter


def _clipped(image: jax.Array) -> jax.Array:
    return jnp.clip(image, 0.0, 1.0)
