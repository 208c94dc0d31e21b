"""Attacks: the image near a given one that a classifier gets most wrong.

An attack is a pure function of (key, logits function, image, label, mask), fit for `jit`, meshes
and `shard_map`. Images are float `[batch, height, width, channels]` in [0, 1]; what the model
expects (normalization) is part of the logits function, so that `epsilon` means the same for every
model. An adversarial image lies in [0, 1] and within `epsilon` of its original, in the largest
difference of any value (`linf`) or in the Euclidean norm of the whole image (`l2`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnnjax import losses, metrics, rng
from cnnjax.errors import unknown_name

LogitsFunction = Callable[[jax.Array], jax.Array]
LossFunction = Callable[[jax.Array, jax.Array], jax.Array]
Number = jax.Array | float
NORMS = ("linf", "l2")


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Cross-entropy `[batch]` of one logit or of several; hard or soft labels."""
    if logits.shape[-1] == 1:
        return losses.sigmoid_binary_cross_entropy(logits, label)
    return losses.softmax_cross_entropy(logits, label)


def margin(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The largest wrong logit minus the right one, `[batch]`: positive where the class is wrong.

    Carlini and Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section V-A, as
    PGD uses it in Madry et al. 2018, section 5. Unlike cross-entropy it keeps its gradient where
    the softmax is saturated.

    Args:
      logits: `[batch, classes]`, or one logit `[batch, 1]`.
      label: integers `[batch]`, or weights `[batch, classes]` of which the heaviest counts.
    """
    if logits.shape[-1] == 1:
        return logits[..., 0] * (1 - 2 * label.reshape(logits.shape[:-1]).astype(logits.dtype))
    right = jax.nn.one_hot(_class_number(label), logits.shape[-1], dtype=bool)
    of_label = jnp.sum(jnp.where(right, logits, 0), axis=-1)
    return jnp.max(jnp.where(right, -jnp.inf, logits), axis=-1) - of_label


def fgsm(
    key: jax.Array,
    logits_fn: LogitsFunction,
    image: jax.Array,
    label: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon: float,
    norm: str = "linf",
    loss: LossFunction = cross_entropy,
) -> jax.Array:
    """The fast gradient sign method: one step of length `epsilon` up the loss.

    Goodfellow, Shlens and Szegedy 2015, "Explaining and Harnessing Adversarial Examples", section
    4; with `l2`, along the gradient itself. Nothing is random: `key` is not used.

    Returns:
      float32 `[batch, height, width, channels]`; where the mask is False, the image as it was.
    """
    check_norm(norm)
    del key
    gradient = jax.grad(lambda x: jnp.sum(loss(logits_fn(x), label)))(image)
    return _where(mask, ascend(image, image, gradient, epsilon, epsilon, norm), image)


def pgd(
    key: jax.Array,
    logits_fn: LogitsFunction,
    image: jax.Array,
    label: jax.Array,
    mask: jax.Array | None = None,
    *,
    epsilon: float,
    num_steps: int,
    step_size: float,
    restarts: int = 1,
    norm: str = "linf",
    loss: LossFunction = cross_entropy,
    random_start: bool = True,
) -> jax.Array:
    """Projected gradient descent: steps up the loss, each projected back, from random starts.

    Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1.
    An image that is wrong counts as worse than any that is right; among equals the higher loss
    does. Returned is the worst of all images that were visited, the original included, so that more
    steps or restarts from the same key never make an attack weaker. Examples that a run has made
    wrong are not attacked again.

    Args:
      key: one typed key, of which each example gets its own by its position; or one an example,
        `[batch]`, with which the result does not depend on how a batch was cut.
      logits_fn: `image -> logits [batch, classes]`; examples must not influence each other.
      image: float `[batch, height, width, channels]` in [0, 1].
      label: integers `[batch]`, or weights `[batch, classes]`.
      mask: bool `[batch]`, or None; where False, the image is returned as it was.
      epsilon: the radius of the ball.
      num_steps: steps of each run; 0 tries the starts only.
      step_size: their length, in the same norm.
      restarts: the number of runs.
      norm: `linf` or `l2`.
      loss: `(logits, label) -> [batch]`, what the steps climb.
      random_start: start uniformly within the ball, not at the image.

    Returns:
      float32 `[batch, height, width, channels]`.
    """
    check_norm(norm)
    keys = example_keys(key, image.shape[0])
    mask = jnp.ones(image.shape[0], bool) if mask is None else mask

    def judge(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = logits_fn(x)
        values = loss(logits, label)
        return jnp.sum(values), (values, _is_wrong(logits, label))

    def step(_: Any, carry: tuple[jax.Array, _Visited]) -> tuple[jax.Array, _Visited]:
        x, worst = carry
        gradient, judged = jax.grad(judge, has_aux=True)(x)
        x_next = ascend(x, image, gradient, step_size, epsilon, norm)
        return x_next, _worse(worst, _Visited(x, *judged))

    def run(carry: tuple[jax.Array, _Visited]) -> tuple[jax.Array, _Visited]:
        number, before = carry
        start = image
        if random_start:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            start = uniform_start(own, image, epsilon, norm)
        last, worst = jax.lax.fori_loop(0, num_steps, step, (start, before))
        after = _worse(worst, _Visited(last, *judge(last)[1]))
        return number + 1, _select(before.wrong, before, after)

    def goes_on(carry: tuple[jax.Array, _Visited]) -> jax.Array:
        number, worst = carry
        return (number < restarts) & jnp.any(mask & ~worst.wrong)

    first = _Visited(image, *judge(image)[1])
    _, worst = jax.lax.while_loop(goes_on, run, (jnp.int32(0), first))
    return _where(mask, worst.image, image)


def ascend(
    x: jax.Array,
    image: jax.Array,
    gradient: jax.Array,
    step_size: Number,
    epsilon: Number,
    norm: str,
) -> jax.Array:
    """One step of `step_size` from `x` in the steepest direction of the norm, projected back."""
    if norm == "linf":
        return project(x + step_size * jnp.sign(gradient), image, epsilon, norm)
    length = jnp.maximum(_lengths(gradient), jnp.finfo(gradient.dtype).tiny)
    return project(x + step_size * gradient / length, image, epsilon, norm)


def project(x: jax.Array, image: jax.Array, epsilon: Number, norm: str) -> jax.Array:
    """Moves `x` into the ball around `image`, and into [0, 1]."""
    if norm == "linf":
        low, high = jnp.maximum(image - epsilon, 0.0), jnp.minimum(image + epsilon, 1.0)
        return jnp.clip(x, low, high)
    change = x - image
    factor = epsilon / jnp.maximum(_lengths(change), jnp.finfo(x.dtype).tiny)
    # The image is within [0, 1], so that clipping only shortens the change.
    return jnp.clip(image + change * jnp.minimum(factor, 1.0), 0.0, 1.0)


def uniform_start(keys: jax.Array, image: jax.Array, epsilon: Number, norm: str) -> jax.Array:
    """Draws an image uniformly from each ball, then clips it to [0, 1].

    Args:
      keys: typed keys `[batch]`.
      image: `[batch, height, width, channels]` in [0, 1].
      epsilon: the radius.
      norm: `linf` or `l2`.
    """
    return project(image + uniform_change(keys, image, epsilon, norm), image, epsilon, norm)


def uniform_change(keys: jax.Array, image: jax.Array, epsilon: Number, norm: str) -> jax.Array:
    """Draws a change of each image uniformly from the ball; arguments as for `uniform_start`."""

    def change(key: jax.Array) -> jax.Array:
        if norm == "linf":
            return rng.draw(
                jax.random.uniform, key, image.shape[1:], image.dtype, -epsilon, epsilon
            )
        # Barthe, Guedon, Mendelson and Naor 2005, theorem 1: uniform in the ball.
        normal_key, radius_key = jax.random.split(key)
        values = rng.draw(jax.random.normal, normal_key, image.shape[1:], image.dtype)
        extra = 2 * jax.random.exponential(radius_key, dtype=image.dtype)
        return epsilon * values / jnp.sqrt(jnp.sum(values**2) + extra)

    return jax.vmap(change)(keys)


def example_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """Returns typed keys `[batch]`: those given, or one for each position from a single key."""
    if key.ndim:
        return key
    return rng.example_keys(key, jnp.arange(batch_size))


def check_norm(norm: str) -> None:
    """Raises a UserError for an unknown norm."""
    if norm not in NORMS:
        raise unknown_name("norm of an attack", norm, NORMS)


class _Visited(NamedTuple):
    """An image an example, its loss, and whether its class is wrong."""

    image: jax.Array
    loss: jax.Array
    wrong: jax.Array


def _worse(first: _Visited, second: _Visited) -> _Visited:
    same = first.wrong == second.wrong
    second_is_worse = jnp.where(same, second.loss > first.loss, second.wrong)
    return _select(second_is_worse, second, first)


def _select(chosen: jax.Array, first: _Visited, second: _Visited) -> _Visited:
    return _Visited(*(_where(chosen, a, b) for a, b in zip(first, second, strict=True)))


def _where(chosen: jax.Array | None, first: jax.Array, second: jax.Array) -> jax.Array:
    """Selects by example; None is all of `first`."""
    if chosen is None:
        return first
    return jnp.where(chosen.reshape(-1, *[1] * (first.ndim - 1)), first, second)


def _is_wrong(logits: jax.Array, label: jax.Array) -> jax.Array:
    single = logits.shape[-1] == 1
    number = label.reshape(logits.shape[:-1]).round() if single else _class_number(label)
    return metrics.predicted_label(logits) != number.astype(jnp.int32)


def _class_number(label: jax.Array) -> jax.Array:
    return label if label.ndim == 1 else jnp.argmax(label, axis=-1)


def _lengths(values: jax.Array) -> jax.Array:
    """Euclidean norm of each example, `[batch, 1, 1, 1]`."""
    return jnp.sqrt(jnp.sum(values**2, axis=tuple(range(1, values.ndim)), keepdims=True))
