"""Which examples are held out: proportions by class, and what is said of classes and copies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.data import held_out, load
from cnnjax.data.held_out import absent_classes, draw, held_per_class
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator


@settings(max_examples=200)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 9))
def test_classes_are_held_out_in_proportion(counts, share, seed):
    counts = np.array(counts)
    total = counts.sum()
    if total < 2:
        return
    held = min(max(1, round(share * total)), total - 1)
    taken = held_per_class(counts, held, numpy_generator(seed, "x"))
    assert taken.sum() == held and (taken >= 0).all() and (taken <= counts).all()
    if held <= np.maximum(counts - 1, 0).sum():
        # Something of each class is left to train on.
        assert (taken[counts > 0] < counts[counts > 0]).all()
        if held >= np.count_nonzero(counts > 1):
            assert (taken[counts > 1] > 0).all()


def test_equal_remainders_are_drawn_by_the_seed():
    counts = np.full(10, 9)
    draws = {tuple(held_per_class(counts, 9, numpy_generator(seed, "x"))) for seed in range(20)}
    assert len(draws) > 5
    assert all(sorted(taken) == [0] + [1] * 9 for taken in draws)
    # By largest remainders: 24, 48 and 28 of 100 are 2.4, 4.8 and 2.8 of 10.
    taken = held_per_class(np.array([24, 48, 28]), 10, numpy_generator(0, "x"))
    assert taken.tolist() == [2, 5, 3]


def test_draws_are_of_the_seed_alone():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    for is_stratified in (False, True):
        first, again, other = (
            draw(labels, 0.1, numpy_generator(seed, "x"), is_stratified=is_stratified)
            for seed in (0, 0, 1)
        )
        assert first.sum() == other.sum() == 10
        assert (first == again).all() and (first != other).any()
    assert np.bincount(labels[first]).tolist() == [5, 3, 2]


def test_absent_classes_are_named():
    names = [*"abcdefg"]
    labels = {"train": np.arange(1, 7), "validation": np.array([], int), "test": np.array([1, 2])}
    assert absent_classes(labels, names) == [
        "no training images of 'a': the network cannot learn it",
        "no test images of 'a', 'd', 'e' and 2 more classes: the test scores say nothing about "
        "them",
    ]


@given(
    labels=st.lists(st.integers(0, 3), min_size=7, max_size=60),
    count=st.integers(2, 7),
    seed=st.integers(0, 3),
    is_stratified=st.booleans(),
)
def test_folds_hold_each_example_once_and_each_class_evenly(labels, count, seed, is_stratified):
    labels = np.array(labels)
    folds = np.array(
        [
            held_out.draw_fold(labels, f"{number}/{count}", seed, is_stratified=is_stratified)
            for number in range(1, count + 1)
        ]
    )
    assert (folds.sum(0) == 1).all()
    assert np.ptp(folds.sum(1)) <= 1
    if is_stratified:
        for label in range(4):
            assert np.ptp(folds[:, labels == label].sum(1)) <= 1


def test_a_fold_is_the_validation_split_and_leaves_the_test_split_alone():
    folds = [load("digits", fold=f"{number}/4", seed=1) for number in (1, 2, 3, 4)]
    whole = load("digits", validation=0)
    assert all((each.test.image == whole.test.image).all() for each in folds)
    sizes = [len(each.validation.label) for each in folds]
    assert sum(sizes) == len(whole.train.label) and max(sizes) - min(sizes) <= 1
    assert all(
        len(each.train.label) + size == len(whole.train.label)
        for each, size in zip(folds, sizes, strict=True)
    )


@pytest.mark.parametrize("fold", ["5", "0/5", "6/5", "1/1", "a/b"])
def test_what_is_no_fold(fold):
    with pytest.raises(UserError, match="fold"):
        load("digits", fold=fold)
