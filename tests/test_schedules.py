"""Schedules at exact steps, by hand computation."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import schedules
from cnnjax.errors import UserError
from tests.transforms import Case, assert_covered, check_transforms


def _as_function_of_both(name):
    def learning_rate_at(learning_rate, step):
        factory = schedules.SCHEDULES[name]
        return factory(learning_rate, total_steps=40, warmup_steps=8)(step)

    return learning_rate_at


CASES = [
    *(Case(name, _as_function_of_both(name), (0.5, 7), (0,)) for name in schedules.SCHEDULES),
    Case("make_schedule", schedules.make_schedule("cosine", 0.5, total_steps=40), (20,)),
]


def test_every_public_function_has_a_case():
    assert_covered(schedules, CASES, exempt=("read_schedule",))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms(case):
    check_transforms(case)


def _values(schedule, steps):
    return [float(schedule(step)) for step in steps]


# Peak 2, 10 steps of warmup, 50 in all, so T = 40; values at steps 10, 20, 30 and 50.
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {}, [2, 2, 2, 2]),
        # Boundaries at steps 25 and 38.
        ("step", {}, [2, 2, 0.2, 0.02]),
        ("step", {"boundaries": (0.4,), "factor": 0.5}, [2, 1, 1, 1]),
        ("exponential", {}, [2, 2 * 0.01**0.25, 0.2, 0.02]),
        (
            "exponential",
            {"decay_rate": 0.5, "decay_steps": 8},
            [2, 2 * 0.5**1.25, 2 * 0.5**2.5, 2 / 32],
        ),
        (
            "exponential",
            {"decay_rate": 0.5, "decay_steps": 8, "staircase": True},
            [2, 1, 0.5, 2 / 32],
        ),
        ("cosine", {}, [2, 1 + math.sqrt(0.5), 1, 0]),
        ("cosine", {"end_factor": 0.25}, [2, 0.5 + 0.75 * (1 + math.sqrt(0.5)), 1.25, 0.5]),
        ("polynomial", {}, [2, 1.5, 1, 0]),
        ("polynomial", {"power": 2.0, "end_factor": 0.5}, [2, 1 + 0.75**2, 1.25, 1]),
        # a = 0.08, b = 8e-6, peak after 12 of 40 steps.
        (
            "one_cycle",
            {},
            [
                0.08,
                0.08 + 1.92 * (1 - math.cos(math.pi * 10 / 12)) / 2,
                8e-6 + (2 - 8e-6) * (1 + math.cos(math.pi * 8 / 28)) / 2,
                8e-6,
            ],
        ),
        (
            "one_cycle",
            {"peak_fraction": 0.5, "start_factor": 0.5, "end_factor": 0.1},
            [1, 1.5, 2, 0.2],
        ),
    ],
)
def test_values_at_exact_steps(name, options, expected):
    schedule = schedules.make_schedule(name, 2.0, total_steps=50, warmup_steps=10, **options)
    np.testing.assert_allclose(_values(schedule, (10, 20, 30, 50)), expected, rtol=2e-5, atol=1e-7)
    # Warmup is a line from 0 to the first value; the last value stays.
    np.testing.assert_allclose(
        _values(schedule, (0, 1, 5, 9)), np.array([0, 0.1, 0.5, 0.9]) * expected[0], rtol=1e-5
    )
    assert _values(schedule, (51, 1000)) == [_values(schedule, (50,))[0]] * 2


@pytest.mark.parametrize("name", sorted(schedules.SCHEDULES))
def test_bounded_and_nonnegative_at_any_length_and_for_many_steps_at_once(name):
    for total_steps, warmup_steps in ((1, 0), (1, 1), (2, 1), (9, 9), (10_000, 0), (10_000, 3)):
        schedule = schedules.make_schedule(
            name, 0.3, total_steps=total_steps, warmup_steps=warmup_steps
        )
        steps = np.linspace(0, total_steps, 101).astype(np.int32)
        values = np.asarray(schedule(steps))
        assert values.shape == (101,)
        np.testing.assert_allclose(values[17], schedule(steps[17]), rtol=1e-6)
        assert (values >= 0).all()
        assert (values <= np.float32(0.3) * (1 + 1e-6)).all()
        assert (values[0] == 0) == (warmup_steps > 0)


def test_a_boundary_within_warmup_has_already_dropped_when_warmup_ends():
    schedule = schedules.step(1.0, total_steps=100, warmup_steps=60)
    np.testing.assert_allclose(_values(schedule, (30, 60, 74, 75)), [0.05, 0.1, 0.1, 0.01])


def test_steps_of_long_runs_keep_their_precision():
    schedule = jax.jit(schedules.polynomial(1.0, total_steps=2_000_000))
    np.testing.assert_allclose(schedule(1_999_999), 1 / 2_000_000, rtol=0.1)


def test_values_are_scalars_of_the_default_float():
    for name in schedules.SCHEDULES:
        value = schedules.make_schedule(name, 1, total_steps=4, warmup_steps=2)(jnp.int32(1))
        assert value.shape == () and value.dtype == jnp.float32
        with jax.enable_x64(True):
            value = schedules.make_schedule(name, 1, total_steps=4, warmup_steps=2)(jnp.int32(1))
            assert value.dtype == jnp.float64


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin': did you mean cosine"),
        ({"learning_rate": -0.1}, "learning_rate must be finite and not negative; it is -0.1"),
        ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ({"total_steps": 0}, "total_steps must be a whole number from 1 on; it is 0"),
        ({"total_steps": 10.5}, "total_steps must be a whole number"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number from 0 on; it is -1"),
        (
            {"warmup_steps": 101},
            "warmup_steps must not exceed total_steps, which is 100; it is 101",
        ),
        ({"end_facto": 0.1}, "did you mean end_factor"),
        ({"end_factor": 1.5}, r"end_factor must be in \[0, 1\]; it is 1.5"),
        (
            {"name": "constant", "power": 2},
            r"'constant\(power=2\)': it takes no arguments",
        ),
        ({"name": "step", "boundaries": (0.5, 0.2)}, "boundaries must rise"),
        ({"name": "step", "boundaries": (30, 60)}, "between 0 and 1"),
        ({"name": "step", "factor": 0.0}, "factor must be positive"),
        ({"name": "exponential", "decay_rate": 0.0}, "decay_rate must be in"),
        ({"name": "exponential", "decay_steps": 0}, "decay_steps must be 1 or more"),
        ({"name": "polynomial", "power": -1.0}, "power must be positive"),
        ({"name": "one_cycle", "peak_fraction": 1.0}, "peak_fraction must be in"),
        ({"name": "one_cycle", "start_factor": -0.1}, "start_factor must be in"),
    ],
)
def test_bad_values_get_one_clear_error(arguments, text):
    valid = {"name": "cosine", "learning_rate": 0.1, "total_steps": 100, "warmup_steps": 0}
    with pytest.raises(UserError, match=text) as error:
        schedules.make_schedule(**(valid | arguments))
    assert "\n" not in str(error.value)


def test_one_cycle_rises_then_falls():
    values = _values(schedules.one_cycle(1.0, total_steps=20), range(21))
    assert all(one < other for one, other in itertools.pairwise(values[:7]))
    assert all(one > other for one, other in itertools.pairwise(values[6:]))


def test_a_cosine_of_several_cycles_is_so_many_cosines():
    """Huang et al. 2017, equation (2): each cycle starts at the peak and falls alike."""
    several = schedules.make_schedule("cosine", 0.1, total_steps=40, cycles=4)
    once = schedules.make_schedule("cosine", 0.1, total_steps=10)
    for step in range(40):
        assert float(several(step)) == pytest.approx(float(once(step % 10)), abs=1e-9)
    assert float(several(40)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="cycles must be a whole number from 1 to 40; it is 0"):
        schedules.make_schedule("cosine", 0.1, total_steps=40, cycles=0)
    with pytest.raises(UserError, match=r"schedule 'constant\(cycles=2\)': it takes no arguments"):
        schedules.make_schedule("constant", 0.1, total_steps=40, cycles=2)
