"""The 19 corruptions of ImageNet-C and CIFAR-10-C, at five severities.

Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (arXiv 1903.12261), section 4.1: fifteen that count, and four for tuning. The numbers
are those of the authors' programs `make_imagenet_c.py` and `make_cifar_c.py`: images whose shorter
side has at most 64 pixels get those of CIFAR-10-C, larger ones those of ImageNet-C. Lengths are in
pixels there, of images of 32 and of 224 pixels; only the elastic transform scales with the image.

Each is a pure function `(key, image) -> image` with the contract of `augment.change`, fit for `jit`
and `vmap`, of gray and color images. The authors store ImageNet-C as JPEG, whose losses are added
there. What else differs: frost is drawn instead of photographed (`corruption_weather.ice`), and the
edges of drops of water are found otherwise (`corruption_weather.spatter`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import rng
from cnnjax.augment import corruption_blurs as blurs
from cnnjax.augment import corruption_weather as weather
from cnnjax.augment.change import Augment, on_floats
from cnnjax.augment.color import is_gray, luma
from cnnjax.augment.corruption_blurs import PRECISION
from cnnjax.augment.jpeg import jpeg_compression
from cnnjax.augment.sampling import sample_bilinear
from cnnjax.errors import UserError, unknown_name

SEVERITIES = (1, 2, 3, 4, 5)
# Of the shorter side, in pixels.
LARGEST_SMALL = 64


def gaussian_noise(key: jax.Array, image: jax.Array, deviation: float) -> jax.Array:
    """Adds normal noise to each value."""
    return image + deviation * rng.draw(jax.random.normal, key, image.shape, image.dtype)


def shot_noise(key: jax.Array, image: jax.Array, photons: float) -> jax.Array:
    """Counts photons: Poisson, of which white has `photons` on average."""
    return jax.random.poisson(key, photons * image, image.shape).astype(image.dtype) / photons


def impulse_noise(key: jax.Array, image: jax.Array, fraction: float) -> jax.Array:
    """Makes a fraction of all values 0 or 1, as often each."""
    draws = rng.draw(jax.random.uniform, key, image.shape)
    extreme = (draws < fraction / 2).astype(image.dtype)
    return jnp.where(draws < fraction, extreme, image)


def speckle_noise(key: jax.Array, image: jax.Array, deviation: float) -> jax.Array:
    """Adds normal noise that is proportional to the value."""
    return image + deviation * image * rng.draw(jax.random.normal, key, image.shape, image.dtype)


def brightness(key: jax.Array, image: jax.Array, amount: float) -> jax.Array:
    """Adds to the value of hue, saturation and value. Nothing is random."""
    del key
    value = jnp.max(image, -1, keepdims=True)
    brighter = jnp.clip(value + amount, 0, 1)
    # Hue and saturation stay where all channels grow by one factor; black becomes gray.
    return jnp.where(value > 0, image * brighter / jnp.where(value > 0, value, 1), brighter)


def saturate(key: jax.Array, image: jax.Array, factor: float, amount: float) -> jax.Array:
    """Changes the saturation of hue, saturation and value. Nothing is random.

    A gray pixel has the hue red, as it has for the authors; a gray image gets the luma of it.
    """
    del key
    value, lowest = jnp.max(image, -1, keepdims=True), jnp.min(image, -1, keepdims=True)
    chroma = value - lowest
    saturation = chroma / jnp.where(value > 0, value, 1)
    changed = jnp.clip(saturation * factor + amount, 0, 1)
    red = np.array([0.0, 1, 1], np.float32)
    away = jnp.where(chroma > 0, (value - image) / jnp.where(chroma > 0, chroma, 1), red)
    result = value * (1 - changed * away)
    return luma(result) if is_gray(image) else result


def contrast(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Scales each channel's distance from its mean. Nothing is random."""
    del key
    mean = jnp.mean(image, (0, 1), keepdims=True)
    return mean + factor * (image - mean)


def pixelate(key: jax.Array, image: jax.Array, factor: float) -> jax.Array:
    """Shrinks to a fraction of the size and enlarges again, by boxes. Nothing is random."""
    del key
    small = [max(1, int(size * factor)) for size in image.shape[:2]]
    for target in (small, image.shape[:2]):
        rows, columns = (
            box_matrix(old, new) for old, new in zip(image.shape, target, strict=False)
        )
        image = jnp.einsum("yi,xj,ijc->yxc", rows, columns, image, precision=PRECISION)
    return image


