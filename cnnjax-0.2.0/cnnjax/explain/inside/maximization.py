"""Images that a channel, a unit or a class responds to most, made by gradient ascent.

Erhan et al. 2009, "Visualizing Higher-Layer Features of a Deep Network"; what keeps them from being
noise is in Olah, Mordvintsev and Schubert 2017, "Feature Visualization", Distill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cnnjax.augment import filters, geometry
from cnnjax.errors import UserError, unknown_name
from cnnjax.explain import rectifiers, taps

PARAMETRIZATIONS = ("fourier", "pixel")
# Of the first image, in logits of pixels, as Lucid has it.
START_DEVIATION = 0.01


def maximize(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image_shape: Sequence[int],
    channels: Sequence[int],
    *,
    layer: str = "",
    unit: tuple[int, int] | None = None,
    normalize: Callable[[jax.Array], jax.Array] = lambda image: image,
    parametrization: str = "fourier",
    steps: int = 256,
    learning_rate: float = 0.05,
    total_variation: float = 0.0,
    l2: float = 0.0,
    blur: float = 0.0,
    jitter: float = 0.05,
    rotation: float = 5.0,
    scale: float = 1.05,
) -> tuple[jax.Array, jax.Array]:
    """Returns an image for each channel, all optimized together by one compiled program.

    Args:
      key: of the first images and of the random moves.
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image_shape: `[height, width, channels]`.
      channels: of the layer's last axis; of the network's outputs ("") the classes.
      layer: a stage or layer; "" for the logits.
      unit: (row, column) of the layer; by default the mean over all positions is maximized.
      normalize: of an image in [0, 1] to what the model expects.
      parametrization: "fourier": what is optimized are the image's frequencies, each divided by its
        height, so that no scale is preferred (Olah et al. 2017); "pixel": its pixels.
      steps: of Adam.
      learning_rate: of Adam, in logits of pixels.
      total_variation: weight of the mean absolute difference of neighboring pixels (Mahendran and
        Vedaldi 2015, arXiv 1412.0035).
      l2: weight of the mean squared distance to gray.
      blur: standard deviation, in pixels, of the Gaussian that the image is made through: finer
        detail is not possible.
      jitter, rotation, scale: at each step the network sees the image moved at random by up to
        `jitter` of its side, turned by up to `rotation` degrees, scaled by up to `scale`.

    Returns:
      Images in [0, 1] `[channels, height, width, channels of an image]`, and what the network says
      of them as they are, unmoved, `[channels]`: it may be less than the moved ones had.

    Raises:
      UserError: an unknown layer or parametrization, a channel or unit that is not there, or a
        number out of its range.
    """
    _check_numbers(parametrization, steps, learning_rate, jitter, rotation, scale)
    objective = _objective(model, variables, image_shape, layer, unit, channels)
    make, start = _parametrization(parametrization, image_shape, blur)
    move = geometry.random_affine(rotation, (1 / scale, scale), jitter * max(image_shape[:2]))
    optimizer = optax.adam(learning_rate)

    def loss(parameters: Any, key: jax.Array, channel: jax.Array) -> jax.Array:
        image = make(parameters)
        seen = move.draw(key, (image_shape[0], image_shape[1])).image(image)
        penalty = l2 * jnp.mean(jnp.square(image - 0.5))
        penalty += total_variation * sum(
            jnp.mean(jnp.abs(jnp.diff(image, axis=axis)))
            for axis in (0, 1)
            if image.shape[axis] > 1
        )
        return penalty - objective(normalize(seen[None]), channel)

    def ascend(key: jax.Array, channel: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_start, of_moves = jax.random.split(key)
        parameters = start(of_start)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            parameters, state = carry
            gradient = jax.grad(loss)(parameters, key, channel)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(parameters, updates), state), None

        carry = parameters, optimizer.init(parameters)
        (parameters, _), _ = jax.lax.scan(step, carry, jax.random.split(of_moves, steps))
        image = make(parameters)
        return image, objective(normalize(image[None]), channel)

    keys = jax.random.split(key, len(channels))
    return jax.jit(jax.vmap(ascend))(keys, jnp.asarray(channels, jnp.int32))


def _objective(
    model: nn.Module,
    variables: Any,
    image_shape: Sequence[int],
    layer: str,
    unit: tuple[int, int] | None,
    channels: Sequence[int],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns (image, channel) -> the number that is maximized, checked as far as shapes tell."""
    image: Any = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    if layer:
        shapes = taps.layer_shapes(model, variables, image)
        taps.check_layers(shapes, [layer], image=unit is not None)
        shape = shapes[layer]
    else:
        outputs = jax.eval_shape(lambda x: model.apply(variables, x, train=False), image)
        if not hasattr(outputs, "shape"):
            raise UserError(
                "the network has several outputs: name a layer whose channels are meant."
            )
        shape = tuple(outputs.shape)
    what = layer or "the output"
    if unit and not (0 <= unit[0] < shape[1] and 0 <= unit[1] < shape[2]):
        raise UserError(f"{layer} has no unit {unit}: it is {shape[1]} x {shape[2]}.")
    if not len(channels):
        raise UserError("no channel given: name at least one.")
    for channel in channels:
        if not 0 <= channel < shape[-1]:
            raise UserError(f"{what} has no channel {channel}: it has 0 to {shape[-1] - 1}.")

    def plain(image: jax.Array) -> Any:
        if layer:
            return taps.tap(model, variables, image, [layer])[1][layer]
        return model.apply(variables, image, train=False)

    has_relus = rectifiers.has_relus(plain, image)
    activation = rectifiers.with_rule(plain, redirected_relu) if has_relus else plain

    def objective(image: jax.Array, channel: jax.Array) -> jax.Array:
        found = activation(image)
        found = found[:, unit[0], unit[1]] if unit else found
        return jnp.mean(jnp.take(found, channel, axis=-1))

    return objective


