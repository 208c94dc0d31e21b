"""Augmentation: identities, known results, independence of keys, devices and transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from scipy import ndimage

from cnnjax.augment import geometry, pixels, sampling
from cnnjax.augment.change import apply_per_image, compose
from cnnjax.errors import UserError

STRONG = {
    "shift": geometry.random_shift(3),
    "crop": geometry.pad_and_crop(3),
    "flip": geometry.random_flip(),
    "affine": geometry.random_affine(30, (0.7, 1.4), 2.5, 20),
    "affine_fill": geometry.random_affine(30, (0.7, 1.4), 2.5, 20, fill=0.0),
    "composed": compose(geometry.random_flip(), geometry.random_affine(10)),
}
IDENTITIES = {
    "shift": geometry.random_shift(0),
    "crop": geometry.pad_and_crop(0),
    "flip": geometry.random_flip(0.0),
    "affine": geometry.random_affine(),
    "affine_fill": geometry.random_affine(fill=0.0),
    "composed": compose(),
}
KEY = jax.random.key(0)


def image(height=9, width=12, channels=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (height, width, channels))


def several(function, picture, count=200):
    keys = jax.random.split(KEY, count)
    return np.asarray(jax.jit(jax.vmap(function, (0, None)))(keys, picture))


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_at_zero_magnitude(name):
    for shape in ((28, 27, 2), (1, 5, 1)):
        picture = image(*shape)
        assert (jax.jit(IDENTITIES[name])(KEY, picture) == picture).all()


@pytest.mark.parametrize("name", STRONG)
def test_pure_and_fit_for_transforms(name):
    function, picture = STRONG[name], image()
    keys = jax.random.split(KEY, 20)
    many = several(function, picture, 20)
    assert many.shape == (20, *picture.shape) and many.dtype == np.float32
    assert len(np.unique(many, axis=0)) > 1
    # Between pixels the last bits of a coordinate change the result a little.
    _, scanned = jax.lax.scan(lambda _, key: (None, function(key, picture)), None, keys)
    np.testing.assert_allclose(scanned, many, atol=1e-4)


def test_linear_in_the_image():
    keys = jax.random.split(KEY, 20)
    for name in ("crop", "affine", "affine_fill"):
        apply = jax.jit(jax.vmap(STRONG[name], (0, None)))
        first, second = image(seed=1), image(seed=2)
        np.testing.assert_allclose(
            apply(keys, 3.0 * first - second),
            3.0 * apply(keys, first) - apply(keys, second),
            atol=1e-4,
        )


def test_gradient_matches_finite_differences():
    picture, weights = image(5, 6, 1), image(5, 6, 1, seed=1)

    @jax.jit
    def loss(x):
        return jnp.sum(STRONG["affine"](KEY, x) * weights)

    check_grads(loss, (picture,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_examples_are_independent_of_the_batch_and_of_the_devices():
    pictures = jax.random.normal(KEY, (16, 9, 12, 2))
    function = STRONG["affine"]
    whole = jax.jit(lambda x: apply_per_image(KEY, x, function))(pictures)
    apply = jax.jit(lambda x, first: apply_per_image(KEY, x, function, first))
    for first in (0, 4, 12):
        part = apply(pictures[first : first + 4], first)
        np.testing.assert_allclose(part, whole[first : first + 4], atol=1e-5)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(pictures, NamedSharding(mesh, PartitionSpec("data")))
    sharded = jax.jit(lambda x: apply_per_image(KEY, x, function))(spread)
    assert not sharded.sharding.is_fully_replicated
    np.testing.assert_allclose(sharded, whole, atol=1e-5)
    assert not np.allclose(whole[0] - pictures[0], whole[1] - pictures[1])


def test_shift_moves_by_whole_pixels_with_equal_chance():
    picture = jnp.zeros((11, 11, 1)).at[5, 5].set(1.0)
    moved = several(geometry.random_shift(1), picture, 1800)
    rows, columns = np.nonzero(moved.reshape(1800, 11, 11))[1:]
    assert len(rows) == 1800 and set(rows) == set(columns) == {4, 5, 6}
    counts = np.histogram2d(rows, columns, bins=3)[0]
    # 200 are expected in each of nine cells; the deviation of a count is 13.
    assert np.abs(counts - 200).max() < 70


def test_fill_and_border():
    bright = jnp.full((8, 8, 1), 3.0)
    assert (several(geometry.random_shift(4), bright, 50) == 3.0).all()
    assert set(np.unique(several(geometry.pad_and_crop(4), bright, 50))) == {0.0, 3.0}
    turned = several(geometry.random_affine(45), bright, 20)
    np.testing.assert_allclose(turned, 3.0, rtol=1e-6)
    assert several(geometry.random_affine(45, fill=-1.0), bright, 20).min() == -1.0


def test_flip_mirrors_half_of_the_images():
    picture = image()
    flipped = several(geometry.random_flip(), picture, 400)
    mirrored = (flipped == np.asarray(picture)[:, ::-1]).all((1, 2, 3))
    same = (flipped == np.asarray(picture)).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250
    assert (geometry.random_flip(1.0)(KEY, picture) == picture[:, ::-1]).all()


def test_bilinear_sampling_against_scipy():
    picture = image(9, 12, 2)
    rng = np.random.default_rng(0)
    y, x = rng.uniform(-3, 11, (2, 7, 8)).astype(np.float32)
    for fill, mode in ((None, "nearest"), (0.5, "grid-constant")):
        found = sampling.sample_bilinear(picture, jnp.asarray(y), jnp.asarray(x), fill=fill)
        expected = np.stack(
            [
                ndimage.map_coordinates(
                    np.asarray(picture)[..., channel], [y, x], order=1, mode=mode, cval=fill or 0
                )
                for channel in range(2)
            ],
            axis=-1,
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


def centroid(pictures):
    """(x, y) of each image's center of mass, from the image's center."""
    pictures = pictures[..., 0]
    mass = pictures.sum((1, 2))
    height, width = pictures.shape[1:]
    y = (pictures.sum(2) @ (np.arange(height) - (height - 1) / 2)) / mass
    x = (pictures.sum(1) @ (np.arange(width) - (width - 1) / 2)) / mass
    return np.stack([x, y], axis=-1)


def blob(x, y, size=41):
    """A smooth spot, `x` right of and `y` below the center."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    return jnp.asarray(np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8.0))[..., None]


