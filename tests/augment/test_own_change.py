"""A change of one's own beside those of the package: of colors, and of places.

Nothing here but the public names of `cnnjax.augment`; no file of the package knows of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import augment
from cnnjax.data import fields

KEY = jax.random.key(0)


def random_gamma(strength):
    """Raises the image to a power, log-uniform between `exp(-strength)` and `exp(strength)`."""

    def gamma(key, image):
        return image ** jnp.exp(strength * jax.random.uniform(key, minval=-1.0))

    return gamma


def random_quarter_turn(probability=0.5):
    """Turns clockwise by 90 degrees with the given probability."""

    def draw(key, size):
        turned = jnp.array([[0.0, -1.0], [1.0, 0.0]])
        inverse = jnp.where(jax.random.bernoulli(key, probability), turned, jnp.eye(2))
        return augment.affine_move(size, inverse, jnp.zeros(2))

    return augment.Geometric(draw)


def random_roll(max_pixels):
    """Moves to the right; what leaves comes in from the left. Boxes do not survive that."""

    def draw(key, size):
        by = jax.random.randint(key, (), 0, max_pixels + 1)
        return augment.Move(
            image=lambda image: jnp.roll(image, by, axis=1),
            class_map=lambda classes, padding: jnp.roll(classes, by, axis=1),
        )

    return augment.Geometric(draw, kinds=("image", "class_map"))


def batch(count=16, size=8):
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 5, (count, size, size)).astype(np.uint8)
    return {
        "image": jnp.asarray(classes[..., None] / 5.0, jnp.float32),
        "classes": jnp.asarray(classes),
        "boxes": jnp.tile(jnp.array([[[1.0, 2.0, 3.0, 7.0]]]), (count, 1, 1)),
        "mask": jnp.ones(count, bool),
    }


FIELDS = {"image": fields.Image(), "classes": fields.ClassMap(5), "boxes": fields.Boxes(1)}


def test_a_color_of_ones_own_changes_images_only():
    before = batch()
    policy = (augment.random_flip(0.0), random_gamma(1.0))
    after = jax.jit(augment.make_augment(policy, num_classes=5, fields=FIELDS))(KEY, before, 0)
    for name in ("classes", "boxes", "mask"):
        np.testing.assert_array_equal(after[name], before[name])
    powers = []
    for old, new in zip(before["image"], after["image"], strict=True):
        # 0 and 1 are the same to any power.
        power = np.log(new[old > 0]) / np.log(old[old > 0])
        np.testing.assert_allclose(power, power[0], rtol=1e-4)
        powers.append(power[0])
    assert np.exp(-1) < min(powers) < 1 < max(powers) < np.exp(1)


def test_a_geometric_change_of_ones_own_moves_all_by_one_draw():
    before = batch()
    change = augment.make_augment((random_quarter_turn(),), num_classes=5, fields=FIELDS)
    after = jax.jit(change)(KEY, before, 0)
    turned = 0
    for index in range(16):
        old, new = ({k: np.asarray(x[index]) for k, x in each.items()} for each in (before, after))
        if (old["classes"] == new["classes"]).all():
            np.testing.assert_allclose(new["image"], old["image"], atol=1e-6)
            np.testing.assert_allclose(new["boxes"], old["boxes"], atol=1e-6)
            continue
        turned += 1
        np.testing.assert_array_equal(new["classes"], np.rot90(old["classes"], -1))
        np.testing.assert_allclose(new["image"], np.rot90(old["image"], -1), atol=1e-6)
        # Rows 1 to 3 from the top are columns 1 to 3 from the right.
        np.testing.assert_allclose(new["boxes"], [[2, 5, 7, 7]], atol=1e-5)
    assert 2 <= turned <= 14


def test_a_move_written_in_full_and_composed_with_others():
    wanted = {name: FIELDS[name] for name in ("image", "classes")}
    policy = (augment.compose(random_roll(7), random_gamma(0.0)), augment.random_flip())
    before = batch()
    after = jax.jit(augment.make_augment(policy, num_classes=5, fields=wanted))(KEY, before, 0)
    np.testing.assert_allclose(after["image"][..., 0], after["classes"] / 5.0, atol=1e-6)
    assert (after["classes"] != before["classes"]).any()
    np.testing.assert_array_equal(
        np.sort(after["classes"], axis=-1), np.sort(before["classes"], axis=-1)
    )


def test_the_same_functions_serve_classification():
    policy = (augment.random_flip(), random_quarter_turn(), random_gamma(0.3))
    images = {"image": batch()["image"], "label": jnp.arange(16), "mask": jnp.ones(16, bool)}
    after = jax.jit(augment.make_augment(policy, num_classes=16))(KEY, images, 0)
    assert after["image"].shape == images["image"].shape
    assert (after["image"] != images["image"]).any()
    np.testing.assert_array_equal(after["label"], images["label"])
