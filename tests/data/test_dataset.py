"""Splits, classes and moments of a dataset in memory."""

import dataclasses
import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.data.dataset import (
    Arrays,
    channel_moments,
    hold_out,
    make_dataset,
    select_classes,
)
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

NAMES = tuple("0123456789")


def numbered(count, num_classes=10):
    """Images whose pixel is their number: who is where can be read off."""
    image = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return Arrays(image, (np.arange(count) % num_classes).astype(np.int32))


def numbers(arrays):
    return arrays.image.ravel().tolist()


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 4)))
def test_moments_are_numpys(image):
    mean, std = channel_moments(image)
    pixels = image / 255.0
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), atol=1e-12)
    expected = pixels.std((0, 1, 2))
    np.testing.assert_allclose(std, np.where(np.ptp(image, (0, 1, 2)) == 0, 1.0, expected))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 200), amount=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_hold_out_parts_are_disjoint_and_whole(count, amount, seed):
    held_count = round(amount * count)
    if not 0 < held_count < count:
        with pytest.raises(UserError, match="one side empty"):
            hold_out(numbered(count), amount, numpy_generator(seed, "x"))
        return
    rest, held = hold_out(numbered(count), amount, numpy_generator(seed, "x"))
    assert len(held.label) == held_count
    assert sorted(numbers(rest) + numbers(held)) == list(range(count))
    again = hold_out(numbered(count), amount, numpy_generator(seed, "x"))
    assert numbers(again[1]) == numbers(held)
    assert (rest.label == rest.image.ravel() % 10).all()


def test_validation_depends_on_the_seed_and_test_does_not():
    splits = [make_dataset("d", NAMES, {"train": numbered(100)}, seed=seed) for seed in (0, 0, 1)]
    for dataset in splits:
        parts = [numbers(part) for part in (dataset.train, dataset.validation, dataset.test)]
        assert sorted(itertools.chain(*parts)) == list(range(100))
        assert [len(part) for part in parts] == [81, 9, 10]
    assert splits[0].checksum == splits[1].checksum != splits[2].checksum
    assert numbers(splits[0].validation) != numbers(splits[2].validation)
    assert numbers(splits[0].test) == numbers(splits[2].test)


def test_own_splits_are_used():
    own = {name: numbered(size) for name, size in (("train", 50), ("validation", 20), ("test", 9))}
    dataset = make_dataset("d", NAMES, own, validation=0.5)
    sizes = [len(part.label) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [50, 20, 9]
    del own["test"]
    dataset = make_dataset("d", NAMES, own, validation=5)
    sizes = [len(part.label) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [45, 5, 20]


def test_all_images_may_train():
    dataset = make_dataset("d", NAMES, {"train": numbered(50), "test": numbered(9)}, validation=0)
    assert len(dataset.train.label) == 50
    assert dataset.validation.image.shape == (0, 1, 1, 1)


@pytest.mark.parametrize("validation", [-0.1, 1.5, -3, float("nan")])
def test_impossible_validation(validation):
    with pytest.raises(UserError, match="give a fraction of the training images below 1"):
        make_dataset("d", NAMES, {"train": numbered(50)}, validation=validation)


def test_selected_classes_are_relabeled():
    names, relabel = select_classes(NAMES, "8,3")
    dataset = make_dataset(
        "d", names, {"train": numbered(60), "test": numbered(20)}, relabel=relabel, validation=2
    )
    assert dataset.class_names == ("8", "3") and dataset.num_classes == 2
    for part in (dataset.train, dataset.validation, dataset.test):
        assert (np.array([8, 3])[part.label] == part.image.ravel() % 10).all()
    assert numbers(dataset.test) == [3, 8, 13, 18]


def test_parity():
    names, relabel = select_classes(NAMES, "even-odd")
    assert names == ("even", "odd")
    assert relabel.tolist() == [0, 1] * 5
    assert select_classes(NAMES, "all") == (NAMES, None)


def test_classes_by_name_come_before_labels():
    names, relabel = select_classes(("ten", "0", "seven"), "0,seven")
    assert names == ("0", "seven") and relabel.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("3", "at least two different classes"),
        ("3,3", "at least two different classes"),
        ("3,10", r"there is no class 10: the labels are 0\.\.9"),
        ("odd-even", "unknown class 'odd-even': did you mean even-odd"),
        ("", "unknown class ''"),
    ],
)
def test_wrong_classes(classes, message):
    with pytest.raises(UserError, match=message):
        select_classes(NAMES, classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.array([0, 10], np.int32)}, r"from 0 to 10, but there are 10 classes"),
        ({"label": np.array([-1, 1], np.int32)}, r"from -1 to 1"),
        ({"label": np.array([0, 1], np.int64)}, r"labels of d \(train\) are int64 \[2\]"),
        ({"label": np.array([0], np.int32)}, r"give int32 \[2\]"),
        ({"image": np.zeros((2, 3, 3, 1), np.float32)}, r"float32 \[2, 3, 3, 1\]: give uint8"),
        ({"image": np.zeros((2, 3, 3), np.uint8)}, r"uint8 \[2, 3, 3\]"),
    ],
)
def test_wrong_arrays(change, message):
    arrays = numbered(2)._replace(**change)
    with pytest.raises(UserError, match=message):
        make_dataset("d", NAMES, {"train": arrays})


def test_empty_split():
    empty = Arrays(np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int32))
    with pytest.raises(UserError, match="the test split of d is empty"):
        make_dataset("d", NAMES, {"train": numbered(50), "test": empty})


def test_checksum_sees_every_part():
    dataset = make_dataset("d", NAMES, {"train": numbered(50), "test": numbered(9)})
    label = dataset.test.label.copy()
    label[0] += 1
    changed = dataclasses.replace(dataset, test=dataset.test._replace(label=label))
    renamed = dataclasses.replace(dataset, class_names=NAMES[::-1])
    assert len({dataset.checksum, changed.checksum, renamed.checksum}) == 3
