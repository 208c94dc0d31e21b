"""What is explained: a function of a model's outputs to one number for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import metrics
from cnnjax.errors import UserError, unknown_name

Target = Callable[[Any], jax.Array]
Label = int | jax.Array


def class_score(label: Label) -> Target:
    """The logit of a class.

    Args:
      label: a class for all images, or one for each, `[batch]`. It may be traced, so that `vmap`
        over classes explains all of them with one forward pass. Of a single logit, class 1 is the
        logit and class 0 its negative.

    Raises:
      UserError: when it is called, the class is out of range (as far as it is known then).
    """

    def score(logits: jax.Array) -> jax.Array:
        return _of_class(logits, label)

    return score


def class_probability(label: Label) -> Target:
    """The probability of a class: softmax, of a single logit the sigmoid. As `class_score`."""

    def score(logits: jax.Array) -> jax.Array:
        return _of_class(metrics.probabilities(logits), label)

    return score


def class_difference(label: Label, other: Label) -> Target:
    """The logit of one class minus that of another: why this class and not that one."""

    def score(logits: jax.Array) -> jax.Array:
        return _of_class(logits, label) - _of_class(logits, other)

    return score


def pixel_score(label: Label, row: int, column: int) -> Target:
    """The logit of a class at one pixel of `[batch, height, width, classes]`.

    Raises:
      UserError: when it is called, the outputs have no such pixel or class.
    """

    def score(logits: jax.Array) -> jax.Array:
        if logits.ndim != 4:
            raise UserError(
                f"a pixel's score needs logits of each pixel, not of shape {logits.shape}."
            )
        if not (0 <= row < logits.shape[1] and 0 <= column < logits.shape[2]):
            raise UserError(
                f"pixel ({row}, {column}) is outside of {logits.shape[1]} x {logits.shape[2]}."
            )
        return _of_class(logits[:, row, column], label)

    return score


def predicted_class(logits: jax.Array) -> jax.Array:
    """The largest logit of each image: the class is that which the network answers."""
    return _of_class(logits, metrics.predicted_label(logits))


def _of_class(logits: jax.Array, label: Label) -> jax.Array:
    if logits.ndim != 2:
        raise UserError(
            f"a class's score needs logits [batch, classes], not of shape {logits.shape}: give a "
            "target of your own, a function of the outputs to a number for each image."
        )
    if logits.shape[-1] == 1:
        logits = jnp.concatenate([-logits, logits], -1)
    _check_labels(label, *logits.shape)
    labels = jnp.broadcast_to(jnp.asarray(label), logits.shape[:1])
    return jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]


def _check_labels(label: Label, batch: int, num_classes: int) -> None:
    labels = jnp.asarray(label)
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape not in ((), (1,), (batch,)):
        raise UserError(
            f"a class is a whole number, or one for each of {batch} images, not {labels.dtype} of "
            f"shape {labels.shape}."
        )
    if isinstance(label, jax.core.Tracer):
        # Not known yet.
        return
    for number in np.unique(np.asarray(label)):
        if not 0 <= number < num_classes:
            raise UserError(f"there is no class {number}: the network has 0 to {num_classes - 1}.")


def read_classes(words: Iterable[str], class_names: Sequence[str]) -> list[int]:
    """Returns the numbers of classes that are given by name or number.

    A name counts before a number: of the classes `1`, `3`, `7` the word 3 is the second.

    Raises:
      UserError: there is no such class.
    """
    names = [str(name) for name in class_names]
    found: dict[int, None] = {}
    for word in words:
        if word in names:
            found[names.index(word)] = None
        elif word.isdecimal() and int(word) < len(names):
            found[int(word)] = None
        elif word.lstrip("-").isdecimal():
            raise UserError(f"there is no class {word}: the network has 0 to {len(names) - 1}.")
        else:
            raise unknown_name("class", word, names)
    return list(found)
