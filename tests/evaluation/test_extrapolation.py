"""Forecasts of learning curves whose laws are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.evaluation.extrapolation import extrapolate, laws

LAWS = {
    "power": lambda t: 0.98 - 0.3 * t**-0.8,
    "slow power": lambda t: 0.95 - 0.3 * t**-0.4,
    "exponential": lambda t: 0.95 - 0.4 * np.exp(-0.3 * (t - 1)),
    "logarithmic": lambda t: 0.97 - 0.2 / np.log(t + 1),
    "Weibull": lambda t: 0.96 - 0.5 * np.exp(-((0.4 * t) ** 0.6)),
    "loss": lambda t: 0.05 + 1.5 * t**-1.1,
    "still": lambda t: 0.9 + 0 * t,
}


def epochs(count):
    return np.arange(1.0, count + 1)


@pytest.mark.parametrize("law", LAWS)
def test_a_curve_without_noise_is_continued(law):
    curve = LAWS[law]
    found = extrapolate(curve(epochs(12)), 24, least=0)
    drop = abs(curve(1.0) - curve(24.0))
    assert found.value == pytest.approx(curve(24.0), abs=0.03 * drop + 1e-6)
    # Other laws nearly fit as well: without noise, that is all that is not known.
    assert found.low - 0.01 * drop - 1e-6 <= curve(24.0) <= found.high + 0.01 * drop + 1e-6
    assert found.chance_above(curve(24.0) + 0.1) < 0.05 < 0.95 < found.chance_above(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_95_percent_intervals_hold_what_is_measured_later(law):
    generator, held, widths = np.random.default_rng(1), 0, []
    for _ in range(30):
        measured = LAWS[law](epochs(8)) + 0.003 * generator.standard_normal(8)
        later = LAWS[law](16.0) + 0.003 * generator.standard_normal()
        found = extrapolate(measured, 16, least=0)
        held += found.low <= later <= found.high
        widths.append(found.high - found.low)
    # 28 or 29 are expected where a rate lies on the grid, and somewhat fewer elsewhere.
    assert held >= 24
    # And they say something: the curves rise by a third or more.
    assert np.median(widths) < 0.25


def test_shapes_fall_from_one_to_nothing():
    for weight, shape in laws(10):
        values = shape(np.array([1.0, 2.0, 10.0, 1e9]))
        assert values[0] == pytest.approx(1) and weight > 0
        assert (np.diff(values) <= 0).all() and 0 <= values[-1] < 0.2


@settings(max_examples=20)
@given(st.floats(0.5, 2.0), st.floats(-3.0, 3.0))
def test_a_forecast_moves_with_the_scale_of_the_values(scale, shift):
    measured = LAWS["power"](epochs(8)) + 0.01 * np.sin(7 * epochs(8))
    plain, moved = extrapolate(measured, 16), extrapolate(scale * measured + shift, 16)
    assert moved.value == pytest.approx(scale * plain.value + shift, abs=2e-3 * scale)
    assert moved.high - moved.low == pytest.approx(scale * (plain.high - plain.low), rel=0.05)


def test_bounds_are_kept_and_draws_repeat():
    measured = LAWS["slow power"](epochs(6))
    found = extrapolate(measured, 100, least=0, most=0.9)
    assert found.high <= 0.9
    assert np.array_equal(found.draws, extrapolate(measured, 100, least=0, most=0.9).draws)


@pytest.mark.parametrize(
    ("values", "epoch", "message"),
    [
        ([0.1, 0.2, 0.3], 10, "3 values: give 5 or more"),
        ([0.1, 0.2, float("nan"), 0.3, 0.4], 10, "finite"),
        ([0.1, 0.2, 0.3, 0.35, 0.4], 3, "epoch 3 is not after the 5 values"),
    ],
)
def test_what_cannot_be_extrapolated(values, epoch, message):
    with pytest.raises(UserError, match=message):
        extrapolate(values, epoch)
