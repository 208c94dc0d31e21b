"""Learning-rate schedules: step -> learning rate.

A schedule is a pure function of the step (an integer, traced or not) and returns a float scalar; of
an array of steps, the array of their learning rates.
Each factory below takes the peak `learning_rate`, `total_steps` (the length of the run, warmup
included) and `warmup_steps`, and has two phases:

- warmup, steps 0 to `warmup_steps`: a straight line from 0 to the schedule's first value;
- the schedule proper, over the T = total_steps - warmup_steps steps that are left; the formulas
  are in t = step - warmup_steps.

From `total_steps` on, the last value stays.

>>> schedule = make_schedule("cosine", 0.1, total_steps=1000, warmup_steps=100)
>>> [round(float(schedule(step)), 4) for step in (0, 50, 100, 550, 1000)]
[0.0, 0.05, 0.1, 0.05, 0.0]
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cnnjax import spec
from cnnjax.errors import UserError

Schedule = Callable[[ArrayLike], jax.Array]


def constant(learning_rate: float, *, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """The same learning rate throughout.

        learning_rate

    >>> schedule = constant(0.1, total_steps=100, warmup_steps=10)
    >>> [round(float(schedule(step)), 4) for step in (0, 5, 10, 100)]
    [0.0, 0.05, 0.1, 0.1]

    Args:
      learning_rate: the learning rate after warmup.
      total_steps: steps of the whole run.
      warmup_steps: steps of the linear rise from 0, from 0 to `total_steps`.

    Raises:
      UserError: an argument out of its range.
    """
    _steps_after_warmup(learning_rate, total_steps, warmup_steps)
    return _with_warmup(optax.constant_schedule(learning_rate), total_steps, warmup_steps)


def step(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    boundaries: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> Schedule:
    """Multiplied by `factor` at each boundary.

        learning_rate * factor^(number of boundaries b with step >= round(b * total_steps))

    The defaults are those of He et al. 2016, "Deep Residual Learning for Image Recognition",
    section 4.2: 64k iterations, divided by 10 at 32k and at 48k.

    >>> schedule = step(0.1, total_steps=64_000)
    >>> [round(float(schedule(s)), 4) for s in (0, 31_999, 32_000, 47_999, 48_000)]
    [0.1, 0.1, 0.01, 0.01, 0.001]

    Args:
      learning_rate: the learning rate before the first boundary.
      total_steps: steps of the whole run.
      warmup_steps: steps of the linear rise from 0.
      boundaries: fractions of the whole run, between 0 and 1, rising.
      factor: positive.

    Raises:
      UserError: an argument out of its range.
    """
    _steps_after_warmup(learning_rate, total_steps, warmup_steps)
    _require(factor > 0, "factor", factor, "must be positive")
    rising = all(first < second for first, second in itertools.pairwise(boundaries))
    inside = all(0 < boundary < 1 for boundary in boundaries)
    _require(rising and inside, "boundaries", boundaries, "must rise and lie between 0 and 1")
    scales: dict[int, float] = {}
    for boundary in boundaries:
        after_warmup = round(boundary * total_steps) - warmup_steps
        scales[after_warmup] = scales.get(after_warmup, 1.0) * factor
    main = optax.piecewise_constant_schedule(learning_rate, scales)
    return _with_warmup(main, total_steps, warmup_steps)


def exponential(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    decay_rate: float = 0.01,
    decay_steps: int | None = None,
    staircase: bool = False,
) -> Schedule:
    """Multiplied by `decay_rate` every `decay_steps` steps, smoothly or in stairs.

        learning_rate * decay_rate^(t / decay_steps)

    where `staircase` rounds the exponent down.

    >>> schedule = exponential(0.1, total_steps=100)
    >>> [round(float(schedule(step)), 4) for step in (0, 50, 100)]
    [0.1, 0.01, 0.001]
    >>> schedule = exponential(0.1, total_steps=100, decay_rate=0.5, decay_steps=10, staircase=True)
    >>> [round(float(schedule(step)), 4) for step in (0, 9, 10, 20)]
    [0.1, 0.1, 0.05, 0.025]

    Args:
      learning_rate: the learning rate after warmup.
      total_steps: steps of the whole run.
      warmup_steps: steps of the linear rise from 0.
      decay_rate: in (0, 1].
      decay_steps: 1 or more; None for all steps after warmup, so that the run ends at
        `learning_rate * decay_rate`.
      staircase: whether to change only at multiples of `decay_steps`.

    Raises:
      UserError: an argument out of its range.
    """
    steps_left = _steps_after_warmup(learning_rate, total_steps, warmup_steps)
    decay_steps = steps_left if decay_steps is None else decay_steps
    _require(0 < decay_rate <= 1, "decay_rate", decay_rate, "must be in (0, 1]")
    _require(decay_steps >= 1, "decay_steps", decay_steps, "must be 1 or more")
    main = optax.exponential_decay(learning_rate, decay_steps, decay_rate, staircase=staircase)
    return _with_warmup(main, total_steps, warmup_steps)


def cosine(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    end_factor: float = 0.0,
    cycles: int = 1,
) -> Schedule:
    """Half a cosine, from the learning rate down to `end_factor` times it; again in each cycle.

        learning_rate * (end_factor + (1 - end_factor) * (1 + cos(pi u / C)) / 2)

    where C = ceil(T / cycles) are the steps of a cycle and u = t mod C. Loshchilov and Hutter 2017,
    "SGDR: Stochastic Gradient Descent with Warm Restarts", section 3, equation (5); with several
    cycles, equation (2) of Huang et al. 2017, "Snapshot Ensembles: Train 1, Get M for Free".

    >>> schedule = cosine(0.1, total_steps=100, warmup_steps=20, end_factor=0.1)
    >>> [round(float(schedule(step)), 4) for step in (0, 10, 20, 60, 100)]
    [0.0, 0.05, 0.1, 0.055, 0.01]
    >>> schedule = cosine(0.1, total_steps=100, cycles=2)
    >>> [round(float(schedule(step)), 4) for step in (0, 25, 50, 75, 100)]
    [0.1, 0.05, 0.1, 0.05, 0.0]

    Args:
      learning_rate: the learning rate after warmup.
      total_steps: steps of the whole run.
      warmup_steps: steps of the linear rise from 0.
      end_factor: last learning rate as a fraction of the first, in [0, 1].
      cycles: from 1 to the steps after warmup.

    Raises:
      UserError: an argument out of its range.
    """
    steps_left = _steps_after_warmup(learning_rate, total_steps, warmup_steps)
    _require(0 <= end_factor <= 1, "end_factor", end_factor, "must be in [0, 1]")
    allowed = 1 <= cycles <= steps_left and float(cycles).is_integer()
    _require(allowed, "cycles", cycles, f"must be a whole number from 1 to {steps_left}")
    cycle_steps = -(-steps_left // int(cycles))
    half = optax.cosine_decay_schedule(learning_rate, cycle_steps, alpha=end_factor)

    def main(step: Any) -> jax.Array:
        # The last value of a cycle is reached at the end of the last one only.
        return half(jnp.where(step >= steps_left, cycle_steps, step % cycle_steps))

    return _with_warmup(half if cycles == 1 else main, total_steps, warmup_steps)


def polynomial(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    power: float = 1.0,
    end_factor: float = 0.0,
) -> Schedule:
    """A power of the fraction of steps left; a straight line by default.

        learning_rate * (end_factor + (1 - end_factor) * (1 - t / T)^power)

    >>> schedule = polynomial(0.1, total_steps=100)
    >>> [round(float(schedule(step)), 4) for step in (0, 25, 100)]
    [0.1, 0.075, 0.0]
    >>> schedule = polynomial(0.1, total_steps=100, power=2.0)
    >>> [round(float(schedule(step)), 4) for step in (0, 50, 100)]
    [0.1, 0.025, 0.0]

    Args:
      learning_rate: the learning rate after warmup.
      total_steps: steps of the whole run.
      warmup_steps: steps of the linear rise from 0.
      power: positive.
      end_factor: last learning rate as a fraction of the first, in [0, 1].

    Raises:
      UserError: an argument out of its range.
    """
    steps_left = _steps_after_warmup(learning_rate, total_steps, warmup_steps)
    _require(power > 0, "power", power, "must be positive")
    _require(0 <= end_factor <= 1, "end_factor", end_factor, "must be in [0, 1]")
    end = learning_rate * end_factor
    main = optax.polynomial_schedule(learning_rate, end, power, steps_left)
    return _with_warmup(main, total_steps, warmup_steps)


def one_cycle(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    peak_fraction: float = 0.3,
    start_factor: float = 0.04,
    end_factor: float = 4e-6,
) -> Schedule:
    """Half a cosine up to the learning rate, then half a cosine down to almost nothing.

    With P = floor(peak_fraction * T), first value a = learning_rate * start_factor and last value
    b = learning_rate * end_factor:

        a + (learning_rate - a) * (1 - cos(pi t / P)) / 2                     t < P
        b + (learning_rate - b) * (1 + cos(pi (t - P) / (T - P))) / 2         t >= P

    Smith and Topin 2018, "Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates"; with cosines for its lines, and the defaults, as in PyTorch's `OneCycleLR`. The
    cycle warms up by itself: `warmup_steps` only precede it with a line from 0 to a.

    >>> schedule = one_cycle(0.1, total_steps=100)
    >>> [round(float(schedule(step)), 4) for step in (0, 15, 30, 65, 100)]
    [0.004, 0.052, 0.1, 0.05, 0.0]

    Args:
      learning_rate: the highest learning rate.
      total_steps: steps of the whole run.
      warmup_steps: steps of the linear rise from 0 to a.
      peak_fraction: where the peak is, as a fraction of the steps after warmup, in [0, 1).
      start_factor: a as a fraction of the learning rate, in [0, 1].
      end_factor: b as a fraction of the learning rate, in [0, 1].

    Raises:
      UserError: an argument out of its range.
    """
    steps_left = _steps_after_warmup(learning_rate, total_steps, warmup_steps)
    _require(0 <= peak_fraction < 1, "peak_fraction", peak_fraction, "must be in [0, 1)")
    for name, value in (("start_factor", start_factor), ("end_factor", end_factor)):
        _require(0 <= value <= 1, name, value, "must be in [0, 1]")
    rise_steps = int(peak_fraction * steps_left)
    # Not `optax.cosine_onecycle_schedule`, which takes no array of steps, as curves are drawn from.
    distance = optax.cosine_decay_schedule(learning_rate * (1 - start_factor), max(1, rise_steps))
    fall = optax.cosine_decay_schedule(learning_rate, steps_left - rise_steps, alpha=end_factor)
    main = optax.join_schedules([lambda step: learning_rate - distance(step), fall], [rise_steps])
    return _with_warmup(main, total_steps, warmup_steps)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "step": step,
    "exponential": exponential,
    "cosine": cosine,
    "polynomial": polynomial,
    "one_cycle": one_cycle,
}
# What the program says of every schedule.
SHARED = ("learning_rate", "total_steps", "warmup_steps")


def make_schedule(
    name: str, learning_rate: float, *, total_steps: int, warmup_steps: int = 0, **options: Any
) -> Schedule:
    """Returns the schedule of that name.

    >>> schedule = make_schedule("polynomial", 0.1, total_steps=100, power=2.0)
    >>> round(float(schedule(50)), 4)
    0.025

    Args:
      name: a key of `SCHEDULES`, perhaps with its arguments, such as `cosine(cycles=3)`.
      learning_rate: the peak, 0 or more.
      total_steps: steps of the whole run, warmup included; 1 or more.
      warmup_steps: steps of the linear rise from 0, from 0 to `total_steps`.
      **options: arguments of that schedule, besides those.

    Raises:
      UserError: an unknown name or option, or an argument out of its range.
    """
    item = spec.extend(spec.parse_one(name, "schedule"), options, "schedule")
    return spec.call(
        item,
        SCHEDULES,
        "schedule",
        learning_rate=learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )


def read_schedule(text: str, further: Iterable[str] = ()) -> tuple[str, dict[str, Any]]:
    """Returns the name and the options that a text such as `cosine(cycles=3)` gives, checked.

    Args:
      text: a key of `SCHEDULES`, perhaps with options.
      further: more options, each a text such as `end_factor=0.1`.

    Raises:
      UserError: an unknown name or option, or a value of another type.
    """
    item = spec.extend(spec.parse_one(text, "schedule"), spec.arguments(further), "schedule")
    return item.name, spec.bind(item, SCHEDULES, "schedule", supplied=SHARED).keywords


def _steps_after_warmup(learning_rate: float, total_steps: int, warmup_steps: int) -> int:
    """Checks what all schedules share; returns T, at least 1 so that no formula divides by 0."""
    if isinstance(learning_rate, int | float):  # an array may be traced, as when `vmap` sweeps it
        allowed = 0 <= learning_rate < math.inf
        _require(allowed, "learning_rate", learning_rate, "must be finite and not negative")
    for name, steps, least in (("total_steps", total_steps, 1), ("warmup_steps", warmup_steps, 0)):
        allowed = float(steps).is_integer() and steps >= least
        _require(allowed, name, steps, f"must be a whole number from {least} on")
    _require(
        warmup_steps <= total_steps,
        "warmup_steps",
        warmup_steps,
        f"must not exceed total_steps, which is {total_steps}",
    )
    return max(1, int(total_steps) - int(warmup_steps))


def _require(allowed: bool, name: str, value: Any, rule: str) -> None:
    if not allowed:
        raise UserError(f"{name} {rule}; it is {value}.")


def _with_warmup(main: optax.Schedule, total_steps: int, warmup_steps: int) -> Schedule:
    """Puts the linear rise before `main` and the last value after `total_steps`."""

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.minimum(step, total_steps)
        learning_rate = main(step - warmup_steps)
        if warmup_steps:
            rise = main(0) * (step / warmup_steps)
            learning_rate = jnp.where(step < warmup_steps, rise, learning_rate)
        learning_rate = jnp.asarray(learning_rate, jnp.result_type(float))
        return jnp.broadcast_to(learning_rate, jnp.shape(step))

    return schedule
