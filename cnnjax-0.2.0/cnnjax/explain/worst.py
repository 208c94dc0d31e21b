"""What the worst classified images are taken for, and why: Grad-CAM beside each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import plots
from cnnjax.explain import cam, page
from cnnjax.explain.targets import class_score
from cnnjax.models.stages import changed_stages
from cnnjax.tasks.task import Report

# In the figure, of those with the highest loss.
COUNT = 12


def with_worst_explained(
    report: Report,
    model: nn.Module,
    variables: Any,
    normalize: Callable[[Any], Any],
    probabilities: np.ndarray,
    examples: Mapping[str, Any],
) -> Report:
    """Returns a classifier's report with one more figure, `worst_explained`.

    The maps are computed when it is drawn. A network without a stage whose output is an image has
    no such figure.

    Args:
      report: of `tasks.classification`.
      model: the classifier, with the contract of `cnnjax.models`.
      variables: what it takes.
      normalize: stored images -> what the model expects.
      probabilities: `[examples, classes]`.
      examples: `label [examples]`; `image` of the first of them, or of none.
    """
    images = examples.get("image", ())
    if not len(images) or "classes" not in report.scores:
        return report
    if not has_maps(model, variables, normalize, np.asarray(images[:1])):
        return report
    class_names = [row["name"] for row in report.scores["classes"]]

    def draw(path: Path) -> Path:
        labels, shown = examples["label"][: len(images)], probabilities[: len(images)]
        worst = plots.worst_indices(labels, shown, COUNT)
        image, labels, shown = np.asarray(images)[worst], labels[worst], shown[worst]
        others = other_classes(labels, shown)
        maps = class_maps(model, variables, normalize, image, np.stack([shown.argmax(1), others]))
        painted = [[page.painted(*pair) for pair in zip(image, each, strict=True)] for each in maps]
        return plots.worst_explained(image, painted, labels, others, shown, class_names, path)

    return dataclasses.replace(report, figures={**report.figures, "worst_explained": draw})


def has_maps(model: nn.Module, variables: Any, normalize: Callable, image: np.ndarray) -> bool:
    """Whether a stage of the network puts out an image; nothing is computed.

    Args:
      model, variables, normalize: as for `with_worst_explained`.
      image: `[1, height, width, channels]`, as it is stored.
    """
    sizes: list[int] = []

    def note(name: str, x: jax.Array) -> jax.Array:
        sizes.append(x.shape[1] * x.shape[2] if x.ndim == 4 else 0)
        return x

    with changed_stages(note):
        jax.eval_shape(lambda image: model.apply(variables, normalize(image), train=False), image)
    return max(sizes, default=0) > 1


def other_classes(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the class to set against the likeliest one, `[examples]`: the true one, or of images
    that are right the second likeliest."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    return np.where(order[:, 0] == labels, order[:, 1], labels)


def class_maps(
    model: nn.Module,
    variables: Any,
    normalize: Callable[[Any], Any],
    image: np.ndarray,
    classes: np.ndarray,
) -> np.ndarray:
    """Returns Grad-CAM at the last stage for several classes of each image, by one forward pass.

    Args:
      model, variables, normalize: as for `with_worst_explained`.
      image: `[examples, height, width, channels]`, as they are stored.
      classes: integers `[maps, examples]`.

    Returns:
      `[maps, examples, height, width]`.
    """

    def of_classes(variables: Any, image: jax.Array, classes: jax.Array) -> jax.Array:
        expected = normalize(image)
        return jax.vmap(lambda label: cam.grad_cam(model, variables, expected, class_score(label)))(
            classes
        )

    return np.asarray(jax.jit(of_classes)(variables, image, jnp.asarray(classes)))
