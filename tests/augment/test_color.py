"""Colors and AutoAugment's transformations, against Pillow and the standard library."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnnjax.augment import color, randaugment
from cnnjax.errors import UserError

GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(20, 220, (24, 20, 3)).astype(np.uint8)
PICTURE = Image.fromarray(BYTES)
FLOATS = jnp.asarray(BYTES / 255.0, jnp.float32)

ENHANCERS = [
    (color.adjust_brightness, ImageEnhance.Brightness),
    (color.adjust_contrast, ImageEnhance.Contrast),
    (color.adjust_saturation, ImageEnhance.Color),
    (randaugment.sharpen, ImageEnhance.Sharpness),
]
EXACT = [
    (lambda x: randaugment.posterize(x, 3), lambda p: ImageOps.posterize(p, 3)),
    (lambda x: randaugment.solarize(x, 100 / 255), lambda p: ImageOps.solarize(p, 100)),
    (randaugment.equalize, ImageOps.equalize),
]


@pytest.mark.parametrize(("ours", "theirs"), ENHANCERS)
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
def test_enhancements_against_pillow(ours, theirs, factor):
    found = 255.0 * np.asarray(jax.jit(ours)(FLOATS, factor))
    expected = np.asarray(theirs(PICTURE).enhance(factor), np.float32)
    # Pillow rounds the gray it blends with, and then the result: to whole numbers, or down.
    np.testing.assert_allclose(found, expected, atol=1.0 + max(1.0, factor))


@pytest.mark.parametrize(("ours", "theirs"), EXACT)
def test_transformations_against_pillow(ours, theirs):
    found = np.round(255.0 * np.asarray(jax.jit(ours)(FLOATS)))
    np.testing.assert_array_equal(found, np.asarray(theirs(PICTURE)))


def test_equalize_of_few_values_against_pillow():
    few = (BYTES // 64 * 64)[..., :1]
    found = np.round(255.0 * np.asarray(randaugment.equalize(jnp.asarray(few / 255.0))))
    np.testing.assert_array_equal(found[..., 0], np.asarray(ImageOps.equalize(_gray(few))))
    constant = jnp.full((5, 5, 1), 0.25)
    np.testing.assert_allclose(randaugment.equalize(constant), constant, atol=1 / 255)


def _gray(array):
    return Image.fromarray(array[..., 0])


def test_autocontrast_against_pillow():
    found = 255.0 * np.asarray(randaugment.autocontrast(FLOATS))
    np.testing.assert_allclose(found, np.asarray(ImageOps.autocontrast(PICTURE)), atol=1.0)
    constant = jnp.full((4, 4, 3), 0.3)
    np.testing.assert_array_equal(randaugment.autocontrast(constant), constant)


@pytest.mark.parametrize("turns", [-0.4, 0.0, 0.1, 1 / 3])
def test_hue_against_colorsys(turns):
    found = np.asarray(jax.jit(color.adjust_hue)(FLOATS, turns)).reshape(-1, 3)
    for ours, pixel in zip(found[::7], np.asarray(FLOATS).reshape(-1, 3)[::7], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*map(float, pixel))
        expected = colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_third_of_a_turn_makes_red_green():
    red = jnp.zeros((2, 2, 3)).at[..., 0].set(0.8)
    np.testing.assert_allclose(color.adjust_hue(red, 1 / 3)[0, 0], [0, 0.8, 0], atol=1e-6)


def test_gray_images_have_no_color_and_other_channels_are_refused():
    gray = FLOATS[..., :1]
    np.testing.assert_array_equal(color.adjust_hue(gray, 0.3), gray)
    np.testing.assert_array_equal(color.adjust_saturation(gray, 0.0), gray)
    with pytest.raises(UserError, match="an image of 2 channels has no colors"):
        color.adjust_hue(FLOATS[..., :2], 0.1)


@pytest.mark.slow
def test_operations_of_a_policy_are_equally_likely_and_have_their_strength():
    """Of a policy of one operation: each image is one of the 14 results."""
    image = jnp.asarray(GENERATOR.uniform(0.2, 0.8, (12, 12, 3)), jnp.float32)
    policy = jax.jit(jax.vmap(randaugment.rand_augment(1, 15.0), (0, None)))
    many = np.asarray(policy(jax.random.split(jax.random.key(0), 1500), image))
    strength, half = 15 / 30, 0.9 / 2
    results = {
        "identity": image,
        "darker": color.adjust_brightness(image, 1 - half),
        "brighter": color.adjust_brightness(image, 1 + half),
        "paler": color.adjust_saturation(image, 1 - half),
        "flatter": color.adjust_contrast(image, 1 - half),
        "softer": randaugment.sharpen(image, 1 - half),
        "posterize": randaugment.posterize(image, 6),
        "solarize": randaugment.solarize(image, 256 / 255 * (1 - strength)),
        "equalize": randaugment.equalize(image),
        "autocontrast": randaugment.autocontrast(image),
    }
    for name, expected in results.items():
        seen = np.isclose(many, np.asarray(expected), atol=1e-5).all((1, 2, 3)).mean()
        # One of 14; those with a direction one of 28. Deviations are below 0.007.
        share = 1 / 28 if name.endswith("er") else 1 / 14
        assert seen == pytest.approx(share, abs=0.03), name
