"""Weather of the corruptions: snow, frost, fog, spatter. See `augment.corruptions`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import rng
from cnnjax.augment.color import is_gray, luma
from cnnjax.augment.corruption_blurs import filtered, smeared, smoothed, zoomed

WATER = np.array([175, 238, 238]) / 255
MUD = np.array([63, 42, 20]) / 255
ICE = np.array([0.86, 0.94, 1.0])
# Of the distance to the edge of a drop, in pixels: what is farther in looks alike.
DEEPEST = 20
MEAN_OF_NINE = np.full((3, 3), 1 / 9)
# Light from above on the left, that of the drops.
EMBOSS = np.array([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])


def snow(
    key: jax.Array,
    image: jax.Array,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    smear: float,
    kept: float,
) -> jax.Array:
    """Whitens the image, and adds flakes: noise, enlarged, cut off and smeared downward."""
    of_flakes, of_angle = jax.random.split(key)
    flakes = mean + deviation * rng.draw(
        jax.random.normal, of_flakes, (*image.shape[:2], 1), image.dtype
    )
    flakes = zoomed(flakes, zoom)
    flakes = jnp.floor(255 * jnp.clip(jnp.where(flakes < threshold, 0, flakes), 0, 1)) / 255
    angle = jax.random.uniform(of_angle, minval=-3 * math.pi / 4, maxval=-math.pi / 4)
    flakes = smeared(flakes, radius, smear, angle)
    white = jnp.maximum(image, 1.5 * luma(image) + 0.5)
    return kept * image + (1 - kept) * white + flakes + flakes[::-1, ::-1]


def fog(key: jax.Array, image: jax.Array, amount: float, decay: float) -> jax.Array:
    """Adds clouds of a plasma fractal, and darkens so that the brightest pixel stays."""
    height, width, _ = image.shape
    clouds = plasma(key, max(height, width), decay)[:height, :width, None].astype(image.dtype)
    brightest = jnp.max(image)
    return (image + amount * clouds) * brightest / (brightest + amount)


def frost(key: jax.Array, image: jax.Array, kept: float, amount: float) -> jax.Array:
    """Adds a pane of frost. The authors take parts of six photographs; ours is drawn: `ice`."""
    height, width, _ = image.shape
    pane = ice(key, (height, width)).astype(image.dtype)
    return kept * image + amount * (luma(pane) if is_gray(image) else pane)


def ice(key: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns a picture of frost, `[height, width, 3]` in [0, 1]: bright needles on gray.

    The needles are where plasma fractals cross their middle. Mean and deviation are about 0.44 and
    0.16.
    """
    height, width = size
    keys, decays = jax.random.split(key, 3), jnp.array([1.6, 1.4, 1.9])
    fields = jax.vmap(plasma, (0, None, 0))(keys, max(size), decays)
    needles = 1.0 - jnp.abs(2.0 * fields[:2] - 1.0)
    pane = 0.12 + 0.45 * needles[0] ** 4 + 0.35 * needles[1] ** 6 + 0.3 * fields[2]
    return jnp.clip(pane, 0, 1)[:height, :width, None] * jnp.asarray(ICE, jnp.float32)


def plasma(key: jax.Array, size: int, decay: float | jax.Array) -> jax.Array:
    """Returns a plasma fractal `[side, side]` in [0, 1], side the power of two from `size` on.

    The diamond-square algorithm on a torus (Fournier, Fussell and Carpenter 1982, "Computer
    Rendering of Stochastic Models"). The noise of each finer grid is smaller by `decay` squared.
    """
    levels = max(1, (size - 1).bit_length())
    # Drawn at once: a program of many small draws takes long to compile.
    draws = jax.random.uniform(key, (4**levels - 1,), minval=-1.0)
    field = jnp.zeros((1, 1))
    amplitude: float | jax.Array = 100.0**2
    for level in range(levels):
        side = 2**level
        begin = side * side - 1
        noise = amplitude * draws[begin : 4 * begin + 3].reshape(3, side, side)
        below = field + jnp.roll(field, -1, 0)
        middle = (below + jnp.roll(below, -1, 1)) / 4 + noise[0]
        above = middle + jnp.roll(middle, 1, 0)
        right = (above + field + jnp.roll(field, -1, 1)) / 4 + noise[1]
        down = (middle + jnp.roll(middle, 1, 1) + below) / 4 + noise[2]
        rows = jnp.stack((jnp.stack((field, right), -1), jnp.stack((down, middle), -1)), 1)
        field, amplitude = rows.reshape(2 * side, 2 * side), amplitude / decay**2
    field = field - jnp.min(field)
    return field / jnp.max(field)


