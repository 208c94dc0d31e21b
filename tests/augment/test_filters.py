"""Filters against SciPy and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from cnnjax.augment import filters
from cnnjax.errors import UserError

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.normal(size=(11, 13, 2)).astype(np.float32)
BYTES = GENERATOR.integers(0, 256, (11, 13, 2)).astype(np.uint8)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_median_and_mean_against_scipy(size):
    window = (size, size, 1)
    median = jax.jit(lambda image: filters.median_filter(image, size))
    for image in (IMAGE, BYTES):
        expected = ndimage.median_filter(image, size=window, mode="nearest")
        np.testing.assert_array_equal(median(jnp.asarray(image)), expected)
    np.testing.assert_allclose(
        filters.mean_filter(jnp.asarray(IMAGE), size),
        ndimage.uniform_filter(IMAGE, size=window, mode="nearest"),
        atol=1e-5,
    )


@settings(max_examples=20)
@given(st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_the_median_of_any_odd_number_of_values(half, seed):
    values = np.random.default_rng(seed).integers(0, 9, (2 * half + 1, 50))
    np.testing.assert_array_equal(filters._median(list(values)), np.median(values, axis=0))


def test_gaussian_by_its_definition():
    deviation = 1.3
    found = filters.gaussian_filter(jnp.asarray(IMAGE), deviation)
    expected = IMAGE.astype(np.float64)
    for axis in (0, 1):
        size = IMAGE.shape[axis]
        distance = np.subtract.outer(np.arange(size), np.arange(size))
        weights = np.exp(-(distance**2) / (2 * deviation**2))
        weights /= weights.sum(1, keepdims=True)
        expected = np.moveaxis(np.tensordot(weights, expected, (1, axis)), 0, axis)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Away from the border it is SciPy's.
    inner = filters.gaussian_filter(jnp.asarray(np.pad(IMAGE, ((9, 9), (9, 9), (0, 0)))), 1.3)
    scipys = ndimage.gaussian_filter(
        np.pad(IMAGE, ((9, 9), (9, 9), (0, 0))), (1.3, 1.3, 0), truncate=8
    )
    np.testing.assert_allclose(inner[9:-9, 9:-9], scipys[9:-9, 9:-9], atol=1e-5)


def test_a_gaussian_of_nothing_is_the_image_and_has_a_gradient():
    np.testing.assert_array_equal(filters.gaussian_filter(jnp.asarray(IMAGE), 0.0), IMAGE)
    np.testing.assert_array_equal(filters.gaussian_filter(jnp.asarray(BYTES), 0.0), BYTES)
    slope = jax.grad(lambda d: jnp.sum(filters.gaussian_filter(jnp.asarray(IMAGE), d) ** 2))(1.0)
    assert np.isfinite(slope) and slope < 0


def test_the_median_removes_salt_and_pepper():
    clean = np.full((20, 20, 1), 0.4, np.float32)
    noisy = clean.copy()
    noisy[3::6, 3::6] = 1.0
    noisy[5::6, 4::6] = 0.0
    np.testing.assert_array_equal(filters.median_filter(jnp.asarray(noisy), 3), clean)


def test_filters_by_name_of_batches():
    images = jnp.asarray(np.stack([BYTES, BYTES[::-1]]))
    assert filters.make_filter("") is None
    assert filters.filter_images(images, None) is images
    found = filters.filter_images(images, filters.make_filter("median:3"))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found[1], filters.median_filter(images[1], 3))
    assert filters.make_filter("gaussian:1.5")(images[0]).shape == BYTES.shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("medain:3", "unknown filter 'medain': did you mean median"),
        ("median", r"'size'. Write it as median\(size\)"),
        ("median:4", "a window of size=4|odd number"),
        ("median:99", "a window of size=99|at most 31"),
        ("mean:-1", "odd number"),
        ("gaussian:-1", "0 pixels or more"),
        ("gaussian:wide", "deviation='wide': give a number"),
    ],
)
def test_wrong_filters(text, message):
    with pytest.raises(UserError, match=message):
        filters.make_filter(text)
