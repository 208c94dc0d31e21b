"""What a change of an example is: a function of its image, or a move of all that shows a place.

A change is `f(key, image) -> image` for one image `[height, width, channels]`: deterministic in its
key, of the same shape and dtype, fit for `jit`, `vmap`, `lax.scan` and gradients, the identity at
zero magnitude. Float images are changed as they are; uint8 images are mapped to [0, 1], changed,
and rounded back. Magnitudes may be traced numbers (a gradient with respect to them is that of the
image they make), unless they set the shape of something.

A plain function changes images only: colors, noise, what is covered. A `Geometric` change also
moves class maps and boxes, by the same draw. Both are written without touching this package:

    def random_gamma(strength):
        def gamma(key, image):
            return image ** jnp.exp(strength * jax.random.uniform(key, minval=-1.0))

        return gamma

    def random_quarter_turn():
        def draw(key, size):
            turned = jnp.array([[0.0, -1.0], [1.0, 0.0]])
            inverse = jnp.where(jax.random.bernoulli(key), turned, jnp.eye(2))
            return augment.affine_move(size, inverse, jnp.zeros(2))

        return augment.Geometric(draw)

    make_augment((augment.random_flip(), random_quarter_turn(), random_gamma(0.3)), ...)

`affine_move` and `sampled_move` make a `Move` from a linear map, or from the places that are read.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from cnnjax.data.fields import Field
from cnnjax.errors import UserError
from cnnjax.rng import example_keys
from cnnjax.traced import is_traced

Augment = Callable[[jax.Array, jax.Array], jax.Array]
Batch = dict[str, jax.Array]
Magnitude = float | jax.Array
Size = tuple[int, int]

KINDS = ("image", "class_map", "boxes")


@dataclasses.dataclass(frozen=True)
class Move:
    """Where one draw of a geometric change moves what an image shows.

    Attributes:
      image: float `[height, width, channels]` -> the same shape.
      class_map: `(class_map, padding)`, integers `[height, width]` -> the same shape, by the
        nearest neighbor, with `padding` for what comes from outside.
      boxes: float `[max, 4]` in pixels, as `cnnjax.data.fields.Boxes` -> the same shape. A row that
        is no box, or of which nothing is left in the image, becomes 0.
    """

    image: Callable[[jax.Array], jax.Array]
    class_map: Callable[[jax.Array, float], jax.Array] | None = None
    boxes: Callable[[jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Geometric:
    """A change that moves an image together with its class maps and boxes.

    As a function, `(key, image) -> image`, it is a change like any other.

    Attributes:
      draw: `(key, (height, width)) -> Move`. Pure: the same key is the same move.
      kinds: what its moves can be applied to, of `KINDS`.
    """

    draw: Callable[[jax.Array, Size], Move]
    kinds: tuple[str, ...] = KINDS

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        def moved(key: jax.Array, image: jax.Array) -> jax.Array:
            return self.draw(key, size_of(image)).image(image)

        return on_floats(moved)(key, image)


def size_of(image: jax.Array) -> Size:
    """Returns height and width of an image or a class map `[height, width, ...]`."""
    return image.shape[0], image.shape[1]


def on_floats(function: Augment) -> Augment:
    """Makes an augmentation of float images one of uint8 images too, by way of [0, 1]."""

    @functools.wraps(function)
    def of_either(key: jax.Array, image: jax.Array) -> jax.Array:
        if image.dtype != jnp.uint8:
            return function(key, image)
        changed = function(key, image.astype(jnp.float32) / 255.0)
        return jnp.round(255.0 * jnp.clip(changed, 0.0, 1.0)).astype(jnp.uint8)

    return of_either


def compose(*functions: Augment) -> Augment:
    """Applies the functions in the order given, each with a key of its own.

    The result is `Geometric` where one of them is.
    """

    @on_floats
    def composed(key: jax.Array, image: jax.Array) -> jax.Array:
        for position, function in enumerate(functions):
            image = function(jax.random.fold_in(key, position), image)
        return image

    geometric = [(i, each) for i, each in enumerate(functions) if isinstance(each, Geometric)]
    if not geometric:
        return composed

    def draw(key: jax.Array, size: Size) -> Move:
        def moves() -> list[Move]:
            return [each.draw(jax.random.fold_in(key, i), size) for i, each in geometric]

        return chain(functools.partial(composed, key), moves)

    kinds = tuple(kind for kind in KINDS if all(kind in each.kinds for _, each in geometric))
    return Geometric(draw, kinds)


def chain(image: Callable[[jax.Array], jax.Array], moves: Callable[[], Sequence[Move]]) -> Move:
    """Returns the move of several: `image` as given, class maps and boxes by each in turn."""

    def class_map(classes: jax.Array, padding: float) -> jax.Array:
        for move in moves():
            assert move.class_map is not None
            classes = move.class_map(classes, padding)
        return classes

    def boxes(corners: jax.Array) -> jax.Array:
        for move in moves():
            assert move.boxes is not None
            corners = move.boxes(corners)
        return corners

    return Move(image, class_map, boxes)


def apply_per_image(
    key: jax.Array, images: jax.Array, function: Augment, first_index: jax.Array | int = 0
) -> jax.Array:
    """Applies `function` to each image with a key of its own.

    Args:
      key: the step's key.
      images: `[batch, height, width, channels]`.
      function: a change, of one image.
      first_index: the position of the first image in the whole batch. A device that holds a part
        of the batch gives it, and each example's draw is the same on any number of devices.
    """
    indices = first_index + jnp.arange(images.shape[0])
    keys = example_keys(key, indices)
    return jax.vmap(function)(keys, images)


def apply_by_kind(
    key: jax.Array,
    batch: Batch,
    change: Augment,
    fields: Mapping[str, Field],
    first_index: jax.Array | int = 0,
) -> Batch:
    """Applies `change` to each example with a key of its own: to its images, and where it is
    `Geometric`, by the same draw, to its class maps and boxes.

    Args:
      key, first_index: as for `apply_per_image`.
      batch: arrays whose first axis is the examples.
      change: a change of one example.
      fields: the keys of the batch; `Field.moves` says how each is moved.

    Returns:
      The batch, its keys that do not move as they were.

    Raises:
      UserError: if an image and a class map have different sizes.
    """
    places = {name: field for name, field in fields.items() if field.moves}
    flat = [name for name, field in places.items() if field.moves in ("image", "class_map")]
    shapes = {name: batch[name].shape for name in flat}
    size = _common_size({name: (shape[1], shape[2]) for name, shape in shapes.items()})

    def changed(key: jax.Array, name: str, array: jax.Array) -> jax.Array:
        field = places[name]
        if field.moves == "image":
            return change(key, array)
        if not isinstance(change, Geometric):
            return array
        # Drawn again for each key of the example: the same draw, as it is the same random key.
        move = change.draw(key, size)
        if field.moves == "class_map":
            assert move.class_map is not None
            return move.class_map(array, field.padding)
        assert move.boxes is not None
        return move.boxes(array)

    def of_example(key: jax.Array, example: Batch) -> Batch:
        return {name: changed(key, name, array) for name, array in example.items()}

    moved = {name: batch[name] for name in places}
    indices = first_index + jnp.arange(len(next(iter(moved.values()))))
    return {**batch, **jax.vmap(of_example)(example_keys(key, indices), moved)}


def check_kinds(changes: Sequence[Augment], fields: Mapping[str, Field]) -> None:
    """Raises a UserError unless the changes can be applied to the keys of these fields."""
    if not any(field.moves == "image" for field in fields.values()):
        raise UserError(
            f"augmentation changes images, and none of {', '.join(fields)} is an image: leave it "
            "out."
        )
    for name, field in fields.items():
        for change in changes:
            if not isinstance(change, Geometric) or not field.moves or field.moves in change.kinds:
                continue
            function = getattr(change.draw, "__qualname__", repr(change.draw)).partition(".")[0]
            raise UserError(
                f"{function} moves {' and '.join(change.kinds)}, and cannot move {name!r} "
                f"({field.moves}) with them: leave it out."
            )


def check_magnitude(**magnitudes: Magnitude) -> None:
    """Raises a UserError for a magnitude below 0; a traced one cannot be checked."""
    for name, value in magnitudes.items():
        if not is_traced(value) and not value >= 0:
            raise UserError(f"{name}={value}: give a magnitude of 0 or more")


def check_probability(**probabilities: Magnitude) -> None:
    """Raises a UserError for a probability outside [0, 1]; a traced one cannot be checked."""
    for name, value in probabilities.items():
        if not is_traced(value) and not 0.0 <= value <= 1.0:
            raise UserError(f"{name}={value}: give a number in [0, 1]")


def _common_size(sizes: Mapping[str, Size]) -> Size:
    """Returns the height and width that all have."""
    if len(set(sizes.values())) > 1:
        each = ", ".join(f"{name} {size[0]}x{size[1]}" for name, size in sizes.items())
        raise UserError(
            f"the keys of a batch are of different sizes ({each}): one draw moves them all, so "
            "give images and class maps of one height and width."
        )
    return next(iter(sizes.values()))
