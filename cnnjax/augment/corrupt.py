"""Random damage to single images in [0, 1]: noise, blur, erased parts.

All follow the contract of `cnnjax.augment.change`. Images are float in [0, 1] or uint8, before
normalization, and so are the results.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import rng
from cnnjax.augment.change import (
    Augment,
    Magnitude,
    check_magnitude,
    check_probability,
    on_floats,
)
from cnnjax.augment.filters import check_window, gaussian_filter, median_filter
from cnnjax.errors import UserError


def random_noise(deviation: Magnitude) -> Augment:
    """Adds independent normal noise to each channel of each pixel (white is 1), and clips."""
    check_magnitude(deviation=deviation)

    @on_floats
    def noise(key: jax.Array, image: jax.Array) -> jax.Array:
        draws = rng.draw(jax.random.normal, key, image.shape, image.dtype)
        return jnp.clip(image + deviation * draws, 0.0, 1.0)

    return noise


def salt_and_pepper(probability: Magnitude) -> Augment:
    """Makes each pixel, with all its channels, white or black with `probability`, as often each."""
    check_probability(probability=probability)

    @on_floats
    def speckle(key: jax.Array, image: jax.Array) -> jax.Array:
        draws = rng.draw(jax.random.uniform, key, (*image.shape[:2], 1))
        white = (draws < probability / 2).astype(image.dtype)
        return jnp.where(draws < probability, white, image)

    return speckle


def random_blur(max_deviation: Magnitude) -> Augment:
    """Smooths by a Gaussian whose deviation is uniform in [0, max_deviation] pixels."""
    check_magnitude(max_deviation=max_deviation)

    @on_floats
    def blur(key: jax.Array, image: jax.Array) -> jax.Array:
        return gaussian_filter(image, max_deviation * jax.random.uniform(key))

    return blur


def random_median(probability: Magnitude, size: int = 3) -> Augment:
    """Applies the median filter of `size` x `size` pixels with the given probability."""
    check_window(size)
    check_probability(probability=probability)

    def median(key: jax.Array, image: jax.Array) -> jax.Array:
        chosen = jax.random.bernoulli(key, probability)
        return jnp.where(chosen, median_filter(image, size), image)

    return median


def random_erase(
    probability: Magnitude,
    largest_area: float = 0.4,
    smallest_area: float = 0.02,
    aspect: float = 1 / 0.3,
) -> Augment:
    """Fills a random rectangle with noise, uniform in [0, 1], with the given probability.

    Zhong et al. 2020, "Random Erasing Data Augmentation" (arXiv 1708.04896), algorithm 1, its
    "RE-R" with the areas and aspects of section 5.1 (there height / width is uniform in
    [0.3, 1 / 0.3]; here its logarithm is). A rectangle longer than the image is cut to it.

    Args:
      probability: of erasing anything; the paper uses 0.5.
      largest_area, smallest_area: bounds of the rectangle's fraction of the image.
      aspect: height / width is between `1 / aspect` and `aspect`.
    """
    check_probability(probability=probability)
    if not 0.0 <= smallest_area <= largest_area <= 1.0:
        raise UserError(
            f"smallest_area={smallest_area}, largest_area={largest_area}: give "
            "0 <= smallest_area <= largest_area <= 1"
        )
    if not aspect >= 1.0:
        raise UserError(f"aspect={aspect}: give a ratio of 1 or more")

    @on_floats
    def erase(key: jax.Array, image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        where, noise = jax.random.split(key)
        draws = jax.random.uniform(where, (5,))
        area = height * width * (smallest_area + (largest_area - smallest_area) * draws[0])
        stretch = jnp.exp((2.0 * draws[1] - 1.0) * np.log(aspect) / 2.0)
        high = jnp.minimum(jnp.round(jnp.sqrt(area) * stretch), height)
        wide = jnp.minimum(jnp.round(jnp.sqrt(area) / stretch), width)
        top = jnp.floor(draws[2] * (height - high + 1))
        left = jnp.floor(draws[3] * (width - wide + 1))
        inside = box(height, width, top, left, top + high, left + wide)
        pixels = rng.draw(jax.random.uniform, noise, image.shape, image.dtype)
        return jnp.where(inside & (draws[4] < probability), pixels, image)

    return erase


def cutout(size: int, fill: float | None = None) -> Augment:
    """Covers a square of `size` pixels around a random pixel; part of it may lie outside.

    DeVries and Taylor 2017 (arXiv 1708.04552), section 3: 16 pixels for CIFAR-10, 8 for CIFAR-100.

    Args:
      size: the side of the square.
      fill: the value of the square; None is the image's mean color (the paper's is the mean color
        of the data set).
    """
    check_magnitude(size=size)
    if int(size) != size:
        raise UserError(f"size={size}: give a whole number of pixels")

    @on_floats
    def cut(key: jax.Array, image: jax.Array) -> jax.Array:
        height, width, _ = image.shape
        center = jax.random.randint(key, (2,), 0, np.array([height, width]))
        top, left = center[0] - size // 2, center[1] - size // 2
        value = jnp.mean(image, axis=(0, 1)) if fill is None else fill
        inside = box(height, width, top, left, top + size, left + size)
        return jnp.where(inside, value, image)

    return cut


def box(
    height: int, width: int, top: Magnitude, left: Magnitude, bottom: Magnitude, right: Magnitude
) -> jax.Array:
    """Returns bool `[height, width, 1]`: whether a pixel is within the box, which excludes `bottom`
    and `right`."""
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[None, :, None]
    beyond = (rows < top) | (rows >= bottom) | (columns < left) | (columns >= right)
    return jnp.logical_not(beyond)
