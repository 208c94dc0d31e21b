"""Calibration of predicted probabilities by temperature scaling.

The error that it lowers is `metrics.expected_calibration_error`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnjax.errors import UserError

# A factor of a thousand either way: further out, the likelihood has no minimum.
LOG_TEMPERATURE_RANGE = (-np.log(1000.0), np.log(1000.0))


def fit_temperature(logits: Any, labels: Any) -> float:
    """Returns the temperature T that makes `softmax(logits / T)` likeliest.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. Accuracy does not
    change. Fit it on data that was neither trained nor tested on.

    Args:
      logits: `[examples, classes]`, or log probabilities, which do as well.
      labels: integers `[examples]`.

    Returns:
      T, within a factor of 1000 of 1: the border where all examples are right, or all alike.

    Raises:
      UserError: shapes that do not fit, or a value that is not finite.
    """
    logits, labels = _checked(logits, labels)
    low, high = LOG_TEMPERATURE_RANGE

    def slope(log_temperature: float) -> float:
        # Of the mean loss by the inverse temperature, in which it is convex: so it rises.
        scaled = logits * np.exp(-log_temperature)
        expected = np.sum(_softmax(scaled) * logits, axis=1)
        return float(np.mean(expected - logits[np.arange(len(labels)), labels]))

    # The slope rises with the inverse temperature, so it falls with the temperature.
    for _ in range(80):
        middle = (low + high) / 2
        if slope(middle) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def apply_temperature(logits: Any, temperature: float) -> np.ndarray:
    """Returns `softmax(logits / temperature)`, float64 `[examples, classes]`.

    Raises:
      UserError: the temperature is not positive.
    """
    if not 0 < temperature < np.inf:
        raise UserError(f"temperature {temperature} must be positive.")
    return _softmax(np.asarray(logits, np.float64) / temperature)


def negative_log_likelihood(logits: Any, labels: Any, temperature: float = 1.0) -> float:
    """Returns the mean cross-entropy of `softmax(logits / temperature)`, in nats."""
    logits, labels = _checked(logits, labels)
    scaled = logits / temperature
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    logs = scaled - np.log(np.sum(np.exp(scaled), axis=1, keepdims=True))
    return float(-np.mean(logs[np.arange(len(labels)), labels]))


def brier_score(probabilities: Any, labels: Any) -> float:
    """Returns the mean squared distance of the probabilities from the answer, in [0, 2].

    Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", equation 2.

    Args:
      probabilities: `[examples, classes]`.
      labels: integers `[examples]`.
    """
    probabilities, labels = _checked(probabilities, labels)
    of_label = probabilities[np.arange(len(labels)), labels]
    return float(np.mean(np.sum(np.square(probabilities), axis=1) - 2 * of_label + 1))


def _checked(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
        raise UserError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit: give "
            "[examples, classes] and [examples], with at least one example."
        )
    if not np.isfinite(logits).all():
        raise UserError(
            "the logits are not finite: the model diverged; take an earlier checkpoint."
        )
    return logits, labels


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
