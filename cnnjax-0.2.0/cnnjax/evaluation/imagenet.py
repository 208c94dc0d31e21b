"""Published weights on ImageNet and its variants: top 1, top 5, loss, as papers report them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cnnjax.data.packaged.imagenet import TestImages
from cnnjax.devices.sharding import make_mesh
from cnnjax.errors import UserError
from cnnjax.evaluation import ensemble
from cnnjax.train.evaluate import compile_predict, predict_all

TOP = 5
# Of images of about 224 pixels.
BATCH_SIZE = 64


def evaluate(
    model: Any,
    variables: Any,
    images: TestImages,
    *,
    normalize: Callable[[jax.Array], jax.Array],
) -> dict[str, Any]:
    """Returns `top1`, `top5`, `loss`, `classes` and `examples`.

    Classes that the dataset does not have cannot be predicted: their logits are left out, as the
    authors of ImageNet-A and ImageNet-R do.

    Args:
      model: with the 1000 classes of ImageNet.
      variables: of the model.
      images: what to predict.
      normalize: images in [0, 1] -> what the model expects.

    Raises:
      UserError: the network has not as many classes as ImageNet.
    """
    if model.num_classes != 1000:
        raise UserError(
            f"the network has {model.num_classes} classes, and ImageNet 1000: evaluate its own "
            "data by --run"
        )
    predict = compile_predict(
        ensemble.log_probabilities(ensemble.model_logits(model, normalize)), make_mesh(1)
    )
    logits, kept = predict_all(predict, variables, images.batches(BATCH_SIZE))
    answers = images.rows[kept["label"]]
    allowed = np.unique(answers) if images.only_present else np.sort(images.rows)
    return scores(logits, answers, allowed) | {"examples": len(answers)}


def scores(logits: np.ndarray, answers: np.ndarray, allowed: np.ndarray) -> dict[str, Any]:
    """Returns the scores of logits `[examples, classes]` where only some classes count.

    Args:
      logits: unnormalized or log probabilities.
      answers: the true class of each example.
      allowed: the classes that count, in ascending order.
    """
    some = logits[:, allowed].astype(np.float64)
    some -= some.max(axis=1, keepdims=True)
    some -= np.log(np.exp(some).sum(axis=1, keepdims=True))
    place = np.searchsorted(allowed, answers)
    own = some[np.arange(len(some)), place]
    # Of equal logits the first counts, as of argmax.
    before = np.arange(some.shape[1]) < place[:, None]
    rank = ((some > own[:, None]) | ((some == own[:, None]) & before)).sum(axis=1)
    return {
        "top1": float(np.mean(rank == 0)),
        "top5": float(np.mean(rank < TOP)),
        "loss": float(-np.mean(own)),
        "classes": len(allowed),
    }
