"""A linear probe of features, against an optimum found otherwise."""

import numpy as np
import pytest
import scipy.optimize

from cnnjax.errors import UserError
from cnnjax.evaluation.probe import linear_probe

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(45) % 3
FEATURES = 4 * np.eye(3)[LABELS] @ GENERATOR.normal(size=(3, 5)) + GENERATOR.normal(size=(45, 5))


def test_the_probe_minimizes_what_it_says():
    new = GENERATOR.normal(size=(500, 5)) * FEATURES.std(0) + FEATURES.mean(0)
    scaled, new_scaled = (
        np.sqrt(5) * x / np.linalg.norm(x, axis=1, keepdims=True) for x in (FEATURES, new)
    )

    def objective(flat):
        weights, bias = flat[:15].reshape(5, 3), flat[15:]
        logits = scaled @ weights + bias
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(45), LABELS]
        return losses.sum() + 3.0 / 2 * (weights**2).sum()

    found = scipy.optimize.minimize(objective, np.zeros(18), method="BFGS").x
    logits = new_scaled @ found[:15].reshape(5, 3) + found[15:]
    predicted = linear_probe(FEATURES, LABELS, strength=3.0)(new)
    # Of 500 points one may lie on a border.
    assert (predicted == logits.argmax(1)).mean() > 0.995
    assert set(predicted) == {0, 1, 2}


def test_only_the_direction_of_features_counts():
    lengths = GENERATOR.uniform(0.01, 100, size=(45, 1))
    predicted = linear_probe(FEATURES, LABELS)(FEATURES)
    np.testing.assert_array_equal(
        linear_probe(lengths * FEATURES, LABELS)(FEATURES / lengths), predicted
    )
    assert (predicted == LABELS).mean() > 0.9
    # A zero has no direction, and is no error.
    assert linear_probe(FEATURES, LABELS)(np.zeros((1, 5))).shape == (1,)


@pytest.mark.parametrize(
    ("features", "labels", "strength", "message"),
    [
        (FEATURES[0], LABELS, 1.0, "do not fit"),
        (FEATURES, LABELS[:-1], 1.0, "do not fit"),
        (FEATURES, LABELS * 0, 1.0, "two classes"),
        (FEATURES * np.nan, LABELS, 1.0, "not finite"),
        (FEATURES, LABELS, 0.0, "strength 0.0 must be positive"),
    ],
)
def test_a_probe_names_what_is_wrong(features, labels, strength, message):
    with pytest.raises(UserError, match=message):
        linear_probe(features, labels, strength=strength)
