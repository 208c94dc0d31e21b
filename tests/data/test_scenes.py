"""Scenes of digits: deterministic, of one split's digits, ignored exactly where ink overlaps."""

import numpy as np
import pytest

from cnnjax.data import scenes
from cnnjax.data.dataset import Arrays, make_dataset
from cnnjax.errors import UserError


def squares(labels, side=28):
    """Digits that are full of ink, so that what overlaps is known."""
    image = np.full((len(labels), side, side, 1), 255, np.uint8)
    return Arrays(image, np.array(labels, np.int32))


@pytest.fixture(scope="module")
def digits():
    """Not real ones: strokes of random width and place."""
    generator = np.random.default_rng(0)
    image = np.zeros((40, 28, 28, 1), np.uint8)
    for index in range(40):
        top, left = generator.integers(2, 16, 2)
        image[index, top : top + 10, 4:24] = 255
        image[index, 4:24, left : left + 4] = 255
    return Arrays(image, np.arange(40, dtype=np.int32) % 10)


def test_scenes_are_images_and_maps_of_bytes(digits):
    found = scenes.digit_scenes(digits, 5, seed=0)
    assert found["image"].shape == (5, 64, 64, 1)
    assert found["class_map"].shape == (5, 64, 64)
    assert {array.dtype for array in found.values()} == {np.dtype("uint8")}
    assert set(np.unique(found["class_map"])) <= {*range(11), scenes.IGNORE}


def test_scenes_are_a_function_of_seed_name_and_number(digits):
    first = scenes.digit_scenes(digits, 300, seed=3)
    again = scenes.digit_scenes(digits, 280, seed=3)
    for key in first:
        np.testing.assert_array_equal(first[key][:280], again[key])
    for other in (
        scenes.digit_scenes(digits, 280, seed=4),
        scenes.digit_scenes(digits, 280, seed=3, name="test"),
    ):
        same = np.all(other["image"] == again["image"], axis=(1, 2, 3))
        assert not same.any()
    # Nor does a block of scenes repeat the one before.
    assert not np.array_equal(first["image"][256], first["image"][0])


def test_splits_share_no_digits():
    """Each split's digits have labels of their own here, which its class maps may show alone."""
    splits = {
        "train": squares([0, 1, 2, 3] * 5),
        "validation": squares([4, 5, 6] * 5),
        "test": squares([7, 8, 9] * 5),
    }
    dataset = make_dataset("squares", list("0123456789"), splits)
    found = scenes.scene_splits(dataset, {"train": 20, "validation": 10, "test": 10})
    classes = {
        split: set(np.unique(arrays["class_map"])) - {0, scenes.IGNORE}
        for split, arrays in found.items()
    }
    assert classes == {"train": {1, 2, 3, 4}, "validation": {5, 6, 7}, "test": {8, 9, 10}}
    assert {split: len(arrays["image"]) for split, arrays in found.items()} == {
        "train": 20,
        "validation": 10,
        "test": 10,
    }


def test_pixels_are_ignored_exactly_where_ink_overlaps(monkeypatch):
    """Two squares at known places: their classes, what both cover, and ground elsewhere."""

    def place(generator, side, size):
        shape = (scenes.BLOCK, scenes.MOST_DIGITS)
        top, left = np.full(shape, 4.0), np.full(shape, 10.0)
        top[:, 1], left[:, 1] = 20.0, 26.0
        side[:] = 28.0
        return top, left

    monkeypatch.setattr(scenes, "_places", place)
    monkeypatch.setattr(scenes, "MOST_DIGITS", 2)
    class_map = scenes.digit_scenes(squares([6]), 1, seed=0)["class_map"][0]
    expected = np.zeros((64, 64), np.uint8)
    expected[4:32, 10:38] = 7
    expected[20:48, 26:54] = 7
    expected[20:32, 26:38] = scenes.IGNORE
    np.testing.assert_array_equal(class_map, expected)


def test_ink_is_brighter_than_ground_on_average(digits):
    found = scenes.digit_scenes(digits, 100, seed=0)
    ink = (found["class_map"] > 0) & (found["class_map"] < scenes.IGNORE)
    image = found["image"][..., 0]
    assert image[ink].mean() > 2 * image[found["class_map"] == 0].mean()
    # Ground is textured in every scene.
    ground = np.where(found["class_map"] == 0, image.astype(float), np.nan)
    assert np.nanstd(ground, axis=(1, 2)).min() > 5


def test_digits_are_of_random_number_and_size(digits):
    class_map = scenes.digit_scenes(digits, 200, seed=0)["class_map"]
    numbers = [len(set(np.unique(one)) - {0, scenes.IGNORE}) for one in class_map]
    assert 1 <= min(numbers) <= 2
    assert max(numbers) == scenes.MOST_DIGITS


def test_resampling_at_the_old_size_is_a_shift():
    (matrix,) = scenes._resampling(np.array([3.0]), np.array([4.0]), 4, 9)
    expected = np.zeros((9, 4))
    expected[range(3, 7), range(4)] = 1
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


@pytest.mark.parametrize("side", [20.0, 24.5, 36.0])
def test_resampling_keeps_flat_ink_flat(side):
    """The ink of a full row is the fraction of each pixel that the row covers."""
    (matrix,) = scenes._resampling(np.array([10.25]), np.array([side]), 28, 64)
    edges = np.arange(65)
    covered = np.clip(edges[1:], 10.25, 10.25 + side) - np.clip(edges[:-1], 10.25, 10.25 + side)
    np.testing.assert_allclose(matrix.sum(axis=1), covered, atol=1e-5)


def test_no_digits_and_small_scenes_are_refused(digits):
    with pytest.raises(UserError, match="no digits to compose test scenes"):
        scenes.digit_scenes(squares([]), 3, seed=0, name="test")
    with pytest.raises(UserError, match="scenes of 32 pixels are too small: give at least 36"):
        scenes.digit_scenes(digits, 3, seed=0, size=32)
