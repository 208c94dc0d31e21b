"""The examples in docstrings say what the functions return: those that the API pages show."""

import doctest
import importlib

import pytest

# Module -> how many lines its examples have at least.
EXAMPLES = {
    "cnnjax.augment.policy": 4,
    "cnnjax.data.sources": 2,
    "cnnjax.losses": 2,
    "cnnjax.metrics": 2,
    "cnnjax.models": 3,
    "cnnjax.optim": 4,
    "cnnjax.rng": 4,
    "cnnjax.schedules": 15,
    "cnnjax.train.state": 3,
    "cnnjax.train.step": 9,
    "cnnjax.trees": 1,
}
SLOW = ("cnnjax.train.step",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXAMPLES],
)
def test_examples_of_docstrings_are_true(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted >= EXAMPLES[name]
    assert results.failed == 0
