"""Several predictions as one: of several networks, or of one network and several views.

Everything here works on `ModelLogits`, functions `(variables, image in [0, 1]) -> logits`, so that
an ensemble is scored, attacked and calibrated like a single model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError, unknown_name
from cnnjax.train.predict import as_float, predicted

PyTree = Any
# `(variables, image [batch, height, width, channels] in [0, 1]) -> logits [batch, classes]`.
ModelLogits = Callable[[PyTree, jax.Array], jax.Array]
View = Callable[[jax.Array], jax.Array]
AVERAGES = ("probabilities", "logits")


def model_logits(model: nn.Module, normalize: Callable[[jax.Array], jax.Array]) -> ModelLogits:
    """Returns `(variables, image in [0, 1]) -> logits` of a model as it predicts, float32 at least.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      normalize: images in [0, 1] -> what the model expects.
    """

    def logits_of(variables: PyTree, image: jax.Array) -> jax.Array:
        return predicted(model, variables, normalize(image))

    return logits_of


def ensemble_logits(
    members: Sequence[ModelLogits], *, average: str = "probabilities"
) -> ModelLogits:
    """Returns the logits of an ensemble; its variables are a sequence, one per member.

    Args:
      members: the models' logits functions; each is applied to the same image.
      average: `probabilities` (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive
        Uncertainty Estimation using Deep Ensembles", section 2.4) returns the log of their mean;
        `logits` returns the mean of the logits, that is, the normalized geometric mean.

    Returns:
      `(variables of each member, image) -> [batch, classes]`, two columns for members of one logit.

    Raises:
      UserError: no members, or an unknown average.
    """
    if average not in AVERAGES:
        raise unknown_name("average of an ensemble", average, AVERAGES)
    if not members:
        raise UserError("an ensemble needs one member at least: name a run.")

    def logits_of(variables: Sequence[PyTree], image: jax.Array) -> jax.Array:
        each = [
            class_logits(member(own, image)) for member, own in zip(members, variables, strict=True)
        ]
        return mean_logits(jnp.stack(each), average)

    return logits_of


def with_views(logits_of: ModelLogits, views: Sequence[View]) -> ModelLogits:
    """Returns the logits averaged (as probabilities) over views of each image.

    Test-time augmentation, as in Krizhevsky, Sutskever and Hinton 2012, "ImageNet Classification
    with Deep Convolutional Neural Networks", section 4.1.

    Args:
      logits_of: one model's, or an ensemble's.
      views: functions of a batch of images in [0, 1], such as `parse_views` returns.
    """

    def averaged(variables: PyTree, image: jax.Array) -> jax.Array:
        each = [class_logits(logits_of(variables, view(image))) for view in views]
        return mean_logits(jnp.stack(each), "probabilities")

    return averaged


def flip(views: list[View]) -> list[View]:
    """Mirrors each view left to right."""
    return [*views, *map(_mirrored, views)]


def shift(views: list[View], pixels: int) -> list[View]:
    """Moves the image by so many pixels in each of the eight directions; repeats its border."""
    if pixels < 1:
        raise UserError(f"pixels={pixels}: give a whole number of pixels from 1 on")
    steps = (-pixels, 0, pixels)
    return [*views, *(_shift(down, right) for down in steps for right in steps if down or right)]


VIEWS: spec.Registry = {"flip": flip, "shift": shift}


def parse_views(text: str) -> list[View]:
    """Reads the views of test-time augmentation, the image itself always among them.

    Args:
      text: names of `VIEWS` with their arguments, such as `shift:1,flip`. Moved images are mirrored
        too, in whichever order.

    Raises:
      UserError: an unknown view, or a shift that is no whole number of pixels.
    """
    views: list[View] = [lambda image: image]
    for item in sorted(spec.parse(text, "view"), key=lambda item: item.name == "flip"):
        views = spec.call(item, VIEWS, "view", views=views)
    return views


def mean_logits(logits: jax.Array, average: str) -> jax.Array:
    """Averages logits `[members, batch, classes]` over the members: `[batch, classes]`."""
    if average == "logits":
        return jnp.mean(logits, axis=0)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.logsumexp(log_probabilities, axis=0) - math.log(len(logits))


def log_probabilities(
    logits_of: ModelLogits,
) -> Callable[[PyTree, dict[str, jax.Array]], jax.Array]:
    """Returns `(variables, batch) -> log probabilities [batch, classes]`; uint8 images as well."""

    def predict(variables: PyTree, batch: dict[str, jax.Array]) -> jax.Array:
        logits = class_logits(logits_of(variables, as_float(batch["image"])))
        return jax.nn.log_softmax(logits, axis=-1)

    return predict


def disagreement(probabilities: Any) -> dict[str, Any]:
    """Returns how much the members of an ensemble differ.

    Args:
      probabilities: `[members, examples, classes]`.

    Returns:
      `pairs`, a list `[members][members]` of the fraction of examples that two members classify
      differently; `mean`, its mean over the pairs of two; `any`, the share on which not all agree;
      `mutual_information`, the mean over examples of the entropy of the average minus the average
      entropy, in nats: what the members' differing adds to the uncertainty (Smith and Gal 2018,
      "Understanding Measures of Uncertainty for Adversarial Example Detection", section 3.2).

    Raises:
      UserError: fewer than two members.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 3 or len(probabilities) < 2:
        raise UserError(
            f"disagreement needs [members, examples, classes] with two members at least, not "
            f"{list(probabilities.shape)}."
        )
    predicted = probabilities.argmax(axis=-1)
    differ = np.mean(predicted[:, None] != predicted[None], axis=-1)
    members = len(differ)
    return {
        "pairs": differ.tolist(),
        "mean": float(differ.sum() / (members * (members - 1))),
        "any": float(np.mean(np.any(predicted != predicted[0], axis=0))),
        "mutual_information": float(
            np.mean(_entropy(probabilities.mean(axis=0)) - _entropy(probabilities).mean(axis=0))
        ),
    }


def class_logits(logits: jax.Array) -> jax.Array:
    """Returns logits `[batch, classes]`: one logit becomes two with the same probabilities."""
    if logits.shape[-1] > 1:
        return logits
    return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def _shift(down: int, right: int) -> View:
    def view(image: jax.Array) -> jax.Array:
        height, width = image.shape[1:3]
        rows = np.clip(np.arange(height) - down, 0, height - 1)
        columns = np.clip(np.arange(width) - right, 0, width - 1)
        return image[:, rows][:, :, columns]

    return view


def _mirrored(view: View) -> View:
    return lambda image: view(image)[:, :, ::-1]


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -np.sum(probabilities * logs, axis=-1)