def box_matrix(size: int, target: int) -> np.ndarray:
    """Returns the matrix `[target, size]` that resizes a row as Pillow's box filter does."""
    scale = size / target
    support = max(scale, 1.0) / 2
    center = (np.arange(target)[:, None] + 0.5) * scale
    places = np.arange(size)
    low, high = np.floor(center - support + 0.5), np.floor(center + support + 0.5)
    offset = (places - center + 0.5) / max(scale, 1.0)
    weights = (low <= places) & (places < high) & (offset > -0.5) & (offset <= 0.5)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def elastic_transform(
    key: jax.Array, image: jax.Array, strength: float, smoothing: float, corner: float
) -> jax.Array:
    """Moves three points at random with the plane, and then each pixel by a smooth random field.

    Args:
      strength, smoothing, corner: factor and deviation of the field, and largest move of a point
        along each axis, as fractions of the shorter side.
    """
    height, width, _ = image.shape
    side = min(height, width)
    of_points, of_field = jax.random.split(key)
    center, arm = np.array([height // 2, width // 2]), side // 3
    points = np.array([center + arm, [center[0] + arm, center[1] - arm], center - arm], float)
    moves = jax.random.uniform(of_points, (3, 2), image.dtype, -corner * side, corner * side)
    plane = np.linalg.inv(np.concatenate([points, np.ones((3, 1))], 1)).astype(np.float32)
    # Rows: of x, of y and the constant; columns: x and y.
    matrix = jnp.matmul(plane, points.astype(np.float32) + moves, precision=PRECISION)
    (a, b), (c, d) = matrix[0], matrix[1]
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    x, y = jnp.meshgrid(jnp.arange(width, dtype=jnp.float32), jnp.arange(height, dtype=jnp.float32))
    x_before, y_before = x - matrix[2, 0], y - matrix[2, 1]
    moved = sample_bilinear(
        image,
        _mirrored(inverse[0, 1] * x_before + inverse[1, 1] * y_before, height - 1),
        _mirrored(inverse[0, 0] * x_before + inverse[1, 0] * y_before, width - 1),
    )
    field = rng.draw(jax.random.uniform, of_field, (height, width, 2), image.dtype, -1.0, 1.0)
    field = blurs.smoothed(field, smoothing * side, border="symmetric", truncate=3.0)
    shift = strength * side * field
    rows = _mirrored(y + shift[..., 0] + 0.5, height) - 0.5
    columns = _mirrored(x + shift[..., 1] + 0.5, width) - 0.5
    return sample_bilinear(moved, rows, columns)


def _mirrored(places: jax.Array, length: float) -> jax.Array:
    """Folds places into [0, length]."""
    folded = jnp.mod(places, 2 * length)
    return jnp.minimum(folded, 2 * length - folded)


FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": blurs.defocus_blur,
    "glass_blur": blurs.glass_blur,
    "motion_blur": blurs.motion_blur,
    "zoom_blur": blurs.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
    "speckle_noise": speckle_noise,
    "gaussian_blur": blurs.gaussian_blur,
    "spatter": weather.spatter,
    "saturate": saturate,
}
NAMES = tuple(FUNCTIONS)
# Those that the mean corruption error counts; the others are for tuning.
COUNTED, EXTRA = NAMES[:15], NAMES[15:]
# The arguments of each at the severities 1 to 5. make_imagenet_c.py:
LARGE: dict[str, tuple[tuple[Any, ...], ...]] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    # In pixels there, of 244 (which the authors meant to be 224).
    "elastic_transform": tuple(
        tuple(244 / 224 * number for number in numbers)
        for numbers in (
            (2, 0.7, 0.1),
            (2, 0.08, 0.2),
            (0.05, 0.01, 0.02),
            (0.07, 0.01, 0.02),
            (0.12, 0.01, 0.02),
        )
    ),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "jpeg_compression": ((25,), (18,), (15,), (10,), (7,)),
    "speckle_noise": ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,)),
    "gaussian_blur": ((1,), (2,), (3,), (4,), (6,)),
    "spatter": (
        (0.65, 0.3, 4, 0.69, 0.6, 0),
        (0.65, 0.3, 3, 0.68, 0.6, 0),
        (0.65, 0.3, 2, 0.68, 0.5, 0),
        (0.65, 0.3, 1, 0.65, 1.5, 1),
        (0.67, 0.4, 1, 0.65, 1.5, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
}
# make_cifar_c.py:
SMALL: dict[str, tuple[tuple[Any, ...], ...]] = {
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "elastic_transform": (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "jpeg_compression": ((80,), (65,), (58,), (50,), (40,)),
    "speckle_noise": ((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)),
    "gaussian_blur": ((0.4,), (0.6,), (0.7,), (0.8,), (1,)),
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}


def corruption(name: str, severity: int = 3) -> Augment:
    """Damages an image as one of the 19 corruptions of ImageNet-C does.

    Args:
      name: of `NAMES`.
      severity: from 1 to 5.

    Returns:
      `(key, image) -> image` for `[height, width, 1 or 3]`, float in [0, 1] or uint8.

    Raises:
      UserError: an unknown name, or a severity outside of 1 to 5; when it is called, an image of
        another number of channels.
    """
    if name not in FUNCTIONS:
        raise unknown_name("corruption", name, NAMES)
    if severity not in SEVERITIES:
        raise UserError(f"severity={severity}: give a whole number from 1 to 5")

    @on_floats
    def corrupt(key: jax.Array, image: jax.Array) -> jax.Array:
        is_gray(image)
        small = min(image.shape[:2]) <= LARGEST_SMALL
        numbers = (SMALL if small else LARGE)[name][int(severity) - 1]
        changed = FUNCTIONS[name](key, image, *numbers)
        return jnp.clip(changed, 0.0, 1.0).astype(image.dtype)

    return corrupt
