"""Means, intervals and tables of many small runs."""

import math

import pytest

from cnnjax.studies import tables


def test_the_interval_is_students():
    # Mean 3, standard deviation sqrt(2.5), and 2.7764 for four degrees of freedom.
    mean, half = tables.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-5))
    assert math.isnan(tables.mean_interval([0.5])[1])
    assert tables.mean_interval([0.25, 0.25]) == (0.25, 0.0)


def trial(method, labels, seed, accuracy, source=0.5, rate=0.01):
    return {
        "method": method,
        "labels": labels,
        "seed": seed,
        "learning_rate": rate,
        "accuracy": accuracy,
        "source_accuracy": source,
        "step_secs": 0.001 * (seed + 1),
        "trained_parameters": 50,
        "checkpoint_bytes": 2000,
        "peak_bytes": 3_000_000,
    }


def test_rows_are_means_over_seeds_and_the_tables_say_them():
    trials = [trial("head", 1, seed, 0.5 + 0.1 * seed) for seed in range(3)]
    trials += [trial("scratch", 1, seed, 0.25, source=None) for seed in range(3)]
    trials.append(trial("head", 10, 0, 0.9))
    rows = tables.summarize(trials)
    assert [(row["method"], row["labels"], row["seeds"]) for row in rows] == [
        ("head", 1, 3),
        ("scratch", 1, 3),
        ("head", 10, 1),
    ]
    assert rows[0]["accuracy"] == pytest.approx(0.6)
    assert rows[0]["accuracy_interval"] == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert rows[0]["step_secs"] == 0.002
    assert rows[1]["source_accuracy"] is None
    text = tables.markdown(rows, source_accuracy=0.975, all_parameters=1000)
    assert "| `head` | 60.00 ± 24.84 | 90.00 (seeds: 1) |" in text
    assert "| `scratch` | 25.00 ± 0.00 |  |" in text
    assert "(before: 97.50)" in text
    assert "| `head` | 0.01 | 50 | 5.0% | 2 | 1.00 | 3.0 |" in text


def test_a_sweep_marks_the_best_rate_of_each_method():
    trials = [trial("head", 10, 0, a, rate=r) for r, a in ((0.1, 0.5), (0.01, 0.75))]
    trials += [trial("scratch", 10, 0, a, rate=r) for r, a in ((0.1, 0.5), (0.01, 0.25))]
    text = tables.sweep_markdown(trials, 10)
    assert "| method | 0.01 | 0.1 |" in text
    assert "| `head` | **75.00** | 50.00 |" in text
    assert "| `scratch` | 25.00 | **50.00** |" in text
