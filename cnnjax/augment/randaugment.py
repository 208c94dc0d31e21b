"""Policies that draw transformations and their magnitudes: RandAugment, TrivialAugment, AugMix.

They share the transformations of AutoAugment (Cubuk et al. 2019a, arXiv 1805.09501, table 6):
rotate, shear and translate along x and y (one map, read once), brightness, color (saturation),
contrast, sharpness, posterize, solarize, autocontrast and equalize. Images are float in [0, 1] or
uint8, before normalization, and so are the results. All follow the contract of
`cnnjax.augment.change`; a magnitude of 0 switches a policy off, the two transformations without a
magnitude (autocontrast and equalize) included.

Under `vmap` every transformation is computed for every image and one is kept, so that a drawn
transformation costs what all cost. The maps among them move class maps and boxes too; AugMix, which
averages several, moves images only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.augment.change import (
    Augment,
    Geometric,
    Magnitude,
    Move,
    Size,
    chain,
    check_magnitude,
    size_of,
)
from cnnjax.augment.color import adjust_brightness, adjust_contrast, adjust_saturation
from cnnjax.augment.geometry import affine_move
from cnnjax.errors import UserError
from cnnjax.traced import is_traced

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (
    "identity",
    *GEOMETRIC,
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
# AugMix leaves out what resembles the corruptions that it is tested on (its section 3).
AUGMIX_OPERATIONS = (
    *GEOMETRIC,
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
LEVELS = 30
AUGMIX_LEVELS = 10


class Ranges(NamedTuple):
    """The largest magnitudes, at a strength of 1.

    Attributes:
      degrees: of rotation.
      shear: the tangent of the angle.
      translation: as a fraction of the image's width or height.
      translation_pixels: or in pixels, where it is not 0.
      enhancement: distance of the factors of brightness, color, contrast and sharpness from 1.
      lost_bits: of the 8 that posterize leaves at a strength of 0.
    """

    degrees: float
    shear: float
    translation: float
    translation_pixels: float
    enhancement: float
    lost_bits: int


# Cubuk et al.'s code, as in torchvision.transforms.RandAugment.
RAND_AUGMENT = Ranges(30.0, 0.3, 150 / 331, 0.0, 0.9, 4)
# Mueller and Hutter 2021, table 1, "wide".
WIDE = Ranges(135.0, 0.99, 0.0, 32.0, 0.99, 6)
# Hendrycks et al.'s code: translation by up to a third.
AUGMIX = Ranges(30.0, 0.3, 1 / 3, 0.0, 0.9, 4)


def rand_augment(num_operations: int = 2, magnitude: Magnitude = 9.0) -> Geometric:
    """Applies `num_operations` random transformations, one after another, all of one magnitude.

    Cubuk et al. 2019b (arXiv 1909.13719), section 3. Magnitudes are on the scale from 0 to 30, and
    mean what they mean in torchvision; directions are random.

    Args:
      num_operations: `N`; 2 for ResNet-50 on ImageNet.
      magnitude: `M`; 9 there.
    """
    check_magnitude(num_operations=num_operations)
    _check_level(magnitude=magnitude)

    def policy(key: jax.Array, image: jax.Array) -> jax.Array:
        for position in range(int(num_operations)):
            step_key = jax.random.fold_in(key, position)
            image = _random_operation(step_key, image, OPERATIONS, magnitude / LEVELS, RAND_AUGMENT)
        return image

    def moves(key: jax.Array, size: Size) -> list[Move]:
        keys = [jax.random.fold_in(key, position) for position in range(int(num_operations))]
        strength = magnitude / LEVELS
        return [_random_move(each, size, OPERATIONS, strength, RAND_AUGMENT) for each in keys]

    def draw(key: jax.Array, size: Size) -> Move:
        changed = functools.partial(_switched_off(magnitude, policy), key)
        return chain(changed, functools.partial(moves, key, size))

    return Geometric(draw)


def trivial_augment(max_magnitude: Magnitude = 30.0) -> Geometric:
    """Applies one random transformation of a random magnitude.

    Müller and Hutter 2021, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation"
    (arXiv 2103.10158), algorithm 1, with its wide ranges: the magnitude is uniform among 0, 1, ...,
    30, and the direction random.

    Args:
      max_magnitude: the end of that scale, 30 in the paper, which has nothing to tune.
    """
    _check_level(max_magnitude=max_magnitude)

    def drawn(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        level_key, key = jax.random.split(key)
        level = jax.random.randint(level_key, (), 0, LEVELS + 1) / LEVELS
        return key, level * max_magnitude / LEVELS

    def policy(key: jax.Array, image: jax.Array) -> jax.Array:
        key, strength = drawn(key)
        return _random_operation(key, image, OPERATIONS, strength, WIDE)

    def moves(key: jax.Array, size: Size) -> list[Move]:
        key, strength = drawn(key)
        return [_random_move(key, size, OPERATIONS, strength, WIDE)]

    def draw(key: jax.Array, size: Size) -> Move:
        changed = functools.partial(_switched_off(max_magnitude, policy), key)
        return chain(changed, functools.partial(moves, key, size))

    return Geometric(draw)


def augmix(severity: Magnitude = 3.0, width: int = 3, depth: int = 3) -> Geometric:
    """Averages the image with chains of random transformations.

    Hendrycks et al. 2020 (arXiv 1912.02781), algorithm 1: `m x + (1 - m) sum_i w_i chain_i(x)`, the
    weights `w` from Dirichlet(1, ..., 1), `m` from Beta(1, 1), chains of 1 to `depth` random
    transformations, each of a magnitude uniform between 0.1 and `severity`, on the scale from 0 to
    10 of its code. The paper's Jensen-Shannon loss is not part of it.

    Args:
      severity: 3 in the paper.
      width: the number of chains.
      depth: the greatest length of a chain.
    """
    _check_level(AUGMIX_LEVELS, severity=severity)
    if width < 1 or depth < 1:
        raise UserError(f"width={width}, depth={depth}: give 1 or more of each")

    def policy(key: jax.Array, image: jax.Array) -> jax.Array:
        weights_key, share_key, key = jax.random.split(key, 3)
        weights = jax.random.dirichlet(weights_key, jnp.ones(int(width)))
        mixed = jnp.zeros_like(image)
        for index in range(int(width)):
            length_key, chain_key = jax.random.split(jax.random.fold_in(key, index))
            length = jax.random.randint(length_key, (), 1, int(depth) + 1)
            chained = image
            for position in range(int(depth)):
                level_key, step_key = jax.random.split(jax.random.fold_in(chain_key, position))
                level = jax.random.uniform(level_key, minval=0.1, maxval=severity) / AUGMIX_LEVELS
                changed = _random_operation(step_key, chained, AUGMIX_OPERATIONS, level, AUGMIX)
                chained = jnp.where(position < length, changed, chained)
            mixed += weights[index] * chained
        share = jax.random.uniform(share_key)
        return share * image + (1.0 - share) * mixed

    def draw(key: jax.Array, size: Size) -> Move:
        return Move(functools.partial(_switched_off(severity, policy), key))

    return Geometric(draw, kinds=("image",))


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel to [0, 1]; a channel of one value is left as it is."""
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    spread = high - low
    return jnp.where(spread > 0, (image - low) / jnp.where(spread > 0, spread, 1.0), image)


