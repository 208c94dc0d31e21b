"""Temperature: recovers the one that predictions were made with, whatever the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import metrics
from cnnjax.errors import UserError
from cnnjax.evaluation import calibration


def drawn(temperature, seed, examples=20_000, classes=4):
    """Logits, and labels drawn from `softmax(logits / temperature)`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (examples, classes))
    cumulative = np.cumsum(calibration.apply_temperature(logits, temperature), axis=1)
    return logits, np.sum(generator.uniform(size=(examples, 1)) > cumulative, axis=1)


@settings(max_examples=8)
@given(temperature=st.floats(0.2, 5.0), seed=st.integers(0, 99))
def test_the_temperature_of_the_data_is_found_and_calibrates(temperature, seed):
    logits, labels = drawn(temperature, seed)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.1)
    probabilities = calibration.apply_temperature(logits, found)
    assert metrics.expected_calibration_error(probabilities, labels) < 0.02


def test_no_other_temperature_is_likelier_and_log_probabilities_do_as_well():
    logits, labels = drawn(2.0, 1, examples=500)
    found = calibration.fit_temperature(logits, labels)
    best = calibration.negative_log_likelihood(logits, labels, found)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert calibration.negative_log_likelihood(logits, labels, factor * found) > best
    logs = np.log(calibration.apply_temperature(logits, 1.0))
    assert calibration.fit_temperature(logs, labels) == pytest.approx(found, rel=1e-9)


def test_where_all_is_right_the_temperature_stays_finite():
    logits = 5 * np.eye(3)
    assert calibration.fit_temperature(logits, [0, 1, 2]) == pytest.approx(1e-3)
    assert calibration.fit_temperature(logits, [1, 2, 0]) == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (np.zeros((2, 3)), [0], r"logits \[2, 3\] and labels \[1\] do not fit"),
        (np.zeros((0, 3)), [], "at least one example"),
        (np.full((1, 3), np.nan), [0], "not finite"),
    ],
)
def test_bad_predictions_are_one_clear_error(logits, labels, words):
    with pytest.raises(UserError, match=words):
        calibration.fit_temperature(logits, np.asarray(labels, int))