@jax.custom_vjp
def redirected_relu(x: jax.Array) -> jax.Array:
    """ReLU, which where it lets no derivative pass at all lets those pass that would wake it.

    Olah et al. 2017 (Lucid's `redirect_relu_grad`): else nothing is learned of a channel that is
    silent on the first image. For losses that are minimized.
    """
    return jnp.maximum(x, 0)


def _redirected(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    plain = jnp.where(x > 0, cotangent, 0)
    waking = jnp.where((x > 0) | (cotangent < 0), cotangent, 0)
    return (jnp.where(jnp.any(plain != 0), plain, waking),)


redirected_relu.defvjp(lambda x: (jnp.maximum(x, 0), x), _redirected)


def _parametrization(
    name: str, image_shape: Sequence[int], blur: float
) -> tuple[Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    """Returns what makes an image in [0, 1] of parameters, and what draws the first parameters."""
    height, width, depth = image_shape

    def finished(logits: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(filters.gaussian_filter(logits, blur) if blur else logits)

    if name == "pixel":
        return finished, lambda key: START_DEVIATION * jax.random.normal(key, tuple(image_shape))
    rows, columns = jnp.fft.fftfreq(height)[:, None], jnp.fft.rfftfreq(width)[None]
    frequency = jnp.sqrt(jnp.square(rows) + jnp.square(columns))
    # As in Lucid: the constant counts as the lowest frequency; a fourth of it, for the sigmoid.
    weight = math.sqrt(height * width) / jnp.maximum(frequency, 1 / max(height, width)) / 4

    def make(parts: jax.Array) -> jax.Array:
        spectrum = jax.lax.complex(parts[0], parts[1]) * weight[..., None]
        return finished(jnp.fft.irfft2(spectrum, (height, width), axes=(0, 1)))

    shape = 2, height, width // 2 + 1, depth
    return make, lambda key: START_DEVIATION * jax.random.normal(key, shape)


def _check_numbers(
    parametrization: str,
    steps: int,
    learning_rate: float,
    jitter: float,
    rotation: float,
    scale: float,
) -> None:
    if parametrization not in PARAMETRIZATIONS:
        raise unknown_name("parametrization", parametrization, PARAMETRIZATIONS)
    if steps < 1:
        raise UserError(f"{steps} steps of activation maximization: give at least 1.")
    if learning_rate <= 0:
        raise UserError(f"learning_rate={learning_rate}: give a positive number.")
    if not 0 <= jitter < 1 or rotation < 0 or scale < 1:
        raise UserError(
            f"jitter={jitter}, rotation={rotation}, scale={scale}: give a part of the side below "
            "1, degrees from 0 on, and a factor from 1 on."
        )