def equalize(image: jax.Array) -> jax.Array:
    """Makes the histogram of each channel flat, in 256 steps, as Pillow's `ImageOps.equalize`."""
    pixels = jnp.round(255.0 * jnp.clip(image, 0.0, 1.0)).astype(jnp.int32)

    def channel(values: jax.Array) -> jax.Array:
        histogram = jnp.zeros(256, jnp.int32).at[values].add(1, mode="promise_in_bounds")
        cumulative = jnp.cumsum(histogram)
        last = histogram[values.max()]
        step = (values.size - last) // 255
        table = (cumulative - histogram + step // 2) // jnp.maximum(step, 1)
        table = jnp.where(step > 0, jnp.clip(table, 0, 255), jnp.arange(256))
        return table.at[values].get(mode="promise_in_bounds")

    flat = pixels.reshape(-1, image.shape[-1])
    equal = jax.vmap(channel, in_axes=1, out_axes=1)(flat).reshape(image.shape)
    return equal.astype(image.dtype) / 255.0


def sharpen(image: jax.Array, factor: Magnitude) -> jax.Array:
    """Scales the distance from the smoothed image: 0 is smooth, 1 the image; the border is kept.

    Pillow's `ImageEnhance.Sharpness`: 3x3 weights of 1, and 5 for the pixel itself, over 13.
    """
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return image
    around = sum(image[y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    inner = image[1:-1, 1:-1]
    change = (factor - 1.0) * (inner - (around + 4.0 * inner) / 13.0)
    return jnp.clip(image + jnp.pad(change, ((1, 1), (1, 1), (0, 0))), 0.0, 1.0)


def posterize(image: jax.Array, bits: Magnitude) -> jax.Array:
    """Keeps the highest `bits` of the 8 bits of each value."""
    size = jnp.exp2(8.0 - jnp.asarray(bits, image.dtype))
    # Values between those of 8 bits stay what they are where nothing is dropped.
    steps = jnp.floor(jnp.round(255.0 * image) / size) * size / 255.0
    return jnp.where(size <= 1.0, image, steps)


def solarize(image: jax.Array, threshold: Magnitude) -> jax.Array:
    """Inverts the values that are at least `threshold`."""
    return jnp.where(image >= threshold, 1.0 - image, image)


def _random_operation(
    key: jax.Array,
    image: jax.Array,
    operations: Sequence[str],
    strength: Magnitude,
    ranges: Ranges,
) -> jax.Array:
    """Applies one of the operations, each as likely, with `strength` from 0 to 1."""
    is_chosen, sign = _choose(key, operations)
    if "brightness" in operations:
        factor = 1.0 + sign * ranges.enhancement * strength
        enhanced = {
            "brightness": adjust_brightness(image, factor),
            "color": adjust_saturation(image, factor),
            "contrast": adjust_contrast(image, factor),
            "sharpness": sharpen(image, factor),
        }
    else:
        enhanced = {}
    results = {
        **enhanced,
        "posterize": posterize(image, 8.0 - jnp.round(ranges.lost_bits * strength)),
        # Beyond white, so that nothing is inverted at a strength of 0.
        "solarize": solarize(image, 256.0 / 255.0 * (1.0 - strength)),
        "autocontrast": autocontrast(image),
        "equalize": equalize(image),
    }
    geometric = jnp.any(jnp.stack([is_chosen(name) for name in GEOMETRIC]))
    changed = _operation_move(is_chosen, size_of(image), sign * strength, ranges).image(image)
    return jnp.select(
        [geometric, *(is_chosen(name) for name in results)], [changed, *results.values()], image
    )


def _random_move(
    key: jax.Array, size: Size, operations: Sequence[str], strength: Magnitude, ranges: Ranges
) -> Move:
    """Returns the move of what `_random_operation` draws: none where it changes colors."""
    is_chosen, sign = _choose(key, operations)
    return _operation_move(is_chosen, size, sign * strength, ranges)


def _choose(
    key: jax.Array, operations: Sequence[str]
) -> tuple[Callable[[str], jax.Array], jax.Array]:
    """Draws one of the operations, each as likely, and a sign.

    Returns:
      `name -> bool`, whether it is the one, and 1 or -1.
    """
    choice_key, sign_key = jax.random.split(key)
    chosen = jax.random.randint(choice_key, (), 0, len(operations))
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    return lambda name: chosen == operations.index(name), sign


def _operation_move(
    is_chosen: Callable[[str], jax.Array], size: Size, strength: Magnitude, ranges: Ranges
) -> Move:
    """Turns, leans or moves what is there; black comes in from outside, as in Pillow."""
    height, width = size
    chosen = {name: is_chosen(name) for name in GEOMETRIC}

    def amount(name: str, largest: float) -> jax.Array:
        return jnp.where(chosen[name], strength * largest, 0.0)

    angle = amount("rotate", np.radians(ranges.degrees))
    shear_x, shear_y = amount("shear_x", ranges.shear), amount("shear_y", ranges.shear)
    move = jnp.stack(
        [
            amount("translate_x", ranges.translation_pixels or ranges.translation * width),
            amount("translate_y", ranges.translation_pixels or ranges.translation * height),
        ]
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    inverse = jnp.array([[cos, shear_y - sin], [shear_x + sin, cos]])
    return affine_move(size, inverse, move, fill=0.0)


def _switched_off(magnitude: Magnitude, policy: Augment) -> Augment:
    """The policy, or the identity where the magnitude is 0, traced or not."""

    def switched(key: jax.Array, image: jax.Array) -> jax.Array:
        return jnp.where(jnp.asarray(magnitude) == 0, image, policy(key, image))

    return switched


def _check_level(largest: float = LEVELS, **magnitudes: Magnitude) -> None:
    check_magnitude(**magnitudes)
    for name, value in magnitudes.items():
        if not is_traced(value) and value > largest:
            raise UserError(f"{name}={value}: the scale ends at {largest}")
