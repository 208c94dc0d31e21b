"""The Fréchet distance: closed forms, symmetries, and what it must grow with."""

import numpy as np
import pytest

from cnnjax.errors import UserError
from cnnjax.tasks.frechet import Moments, frechet_distance, from_products, moments, products


def features(seed=0, num_examples=500, size=6):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(size, size))
    return generator.normal(size=(num_examples, size)) @ mixing + 3.0


def test_moments_are_those_of_numpy():
    found = moments(features().astype(np.float32))
    np.testing.assert_allclose(found.mean, features().mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(features().T), rtol=1e-5, atol=1e-6)
    assert found.mean.dtype == found.covariance.dtype == np.float64


def test_diagonal_gaussians_have_a_closed_form():
    """The sum over axes of (m1 - m2)^2 + (s1 - s2)^2."""
    s1, s2 = np.array([1.0, 2.0, 0.0]), np.array([0.5, 3.0, 2.0])
    m1, m2 = np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0, -2.0])
    one, other = Moments(m1, np.diag(s1**2), 10), Moments(m2, np.diag(s2**2), 10)
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    np.testing.assert_allclose(frechet_distance(one, other), expected, rtol=1e-12)


def test_the_root_of_the_product_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    one, other = moments(features(1)), moments(1.5 * features(2)[:, ::-1])
    root = linalg.sqrtm(one.covariance @ other.covariance).real
    expected = np.square(one.mean - other.mean).sum() + np.trace(
        one.covariance + other.covariance - 2 * root
    )
    np.testing.assert_allclose(frechet_distance(one, other), expected, rtol=1e-9)


def test_a_set_is_at_no_distance_from_itself_in_any_order():
    whole = features()
    shuffled = np.random.default_rng(3).permutation(whole)
    assert frechet_distance(moments(whole), moments(whole)) < 1e-10
    assert frechet_distance(moments(whole), moments(shuffled)) < 1e-10


def test_distance_is_symmetric_also_where_a_covariance_is_singular():
    flat = features(1) * np.array([1, 1, 1, 0, 0, 0])
    for other in (features(2), flat[:, ::-1]):
        there = frechet_distance(moments(flat), moments(other))
        back = frechet_distance(moments(other), moments(flat))
        np.testing.assert_allclose(there, back, rtol=1e-9)
        assert there > 1


def test_noise_grows_the_distance_and_rotation_does_not():
    whole, other = features(1), features(2)
    noise = np.random.default_rng(3).normal(size=whole.shape)
    distances = [
        frechet_distance(moments(whole + scale * noise), moments(other))
        for scale in (0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert distances == sorted(distances) and distances[-1] > 10 * distances[0]
    rotation, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(6, 6)))
    np.testing.assert_allclose(
        frechet_distance(moments(whole @ rotation), moments(other @ rotation)),
        distances[0],
        rtol=1e-9,
    )


def test_two_samples_of_one_distribution_come_nearer_as_they_grow():
    distances = []
    for size in (200, 20000):
        one, other = (moments(features(seed, num_examples=size)) for seed in (1, 2))
        distances.append(frechet_distance(one, other))
    assert 0 < distances[1] < distances[0] / 10


def test_products_add_up_to_the_moments_without_the_padding():
    whole = features(num_examples=40).astype(np.float32)
    padded = np.concatenate([whole, np.full((8, 6), np.nan, np.float32)])
    mask = np.arange(48) < 40
    parts = [
        np.asarray(products(padded[rows], mask[rows]), np.float64)
        for rows in (slice(0, 30), slice(30, 48))
    ]
    found, expected = from_products(parts[0] + parts[1]), moments(whole)
    assert found.num_examples == 40
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-4, atol=1e-4)


def test_what_has_no_covariance_has_no_distance():
    good = moments(features())
    for bad in (features()[:1], np.full((4, 6), np.nan)):
        assert np.isnan(frechet_distance(moments(bad), good))
        assert np.isnan(frechet_distance(good, from_products(products(bad, np.ones(len(bad))))))
    with pytest.raises(UserError, match=r"\[examples, features\]"):
        moments(np.ones(3))


def test_features_of_two_networks_are_refused():
    with pytest.raises(UserError, match="one network"):
        frechet_distance(moments(features()), moments(features()[:, :5]))
