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
    scaled = (FEATURES - FEATURES.mean(0)) / FEATURES.std(0)

    def objective(flat):
        weights, bias = flat[:15].reshape(5, 3), flat[15:]
        logits = scaled @ weights + bias
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(45), LABELS]
        return losses.sum() + 3.0 / 2 * (weights**2).sum()

    found = scipy.optimize.minimize(objective, np.zeros(18), method="BFGS").x
    logits = (new - FEATURES.mean(0)) / FEATURES.std(0) @ found[:15].reshape(5, 3) + found[15:]
    predicted = linear_probe(FEATURES, LABELS, strength=3.0)(new)
    # Of 500 points one may lie on a border.
    assert (predicted == logits.argmax(1)).mean() > 0.995
    assert set(predicted) == {0, 1, 2}


def test_the_scale_of_a_feature_does_not_matter_nor_one_that_is_constant():
    other = np.concatenate([FEATURES * [1, 1e3, 1e-3, 1, 10], np.full((45, 1), 7.0)], axis=1)
    np.testing.assert_array_equal(
        linear_probe(FEATURES, LABELS)(FEATURES), linear_probe(other, LABELS)(other)
    )


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
