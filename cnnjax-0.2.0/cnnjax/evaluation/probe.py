"""A linear probe: what a linear classifier of a network's frozen features reaches.

Chen et al. 2020 (arXiv 2002.05709), section 2.2: the usual measure of a representation that was
learned without labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cnnjax.errors import UserError

MOST_ITERATIONS = 1000


def linear_probe(
    features: Any, labels: Any, *, strength: float = 1.0
) -> Callable[[Any], np.ndarray]:
    """Fits multinomial logistic regression to features, those of each example of one length.

    They are scaled to a root mean square of 1: only their direction counts, as in a contrastive
    loss. The fit is scikit-learn's, by L-BFGS: it minimizes the sum of the cross-entropies plus
    `strength / 2` times the sum of the squared weights, without the biases. Nothing is drawn at
    random.

    Args:
      features: `[examples, features]`.
      labels: integers `[examples]`, of two classes or more.
      strength: positive; more for fewer examples.

    Returns:
      `features [examples, features] -> labels [examples]`.

    Raises:
      UserError: shapes that do not fit, fewer than two classes, features that are not finite, or
        `strength` not positive.
    """
    from sklearn.linear_model import LogisticRegression

    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UserError(
            f"features {list(features.shape)} and labels {list(labels.shape)} do not fit: give "
            "[examples, features] and [examples]."
        )
    if len(np.unique(labels)) < 2:
        raise UserError("a probe needs examples of two classes or more.")
    if not np.isfinite(features).all():
        raise UserError("a feature is not finite: the network diverged, or its input is wrong.")
    if not strength > 0:
        raise UserError(f"strength {strength} must be positive.")
    classifier = LogisticRegression(C=1 / strength, max_iter=MOST_ITERATIONS)
    classifier.fit(_of_one_length(features), labels)

    def predict(features: Any) -> np.ndarray:
        return classifier.predict(_of_one_length(np.asarray(features, np.float64)))

    return predict


def _of_one_length(features: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.mean(features**2, axis=1, keepdims=True))
    return features / np.where(length > 0, length, 1.0)
