"""Changes that move pixels, and class maps and boxes with them, by one draw.

Each factory returns a `Geometric` change, see `cnnjax.augment.change`: as a function, it changes
one image; `cnnjax.augment.make_augment` applies its draw to all keys of a batch that show a place.

Moving pixels suits images of any range. What lies outside repeats the border, or, where `fill` is
given, is that value (in the units of float images). Class maps are read at the nearest pixel, and
what lies outside has no class, whatever the image shows there. Boxes become the hull of their moved
corners, cut at the border.

On one CPU core a batch of 64 images of 28x28 takes `random_affine` 0.25 ms (up to 0.9 ms within a
scan) and `random_shift` 0.05 ms.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import rng
from cnnjax.augment.change import (
    Geometric,
    Magnitude,
    Move,
    Size,
    check_magnitude,
    check_probability,
)
from cnnjax.augment.filters import gaussian_matrix
from cnnjax.augment.sampling import (
    Fill,
    clipped_boxes,
    is_box,
    padded,
    places,
    sample_bilinear,
    sample_nearest,
    sampled_boxes,
    warp,
    warp_boxes,
)
from cnnjax.errors import UserError
from cnnjax.traced import is_traced


def affine_move(
    size: Size, inverse: jax.Array, translation: jax.Array, *, fill: float | None = None
) -> Move:
    """Returns the move of each point by a linear map about the center, and then by `translation`.

    Args:
      size: height and width.
      inverse: `[2, 2]`: the row (x, y) of a point of the result, from the center, times this is
        where the point is read.
      translation: (x, y), in pixels.
      fill: the value outside the image; None repeats the border.
    """

    def class_map(classes: jax.Array, padding: float) -> jax.Array:
        return sample_nearest(classes, *places(size, inverse, translation), padding)

    return Move(
        image=lambda image: warp(image, inverse, translation, fill=fill),
        class_map=class_map,
        boxes=lambda boxes: warp_boxes(boxes, size, inverse, translation),
    )


def sampled_move(y: jax.Array, x: jax.Array, *, fill: float | None = None) -> Move:
    """Returns the move by which each pixel is read from row `y` and column `x`.

    `y` and `x` are float `[height, width]`. Boxes become the hull of the pixels that are read from
    within them, see `sampled_boxes`. `fill` is the value outside; None repeats the border.
    """
    return Move(
        image=lambda image: sample_bilinear(image, y, x, fill=fill),
        class_map=lambda classes, padding: sample_nearest(classes, y, x, padding),
        boxes=lambda boxes: sampled_boxes(boxes, y, x),
    )


def random_flip(probability: float = 0.5) -> Geometric:
    """Mirrors left and right with the given probability."""
    check_probability(probability=probability)

    def draw(key: jax.Array, size: Size) -> Move:
        chosen = jax.random.bernoulli(key, probability)

        def boxes(boxes: jax.Array) -> jax.Array:
            top, left, bottom, right = jnp.split(boxes, 4, axis=-1)
            mirrored = jnp.concatenate([top, size[1] - right, bottom, size[1] - left], axis=-1)
            return clipped_boxes(jnp.where(chosen, mirrored, boxes), size)

        return Move(
            image=lambda image: jnp.where(chosen, image[:, ::-1], image),
            class_map=lambda classes, padding: jnp.where(chosen, classes[:, ::-1], classes),
            boxes=boxes,
        )

    return Geometric(draw)


def random_shift(max_pixels: int, *, fill: Fill = None) -> Geometric:
    """Moves the image by whole pixels, uniform in [-max_pixels, max_pixels] along each axis."""
    check_magnitude(max_pixels=max_pixels)
    if int(max_pixels) != max_pixels:
        raise UserError(f"max_pixels={max_pixels}: give a whole number of pixels")
    pad = int(max_pixels)

    def draw(key: jax.Array, size: Size) -> Move:
        if pad > 64 * max(size):  # An image so padded would not fit into memory.
            raise UserError(
                f"max_pixels={pad} is far more than the image has, {size[0]}x{size[1]}: give less"
            )
        corner = jax.random.randint(key, (2,), 0, 2 * pad + 1)

        def cut(image: jax.Array, fill: Fill) -> jax.Array:
            wider = padded(image, pad, fill)
            return jax.lax.dynamic_slice(wider, (corner[0], corner[1], 0), image.shape)

        def boxes(boxes: jax.Array) -> jax.Array:
            moved = boxes + jnp.tile(pad - corner, 2).astype(boxes.dtype)
            return clipped_boxes(jnp.where(is_box(boxes), moved, 0.0), size)

        return Move(
            image=lambda image: cut(image, fill),
            class_map=lambda classes, padding: cut(classes[..., None], padding)[..., 0],
            boxes=boxes,
        )

    return Geometric(draw)


def pad_and_crop(pixels: int, fill: Fill = 0.0) -> Geometric:
    """Pads each side and cuts the old size out at random (He et al. 2016, section 4.2: 4 pixels).

    The padding is 0, which is black; the paper's is the mean color. `"reflect"` mirrors the image.
    """
    return random_shift(pixels, fill=fill)


def random_affine(
    rotation_degrees: Magnitude = 0.0,
    scale: tuple[Magnitude, Magnitude] = (1.0, 1.0),
    translation_pixels: Magnitude = 0.0,
    shear_degrees: Magnitude = 0.0,
    *,
    fill: float | None = None,
) -> Geometric:
    """Turns, scales, shears and moves the image about its center, with bilinear interpolation.

    A point at `p` from the center goes to `scale R(rotation) [[1, tan(shear)], [0, 1]] p +
    translation`, in (x, y). All four are one map, interpolated once (Simard et al. 2003, "Best
    Practices for Convolutional Neural Networks Applied to Visual Document Analysis", section 2).

    Args:
      rotation_degrees: the angle is uniform within plus and minus this.
      scale: the factor is log-uniform between these, so that growing and shrinking are as likely.
      translation_pixels: each axis moves uniformly within plus and minus this.
      shear_degrees: the angle by which vertical lines lean is uniform within plus and minus this.
      fill: the value outside the image; None repeats the border.

    Raises:
      UserError: for negative magnitudes, a scale that is not positive, a shear of 90 or more.
    """
    check_magnitude(
        rotation_degrees=rotation_degrees,
        translation_pixels=translation_pixels,
        shear_degrees=shear_degrees,
    )
    low, high = scale
    if not any(map(is_traced, scale)) and not 0.0 < low <= high:
        raise UserError(f"scale={scale}: give (smallest, largest) with 0 < smallest <= largest")
    if not is_traced(shear_degrees) and shear_degrees >= 90.0:
        raise UserError(f"shear_degrees={shear_degrees}: give less than 90")

    def draw(key: jax.Array, size: Size) -> Move:
        draws = jax.random.uniform(key, (5,), minval=-1.0)
        angle = jnp.radians(rotation_degrees) * draws[0]
        lean = jnp.radians(shear_degrees) * draws[1]
        move = translation_pixels * draws[2:4]
        logs = jnp.log(jnp.asarray(low)), jnp.log(jnp.asarray(high))
        factor = jnp.exp(logs[0] + (logs[1] - logs[0]) * (draws[4] + 1.0) / 2.0)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        # The inverse map, for a row (x, y): turn back, shrink, lean back.
        turn_back = jnp.array([[cos, -sin], [sin, cos]]) / factor
        lean_back = jnp.array([[1.0, 0.0], [-jnp.tan(lean), 1.0]])
        return affine_move(size, turn_back @ lean_back, move, fill=fill)

    return Geometric(draw)


def random_resized_crop(
    smallest_area: float = 0.08, largest_area: float = 1.0, aspect: float = 4 / 3
) -> Geometric:
    """Stretches a random part of the image to the whole size, with bilinear interpolation.

    Szegedy et al. 2015 (arXiv 1409.4842), section 6: the part's fraction of the area is uniform
    between the two given (8% and 100% there), the logarithm of width / height is uniform between
    those of `1 / aspect` and `aspect`, and the place is uniform. A part that would be wider or
    higher than the image is cut to it.
    """
    if not 0.0 < smallest_area <= largest_area <= 1.0:
        raise UserError(
            f"smallest_area={smallest_area}, largest_area={largest_area}: give "
            "0 < smallest_area <= largest_area <= 1"
        )
    if not aspect >= 1.0:
        raise UserError(f"aspect={aspect}: give a ratio of 1 or more")

    def draw(key: jax.Array, size: Size) -> Move:
        draws = jax.random.uniform(key, (4,))
        area = smallest_area + (largest_area - smallest_area) * draws[0]
        stretch = jnp.exp((2.0 * draws[1] - 1.0) * np.log(aspect) / 2.0)
        # Shares of the image's width and height.
        part = jnp.minimum(jnp.sqrt(area) * jnp.stack([stretch, 1.0 / stretch]), 1.0)
        center = (draws[2:] - 0.5) * (1.0 - part) * np.array(size[::-1], np.float32)
        return affine_move(size, jnp.diag(part), -center / part)

    return Geometric(draw)


def random_elastic(strength: Magnitude, deviation: float = 4.0) -> Geometric:
    """Distorts the image as if it were drawn on rubber.

    Simard et al. 2003, section 2: each pixel is read from a place moved by `strength` times a field
    of uniform numbers in [-1, 1], smoothed by a Gaussian of `deviation` pixels. Their best values
    for MNIST are 34 and 4: moves of 1.4 pixels, as a root mean square.
    """
    check_magnitude(strength=strength)
    if not deviation > 0:
        raise UserError(f"deviation={deviation}: give a positive number of pixels")

    def draw(key: jax.Array, size: Size) -> Move:
        height, width = size
        field = rng.draw(jax.random.uniform, key, (2, height, width), jnp.float32, -1.0)
        smooth_y, smooth_x = (gaussian_matrix(size, deviation) for size in (height, width))
        moves = strength * jnp.einsum("yi,dij,xj->dyx", smooth_y, field, smooth_x)
        rows, columns = np.mgrid[:height, :width].astype(np.float32)
        return sampled_move(rows + moves[0], columns + moves[1])

    return Geometric(draw)
