"""A few labels of each class."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from cnnjax import data
from cnnjax.data.dataset import Arrays, make_dataset
from cnnjax.errors import UserError


def dataset(sizes=(5, 9, 7)):
    """Images whose only pixel is their number, classes in turn."""
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    image = np.arange(len(label), dtype=np.uint8).reshape(-1, 1, 1, 1)
    train = Arrays(image, label.astype(np.int32))
    names = [f"class {n}" for n in range(len(sizes))]
    return make_dataset("tiny", names, {"train": train, "test": train}, validation=0)


def test_each_class_has_so_many_and_nothing_else_changes():
    whole = dataset()
    few = data.few_labels(whole, 4, seed=3)
    np.testing.assert_array_equal(np.bincount(few.train.label), [4, 4, 4])
    rows = few.train.image.ravel()
    np.testing.assert_array_equal(whole.train.label[rows], few.train.label)
    assert list(rows) == sorted(set(rows))
    assert (few.test, few.validation) == (whole.test, whole.validation)
    assert (few.mean, few.std) == (whole.mean, whole.std)
    assert few.checksum != whole.checksum


def test_the_choice_depends_on_the_seed_and_grows_with_the_number():
    whole = dataset((40, 40))
    chosen = {
        (seed, count): set(data.few_labels(whole, count, seed=seed).train.image.ravel())
        for seed in (0, 1)
        for count in (3, 10)
    }
    assert chosen[0, 3] < chosen[0, 10]
    assert chosen[0, 10] != chosen[1, 10]
    again = data.few_labels(whole, 10, seed=1).train.image.ravel()
    assert set(again) == chosen[1, 10]


def test_all_of_the_smallest_class_is_the_most():
    assert len(data.few_labels(dataset(), 5, seed=0).train.label) == 15
    with pytest.raises(UserError, match=r"6 labels .* class 0 of tiny has 5 training images"):
        data.few_labels(dataset(), 6, seed=0)
    with pytest.raises(UserError, match="0 labels per class: use at least 1"):
        data.few_labels(dataset(), 0, seed=0)


def test_streamed_data_are_refused():
    streamed = SimpleNamespace(**dataclasses.asdict(dataset()))
    with pytest.raises(UserError, match="streamed from disk: use the pipeline 'resident'"):
        data.few_labels(streamed, 1, seed=0)
