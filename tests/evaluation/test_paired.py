"""Whether one setting is better than another."""

import math

import numpy as np
import pytest
from scipy import stats

from cnnjax.errors import UserError
from cnnjax.evaluation import comparison


def test_paired_is_students_test():
    first, second = [0.95, 0.96, 0.94, 0.97], [0.96, 0.98, 0.95, 0.975]
    result = comparison.paired(first, second)
    assert result.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert result.p_value == pytest.approx(stats.ttest_rel(second, first).pvalue)
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert result.half_interval == pytest.approx((high - low) / 2)
    assert comparison.paired(first, first).p_value == 1
    with pytest.raises(UserError, match="two seeds or more"):
        comparison.paired([0.9], [0.8])


def test_so_many_seeds_find_the_difference_in_four_of_five_cases():
    count = comparison.seeds_needed(0.5, 1.0)
    # Cohen 1988, table 2.3: 33 or 34 pairs for a difference of half a standard deviation.
    assert count == 34
    differences = np.random.default_rng(0).normal(0.5, 1.0, (4000, count))
    found = stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05
    assert abs(found.mean() - 0.8) < 0.02
    assert comparison.seeds_needed(0.0, 1.0) is None
    assert comparison.seeds_needed(1e-6, 1.0) is None


def test_mcnemar_counts_what_only_one_gets_right():
    first = np.array([True] * 90 + [True] * 8 + [False] * 2)
    second = np.array([True] * 90 + [False] * 8 + [True] * 2)
    # Of ten coins, two or fewer, or eight or more: 2 (1 + 10 + 45) / 1024.
    assert comparison.mcnemar(first, second) == pytest.approx(112 / 1024)
    assert comparison.mcnemar(first, first) == 1
    with pytest.raises(UserError, match="same examples"):
        comparison.mcnemar(first, second[:3])


@pytest.mark.parametrize("many", [False, True])
def test_bootstrap_is_the_normal_interval_of_many_examples(many):
    values = np.random.default_rng(1).random(4000)
    values = values if many else (values < 0.9).astype(float)
    low, high = comparison.bootstrap_interval(values, draws=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=half / 10)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert comparison.bootstrap_interval(values) == comparison.bootstrap_interval(values)


def test_folds_share_examples_and_so_scatter_less_than_they_should():
    first, second = [0.91, 0.93, 0.92, 0.90, 0.94], [0.93, 0.94, 0.95, 0.92, 0.95]
    naive = comparison.paired(first, second)
    result = comparison.resampled(first, second, held_share=1 / 5)
    # Nadeau & Bengio 2003: 1/5 + 1/4 in the place of 1/5.
    assert result.half_interval == pytest.approx(naive.half_interval * math.sqrt(2.25))
    assert result.difference == pytest.approx(naive.difference)
    assert result.p_value > naive.p_value
    alone = comparison.resampled(first, held_share=1 / 5)
    assert alone.difference == pytest.approx(0.92)
    assert comparison.resampled(first, first, held_share=1 / 5).difference == 0