def test_rotation_keeps_the_radius_within_the_angle():
    places = centroid(several(geometry.random_affine(30, fill=0.0), blob(10, 0)))
    np.testing.assert_allclose(np.hypot(*places.T), 10.0, atol=0.05)
    angles = np.degrees(np.arctan2(places[:, 1], places[:, 0]))
    assert 28 < np.abs(angles).max() <= 30.1
    assert angles.min() < -20 and angles.max() > 20


def test_scale_is_log_uniform_within_its_bounds():
    places = centroid(several(geometry.random_affine(scale=(0.5, 1.6), fill=0.0), blob(8, 0), 400))
    factors = places[:, 0] / 8.0
    assert 0.49 < factors.min() < 0.55 and 1.5 < factors.max() < 1.61
    # The median of a log-uniform variable is the geometric mean of its bounds.
    assert np.median(factors) == pytest.approx(np.sqrt(0.5 * 1.6), abs=0.07)


def test_translation_stays_within_its_bound():
    places = centroid(several(geometry.random_affine(translation_pixels=5, fill=0.0), blob(0, 0)))
    assert 4.5 < np.abs(places).max() <= 5.001
    assert np.abs(places.mean(0)).max() < 0.8


def test_shear_leans_vertical_lines():
    function = geometry.random_affine(shear_degrees=20, fill=0.0)
    places = centroid(several(function, blob(0, 10)))
    np.testing.assert_allclose(places[:, 1], 10.0, atol=0.02)
    leans = np.degrees(np.arctan2(places[:, 0], places[:, 1]))
    assert 17 < np.abs(leans).max() <= 20.1


def test_normalize():
    stored = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (stored / 255.0 - mean) / std
    for images in (jnp.asarray(stored), jnp.asarray(stored / 255.0, jnp.float32)):
        found = pixels.normalize(images, mean, std)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(pixels.normalize(stored, 0.0, 1.0), stored / 255.0, atol=1e-7)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (geometry.random_shift, {"max_pixels": -1}, "max_pixels=-1: give a magnitude of 0 or more"),
        (geometry.random_shift, {"max_pixels": 1.5}, "max_pixels=1.5: give a whole number"),
        (geometry.random_flip, {"probability": 1.5}, "probability=1.5"),
        (geometry.random_affine, {"rotation_degrees": -3}, "rotation_degrees=-3"),
        (geometry.random_affine, {"scale": (0.0, 1.0)}, r"scale=\(0.0, 1.0\)"),
        (geometry.random_affine, {"scale": (1.1, 0.9)}, r"scale=\(1.1, 0.9\)"),
        (geometry.random_affine, {"shear_degrees": 90}, "shear_degrees=90: give less than 90"),
    ],
)
def test_wrong_magnitudes(factory, arguments, message):
    with pytest.raises(UserError, match=message):
        factory(**arguments)
