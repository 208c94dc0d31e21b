"""The corruptions of ImageNet-C: each against SciPy, Pillow, Matplotlib or a formula."""

import inspect
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

from cnnjax import augment, data
from cnnjax.augment import corruption_blurs as blurs
from cnnjax.augment import corruption_weather as weather
from cnnjax.augment import corruptions, jpeg
from cnnjax.errors import UserError

KEY = jax.random.key(0)
# Some of the numbers are for tuning alone, or bend the plane less where they crumple it more.
NOT_ORDERED = {"elastic_transform", "saturate", "spatter", "glass_blur", "frost"}


def picture(height=30, width=44, channels=3):
    """Something with edges and slopes, float in [0, 1]."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    waves = [np.sin(9 * rows * (k + 1)) * np.cos(7 * columns) for k in range(channels)]
    image = 0.5 + 0.3 * np.stack(waves, -1) + 0.2 * (rows + columns > 1.1)[..., None]
    return np.clip(image, 0, 1).astype(np.float32)


@pytest.mark.parametrize("numbers", [corruptions.SMALL, corruptions.LARGE])
def test_all_nineteen_have_numbers_for_five_severities(numbers):
    assert (len(corruptions.COUNTED), len(corruptions.EXTRA)) == (15, 4)
    assert set(numbers) == set(corruptions.NAMES)
    for name, rows in numbers.items():
        assert len(rows) == 5
        taken = len(inspect.signature(corruptions.FUNCTIONS[name]).parameters) - 2
        assert {len(row) for row in rows} == {taken}


@pytest.mark.parametrize(("border", "theirs"), [("nearest", "nearest"), ("symmetric", "reflect")])
def test_smoothing_is_scipys(border, theirs):
    row = np.random.default_rng(0).random(9)
    for deviation in (0.05, 0.7, 6.0):
        matrix = blurs.smoothing_matrix(9, deviation, border=border, truncate=3.0)
        expected = scipy.ndimage.gaussian_filter1d(row, deviation, mode=theirs, truncate=3.0)
        np.testing.assert_allclose(matrix @ row, expected, atol=1e-6)


def test_zoom_is_scipys():
    image = picture(28, 28, 1)
    for factor in (1.01, 1.25, 1.75):
        part = int(np.ceil(28 / factor))
        start = (28 - part) // 2
        middle = image[start : start + part, start : start + part, 0]
        large = scipy.ndimage.zoom(middle, factor, order=1)
        cut = (len(large) - 28) // 2
        expected = large[cut : cut + 28, cut : cut + 28]
        np.testing.assert_allclose(blurs.zoomed(image, factor)[..., 0], expected, atol=1e-5)


def test_a_small_disk_is_its_softness_alone():
    side = np.exp(-0.5 / 0.4**2) / (1 + 2 * np.exp(-0.5 / 0.4**2))
    row = np.array([side, 1 - 2 * side, side])
    np.testing.assert_allclose(blurs.disk(0.3, 0.4), np.outer(row, row), atol=1e-9)
    large = blurs.disk(6, 0.5)
    assert large.sum() == pytest.approx(1)
    np.testing.assert_allclose(large, large.T)
    # Soft at the edge, even within.
    assert large[len(large) // 2, 3] == pytest.approx(1 / 113)


def test_motion_smears_a_point_to_one_side():
    image = jnp.zeros((5, 30, 1)).at[2, 20].set(1.0)
    result = blurs.smeared(image, 4, 2.0, jnp.float32(0.0))
    weights = np.exp(-0.5 * np.square(np.arange(9) / 2.0))
    expected = np.zeros(30)
    expected[12:21] = (weights / weights.sum())[::-1]
    np.testing.assert_allclose(result[2, :, 0], expected, atol=1e-6)
    assert float(jnp.abs(jnp.delete(result, 2, axis=0)).max()) == 0
    # Of a constant image nothing changes, whatever the angle.
    np.testing.assert_allclose(
        blurs.smeared(0 * image + 0.3, 4, 2.0, jnp.float32(0.7)), 0.3, rtol=1e-5
    )


def test_glass_copies_neighbors_one_after_another():
    image = picture(8, 7, 1)
    result = blurs.glass_blur(KEY, image, 0.05, 2, 2)
    expected = np.floor(255 * image) / 255
    places = [(h, w) for _ in range(2) for h in range(6, 2, -1) for w in range(5, 2, -1)]
    for (h, w), (down, right) in zip(
        places, np.asarray(jax.random.randint(KEY, (len(places), 2), -2, 2)), strict=True
    ):
        expected[h, w] = expected[h + down, w + right]
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("factor", [0.95, 0.6, 0.25])
def test_pixelate_is_pillows(factor):
    image = picture()
    size = int(44 * factor), int(30 * factor)
    stored = Image.fromarray(np.round(255 * image).astype(np.uint8))
    expected = np.asarray(stored.resize(size, Image.BOX).resize((44, 30), Image.BOX)) / 255
    result = corruptions.pixelate(KEY, image, factor)
    np.testing.assert_allclose(result, expected, atol=3 / 255)


@pytest.mark.parametrize("quality", [80, 25, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(quality, channels):
    """Within rounding: a coefficient on the border of two steps is rounded to either."""
    stored = np.round(255 * picture(channels=channels)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(stored.squeeze()).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).reshape(stored.shape).astype(float)
    result = 255 * np.asarray(jpeg.jpeg_compression(KEY, stored / np.float32(255), quality))
    error = np.abs(result - expected)
    assert error.mean() < 0.55
    assert (error > 3.5).mean() < 0.06
    assert np.abs(expected - stored).mean() > 5 * error.mean()


def test_colors_change_as_in_hue_saturation_and_value():
    image = picture()
    image[0, 0] = 0
    hsv = rgb_to_hsv(image)
    brighter = hsv.copy()
    brighter[..., 2] = np.clip(hsv[..., 2] + 0.2, 0, 1)
    result = corruptions.brightness(KEY, image, 0.2)
    np.testing.assert_allclose(result, hsv_to_rgb(brighter), atol=1e-5)
    for factor, amount in corruptions.LARGE["saturate"]:
        changed = hsv.copy()
        changed[..., 1] = np.clip(hsv[..., 1] * factor + amount, 0, 1)
        result = corruptions.saturate(KEY, image, factor, amount)
        np.testing.assert_allclose(result, hsv_to_rgb(changed), atol=1e-4)


def test_contrast_keeps_the_mean_of_each_channel():
    image = picture()
    result = corruptions.contrast(KEY, image, 0.3)
    np.testing.assert_allclose(result.mean((0, 1)), image.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(result.std((0, 1)), 0.3 * image.std((0, 1)), rtol=1e-4)


def test_noises_have_their_moments():
    image = jnp.full((100, 100, 3), 0.4)
    shot = corruptions.shot_noise(KEY, image, 25)
    assert float(shot.mean()) == pytest.approx(0.4, abs=3e-3)
    assert float(shot.var()) == pytest.approx(0.4 / 25, rel=0.04)
    speckle = corruptions.speckle_noise(KEY, image, 0.2) / image
    assert float(speckle.std()) == pytest.approx(0.2, rel=0.03)
    impulse = np.asarray(corruptions.impulse_noise(KEY, image, 0.2))
    assert [(impulse == value).mean() for value in (0, 1)] == pytest.approx([0.1, 0.1], abs=0.01)


def test_a_plasma_without_noise_of_finer_grids_is_smooth():
    rough, smooth = (weather.plasma(KEY, 33, decay) for decay in (1.2, 4.0))
    for field in (rough, smooth):
        assert field.shape == (64, 64)
        assert (float(field.min()), float(field.max())) == (0, 1)
    assert float(jnp.abs(jnp.diff(smooth)).mean()) < 0.3 * float(jnp.abs(jnp.diff(rough)).mean())


@pytest.mark.slow
def test_depth_and_light_of_drops_are_scipys_and_opencvs():
    edge = np.random.default_rng(1).random((30, 25, 1)) < 0.01
    expected = scipy.ndimage.distance_transform_edt(~edge[..., 0])
    result = np.asarray(weather._distance(jnp.asarray(edge)))[..., 0]
    np.testing.assert_allclose(result, np.minimum(expected, 20), rtol=1e-5)
    values = np.array([3, 3, 7, 7, 7, 200])
    # OpenCV: (number up to the value - number of the lowest) / (all - number of the lowest).
    np.testing.assert_array_equal(
        weather._equalized(jnp.asarray(values)), [0, 0, 191, 191, 191, 255]
    )


def test_without_moves_elastic_is_the_image():
    image = picture()
    np.testing.assert_allclose(
        corruptions.elastic_transform(KEY, jnp.asarray(image), 0.0, 0.1, 0.0), image, atol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: augment.corruption("fogg"), "did you mean fog"),
        (lambda: augment.corruption("fog", 6), "1 to 5"),
        (lambda: augment.corruption("fog", 0), "1 to 5"),
        (lambda: augment.corruption("contrast")(KEY, jnp.zeros((4, 4, 2))), "2 channels"),
        (lambda: augment.make_augment("corruption:fgo:3", num_classes=10), "fog"),
    ],
)
def test_bad_input_is_one_clear_error(call, text):
    with pytest.raises(UserError, match=text):
        call()


def test_a_corruption_has_a_name_among_the_augmentations():
    image = data.load("mnist").test.image[:3]
    change = augment.make_augment("corruption:contrast:5", num_classes=10)
    changed = change(KEY, {"image": image}, 0)["image"]
    expected = corruptions.contrast(KEY, image[1] / np.float32(255), 0.15)
    np.testing.assert_allclose(changed[1] / 255, expected, atol=1 / 255)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", corruptions.NAMES)
def test_every_corruption_keeps_the_contract(name, channels):
    digits = data.load("mnist").test.image[:6]
    images = np.round(np.repeat(digits, channels, -1) * np.array([1, 0.8, 0.5])[:channels])
    images = images.astype(np.uint8)
    keys = jax.random.split(KEY, len(images))

    @jax.jit
    def all_severities(keys, images):
        functions = [augment.corruption(name, severity) for severity in corruptions.SEVERITIES]
        return jnp.stack([jax.vmap(function)(keys, images) for function in functions])

    changed = np.asarray(all_severities(keys, images))
    assert changed.dtype == np.uint8
    assert changed.shape == (5, *images.shape)
    alone = augment.corruption(name, 4)(keys[2], jnp.asarray(images[2]))
    # Rounding, and what is decided by it, may differ between two programs.
    different = np.abs(np.asarray(alone, float) - changed[3, 2]) > 1
    assert different.mean() < 0.01
    other = np.asarray(all_severities(keys[::-1], images))
    random = name not in (
        *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate"),
        *("jpeg_compression", "gaussian_blur", "saturate"),
    )
    assert (other != changed).any() == random
    distance = np.abs(changed - images.astype(float)).mean((1, 2, 3, 4))
    assert (distance[1:] > 0).all() or name == "saturate"
    if name not in NOT_ORDERED:
        assert scipy.stats.spearmanr(distance, corruptions.SEVERITIES).statistic > 0.85, distance
