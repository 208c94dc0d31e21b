"""Every augmentation: identity at zero, range and dtype, keys, transforms, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.augment import corrupt, geometry, policy, randaugment
from cnnjax.augment.change import apply_per_image, compose
from cnnjax.errors import UserError
from cnnjax.rng import stream_key

KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(0, 256, (6, 12, 14, 3)).astype(np.uint8)
FLOATS = (BYTES / 255.0).astype(np.float32)

# Of each change (by its name in a policy): what does nothing, and what does much.
ZERO_AND_STRONG = {
    "flip": ("flip:0", "flip"),
    "shift": ("shift:0", "shift:3"),
    "crop": ("crop:0", "crop:3:reflect"),
    "resized_crop": ("resized_crop:1:1:1", "resized_crop"),
    "elastic": ("elastic:0", "elastic:20:2"),
    "brightness": ("brightness:0", "brightness:0.8"),
    "contrast": ("contrast:0", "contrast:0.8"),
    "saturation": ("saturation:0", "saturation:0.8"),
    "hue": ("hue:0", "hue:0.5"),
    "noise": ("noise:0", "noise:0.3"),
    "salt_and_pepper": ("salt_and_pepper:0", "salt_and_pepper:0.3"),
    "blur": ("blur:0", "blur:2"),
    "median": ("median:0", "median:0.7"),
    "erase": ("erase:0", "erase:0.7"),
    "cutout": ("cutout:0", "cutout:6"),
    "rotate": ("rotate:0", "rotate:30"),
    "scale": ("scale:0", "scale:0.3"),
    "translate": ("translate:0", "translate:3"),
    "shear": ("shear:0", "shear:20"),
}
AUTOMATIC = {
    "randaugment": ("randaugment:2:0", "randaugment:2:20"),
    "trivialaugment": ("trivialaugment:0", "trivialaugment"),
    "augmix": ("augmix:0", "augmix:5"),
}


def changed(texts, images, key=KEY):
    """Applies each policy to the images: all in one program, which compiles once."""
    changes = {text: compose(*policy.parse_policy(text).changes) for text in texts}

    @jax.jit
    def all_of_them(key, images):
        return {text: apply_per_image(key, images, change) for text, change in changes.items()}

    return jax.tree.map(np.asarray, all_of_them(key, images))


def check_zero(texts, images):
    for text, result in changed(texts, images).items():
        assert result.dtype == images.dtype
        # The hue of a pixel is computed and put back.
        tolerance = 1e-6 if text.startswith("hue") else 0.0
        np.testing.assert_allclose(result, images, atol=tolerance, rtol=0, err_msg=text)


def check_strong(texts):
    results, again = changed(texts, FLOATS), changed(texts, jnp.asarray(FLOATS))
    other = changed(texts, FLOATS, jax.random.key(1))
    for text, result in results.items():
        assert result.dtype == np.float32 and result.shape == FLOATS.shape
        assert result.min() >= 0 and result.max() <= 1, text
        assert (result != FLOATS).any() and (result != other[text]).any(), text
        np.testing.assert_array_equal(result, again[text])


def check_bytes(texts):
    of_floats, of_bytes = changed(texts, FLOATS), changed(texts, BYTES)
    for text, result in of_bytes.items():
        assert result.dtype == np.uint8
        off = np.abs(np.round(255 * of_floats[text]) - result)
        # Noise and thresholds see the same numbers, but for their last bits.
        assert (off <= 1).mean() > 0.999, text


def test_every_name_is_tried():
    # Corruptions have severities from 1, and tests of their own.
    names = {**policy.CHANGES, **policy.AFFINE}.keys() - {"corruption"}
    assert {**ZERO_AND_STRONG, **AUTOMATIC}.keys() == names


def zero_and_strong(table):
    return [zero for zero, _ in table.values()], [strong for _, strong in table.values()]


def test_identity_at_zero():
    check_zero(zero_and_strong(ZERO_AND_STRONG)[0], FLOATS)


@pytest.mark.slow
def test_bytes():
    zero, strong = zero_and_strong(ZERO_AND_STRONG)
    check_zero(zero, BYTES)
    check_bytes(strong)


def test_range_dtype_and_keys():
    check_strong(zero_and_strong(ZERO_AND_STRONG)[1])


@pytest.mark.slow
def test_automatic_policies():
    zero, strong = zero_and_strong(AUTOMATIC)
    check_zero(zero, FLOATS)
    check_zero(zero, BYTES)
    check_strong(strong)
    check_bytes(strong)


@pytest.mark.slow
@pytest.mark.parametrize("table", [ZERO_AND_STRONG, AUTOMATIC])
def test_alone_as_in_a_batch_and_gray_as_in_color(table):
    texts = zero_and_strong(table)[1]
    changes = {text: compose(*policy.parse_policy(text).changes) for text in texts}
    in_batch = changed(texts, FLOATS)

    @jax.jit
    def alone(key, image):
        return {text: change(key, image) for text, change in changes.items()}

    for index in (0, 5):
        results = alone(jax.random.fold_in(KEY, index), FLOATS[index])
        for text, result in results.items():
            # Where a position falls between pixels, its last bits show in the image.
            np.testing.assert_allclose(result, in_batch[text][index], atol=2e-4, err_msg=text)
    for text, gray in changed(texts, FLOATS[..., :1]).items():
        assert gray.shape == (6, 12, 14, 1) and gray.min() >= 0 and gray.max() <= 1, text


SMOOTH = {
    "noise": lambda x: policy.CHANGES["noise"](x),
    "brightness": lambda x: policy.CHANGES["brightness"](x),
    "contrast": lambda x: policy.CHANGES["contrast"](x),
    "saturation": lambda x: policy.CHANGES["saturation"](x),
    "hue": lambda x: policy.CHANGES["hue"](x),
    "blur": lambda x: policy.CHANGES["blur"](x),
    "elastic": lambda x: policy.CHANGES["elastic"](x, 2.0),
    "rotate": lambda x: geometry.random_affine(rotation_degrees=x),
    "translate": lambda x: geometry.random_affine(translation_pixels=x),
    "shear": lambda x: geometry.random_affine(shear_degrees=x),
    "scale": lambda x: geometry.random_affine(scale=(1.0, 1.0 + x)),
    "randaugment": lambda x: randaugment.rand_augment(1, x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_with_respect_to_a_traced_magnitude(name):
    """Against finite differences, on an image without the kinks of noise."""
    with jax.enable_x64(True):
        y, x = np.mgrid[:12, :14]
        waves = [0.5 + 0.3 * np.sin(0.2 * y + 0.3 * x + phase) for phase in (0.0, 1.0, 2.5)]
        image = jnp.asarray(np.stack(waves, axis=-1))
        weights = jnp.asarray(GENERATOR.normal(size=image.shape))
        keys = jax.random.split(KEY, 4)

        @jax.jit
        def score(magnitude):
            change = SMOOTH[name](magnitude)
            images = jax.vmap(change, (0, None))(keys, image)
            return jnp.sum(images * weights, axis=(1, 2, 3))

        at, step = {"randaugment": (7.3, 1e-5)}.get(name, (0.13, 1e-5))
        slope = jax.jit(jax.jacobian(score))(at)
        expected = (score(at + step) - score(at - step)) / (2 * step)
    assert np.isfinite(slope).all() and (np.asarray(slope) != 0).any()
    # Bilinear reading has kinks, and filters of float32 weights their rounding.
    np.testing.assert_allclose(slope, expected, rtol=2e-2, atol=2e-2)


def test_what_a_magnitude_means():
    black = np.zeros((4000, 8, 8, 1), np.float32)
    noisy = changed(["noise:0.1", "salt_and_pepper:0.3"], black + 0.5)
    assert noisy["noise:0.1"].std() == pytest.approx(0.1, rel=0.02)
    speckled = noisy["salt_and_pepper:0.3"]
    assert (speckled == 1).mean() == pytest.approx(0.15, abs=0.005)
    assert (speckled == 0).mean() == pytest.approx(0.15, abs=0.005)
    covered = changed(["cutout:4", "erase:0.5:0.25:0.25:1"], black[:500] + 2.0)
    # The center is any pixel: an axis of 8 shows 2, 3, 4, 4, 4, 4, 4 or 3 of 4 pixels.
    sizes = np.isclose(covered["cutout:4"], 2.0).mean()
    assert sizes == 1.0  # The mean color of a constant image is that constant.
    erased = (covered["erase:0.5:0.25:0.25:1"] != 2.0).sum((1, 2, 3))
    assert set(np.unique(erased)) == {0, 16} and 190 < (erased == 16).sum() < 310


def test_cutout_covers_a_square_cut_at_the_border():
    cut = jax.jit(jax.vmap(corrupt.cutout(4, fill=-1.0), (0, None)))
    hidden = np.asarray(cut(jax.random.split(KEY, 300), jnp.ones((8, 8, 1))))[..., 0] == -1.0
    sides = {(int(h.any(1).sum()), int(h.any(0).sum()), int(h.sum())) for h in hidden}
    assert all(high * wide == area for high, wide, area in sides)
    assert {high for high, _, _ in sides} == {2, 3, 4}


def test_resized_crop_shows_a_part_of_the_image():
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 40)[None, :, None], (40, 40, 1))
    crop = geometry.random_resized_crop(0.25, 0.25, 1.0)
    shown = np.asarray(jax.jit(jax.vmap(crop, (0, None)))(jax.random.split(KEY, 50), ramp))
    widths = shown.max((1, 2, 3)) - shown.min((1, 2, 3))
    # Half of the width: 40 pixels of half a pixel's distance each.
    np.testing.assert_allclose(widths, 0.5, atol=0.015)
    assert shown.min() < 0.05 and shown.max() > 0.95


def test_elastic_moves_have_the_size_of_the_paper():
    """Simard et al. 2003: strength 34 and deviation 4 move by about 1.4 pixels."""
    ramp = jnp.broadcast_to(jnp.arange(28.0)[None, :, None], (28, 28, 1))
    elastic = jax.vmap(geometry.random_elastic(34.0, 4.0), (0, None))
    moved = np.asarray(jax.jit(elastic)(jax.random.split(KEY, 100), ramp))
    moves = (moved - np.asarray(ramp))[:, 10:18, 10:18]
    assert np.sqrt(np.square(moves).mean()) == pytest.approx(
        34 / np.sqrt(3) / (2 * 4 * np.sqrt(np.pi)), rel=0.1
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(geometry.random_elastic, -1.0), "strength=-1.0"),
        (functools.partial(geometry.random_resized_crop, 0.5, 0.4), "smallest_area=0.5"),
        (functools.partial(randaugment.rand_augment, 2, 31.0), "the scale ends at 30"),
        (functools.partial(randaugment.augmix, 3.0, 0), "width=0"),
        (functools.partial(corrupt.random_erase, 1.5), "probability=1.5"),
        (functools.partial(corrupt.random_median, 0.5, 4), "odd number of pixels"),
    ],
)
def test_wrong_magnitudes(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_policy_draws_for_each_example_by_its_place():
    change = policy.make_augment("noise:0.1,flip", num_classes=10)
    batch = {"image": jnp.asarray(FLOATS), "label": jnp.arange(6), "mask": jnp.ones(6, bool)}
    key = stream_key(KEY, "augment", 3)
    whole = change(key, batch, 0)["image"]
    part = change(key, jax.tree.map(lambda leaf: leaf[4:], batch), 4)["image"]
    np.testing.assert_allclose(part, whole[4:], atol=1e-6)
