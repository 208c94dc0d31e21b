"""Is one setting better than another? Over seeds, and over the examples of a test set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

POWER = 0.8


class Paired(NamedTuple):
    """Two settings over the same seeds.

    Attributes:
      difference: mean of second minus first.
      half_interval: half the width of Student's 95% interval of the difference.
      p_value: of the paired t-test, two-sided: how likely so large a difference is without any.
      seeds_needed: to find a difference as large as this with a probability of 80% at a level of
        5%; None where there is none, or where the pairs do not scatter.
    """

    difference: float
    half_interval: float
    p_value: float
    seeds_needed: int | None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares the scores of two settings, seed by seed (Student 1908).

    Args:
      first, second: a score for each seed, in the same order.

    Raises:
      UserError: fewer than two pairs, or numbers that differ.
    """
    if len(first) != len(second) or len(first) < 2:
        raise UserError(
            f"{len(first)} and {len(second)} scores: give the same two seeds or more of both"
        )
    from scipy import stats

    differences = [other - one for one, other in zip(first, second, strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return Paired(mean, 0.0, 1.0 if mean == 0 else 0.0, None)
    count = len(differences)
    half = float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Paired(mean, half, p_value, seeds_needed(mean, spread))


def resampled(
    first: Sequence[float], second: Sequence[float] | None = None, *, held_share: float
) -> Paired:
    """The mean over the folds of a cross-validation, or the difference of two settings over them.

    Folds share training examples, so that their scores are not independent: the variance is that of
    Nadeau & Bengio 2003 (Machine Learning 52), `(1 / folds + held / trained) s^2`, for one round of
    folds or several.

    Args:
      first: a score for each fold.
      second: of another setting on the same folds; None gives the mean of `first` itself.
      held_share: of the examples, those that are validated on: 1 / folds.

    Raises:
      UserError: fewer than two folds, or numbers that differ.
    """
    if second is None:
        first, second = [0.0] * len(first), first
    if len(first) != len(second) or len(first) < 2:
        raise UserError(f"{len(first)} and {len(second)} scores: give the same two folds or more")
    from scipy import stats

    differences = [other - one for one, other in zip(first, second, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) * math.sqrt(1 / count + held_share / (1 - held_share))
    half = float(stats.t.ppf(0.975, count - 1)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return Paired(mean, half, p_value, None)


def seeds_needed(difference: float, spread: float, *, most: int = 100_000) -> int | None:
    """Returns how many pairs a paired t-test needs to find a difference.

    At a level of 5%, two-sided, with a probability of 80%, by the noncentral t distribution.

    Args:
      difference: the true mean difference.
      spread: the standard deviation of the differences.
      most: what is not looked beyond; None then.
    """
    if difference == 0 or spread <= 0:
        return None
    from scipy import stats

    def power(count: int) -> float:
        noncentrality = abs(difference) / spread * math.sqrt(count)
        critical = stats.t.ppf(0.975, count - 1)
        return float(
            stats.nct.sf(critical, count - 1, noncentrality)
            + stats.nct.cdf(-critical, count - 1, noncentrality)
        )

    low, high = 1, 2
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Returns how likely it is that two networks differ on so many examples by chance alone.

    McNemar 1947, the exact test: of the examples that one of them alone gets right, half should be
    the first's.

    Args:
      first, second: bool `[examples]`: which are right.
    """
    from scipy import stats

    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape:
        raise UserError(f"{first.shape} and {second.shape}: both must be of the same examples")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def bootstrap_interval(
    values: np.ndarray, *, seed: int = 0, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns the interval of the mean of a test set's examples, by the percentile bootstrap.

    Efron 1979: the mean over as many examples, drawn with replacement, again and again.

    Args:
      values: a number for each example `[examples]`, such as whether it is right.
      seed: of the draws.
      draws: how many.
      confidence: the share of the draws that lie within.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise UserError(f"values of shape {values.shape}: give one for each example")
    generator = numpy_generator(seed, "bootstrap")
    count = len(values)
    found, counts = np.unique(values, return_counts=True)
    if len(found) <= 16:
        # The numbers of each value are multinomial: much faster than drawing examples.
        means = generator.multinomial(count, counts / count, draws) @ found / count
    else:
        means = np.array([values[generator.integers(0, count, count)].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