def spatter(
    key: jax.Array,
    image: jax.Array,
    mean: float,
    deviation: float,
    smoothing: float,
    threshold: float,
    strength: float,
    mud: int,
) -> jax.Array:
    """Splashes water (drops lit from one side) or mud on the image.

    The edges of drops, which the authors find by Canny's detector, are here the pixels of a drop
    that have a neighbor outside. On gray images the liquids have the gray of their colors.
    """
    noise = mean + deviation * rng.draw(jax.random.normal, key, (*image.shape[:2], 1), image.dtype)
    liquid = smoothed(noise, smoothing)
    wet = liquid >= threshold
    color = jnp.asarray(MUD if mud else WATER, image.dtype)[None, None]
    color = luma(color) if is_gray(image) else color
    if mud:
        cover = smoothed(wet.astype(image.dtype), strength)
        cover = jnp.where(cover < 0.8, 0, cover)
        return image * (1 - cover) + color * cover
    light = _light_on_drops(wet) * jnp.where(wet, liquid, 0)
    largest = jnp.max(light)
    return image + strength * color * light / jnp.where(largest > 0, largest, 1)


def _light_on_drops(wet: jax.Array) -> jax.Array:
    """Returns how bright each pixel `[height, width, 1]` is, of drops rising from their edges."""
    inside = -_largest_around(-wet.astype(jnp.float32))
    edge = wet & (inside == 0)
    depth = jnp.minimum(_distance(edge), DEEPEST)
    depth = _equalized(jnp.round(filtered(depth, MEAN_OF_NINE)))
    return filtered(jnp.clip(filtered(depth, EMBOSS), 0, 255), MEAN_OF_NINE)


def _largest_around(values: jax.Array) -> jax.Array:
    """The largest of each pixel and its four neighbors."""
    padded = jnp.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    inner = slice(1, -1)
    rows = jnp.maximum(padded[:-2, inner], padded[2:, inner])
    columns = jnp.maximum(padded[inner, :-2], padded[inner, 2:])
    return jnp.maximum(values, jnp.maximum(rows, columns))


def _distance(edge: jax.Array) -> jax.Array:
    """Returns each pixel's distance to the nearest edge, exact up to DEEPEST."""
    far = float(DEEPEST**2)
    squares = jnp.where(edge, 0.0, far)
    for axis in (0, 1):
        pad = [(DEEPEST, DEEPEST) if each == axis else (0, 0) for each in range(3)]
        padded = jnp.pad(squares, pad, constant_values=far)
        size = squares.shape[axis]
        squares = jnp.min(
            jnp.stack(
                [
                    jax.lax.slice_in_dim(padded, step, step + size, axis=axis)
                    + (step - DEEPEST) ** 2
                    for step in range(2 * DEEPEST + 1)
                ]
            ),
            0,
        )
    return jnp.sqrt(jnp.minimum(squares, far))


def _equalized(values: jax.Array) -> jax.Array:
    """Histogram equalization of whole numbers from 0 to 255, as OpenCV's."""
    flat = values.astype(jnp.int32).ravel()
    counts = jnp.zeros(256, jnp.int32).at[flat].add(1)
    below = jnp.cumsum(counts)
    first = below[jnp.min(flat)]
    rest = jnp.maximum(flat.size - first, 1)
    table = jnp.round(255.0 * jnp.maximum(below - first, 0) / rest)
    return table[flat].reshape(values.shape)
