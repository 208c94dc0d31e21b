"""Two views of each image: different draws, each a function of seed, step and position."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.augment import fixed_views, make_augment, two_views
from cnnjax.data.fields import Image
from cnnjax.errors import UserError
from cnnjax.rng import stream_key

IMAGES = np.random.default_rng(0).uniform(size=(8, 12, 12, 1)).astype(np.float32)
AUGMENT = make_augment("rotate:20,translate:2,noise:0.1", num_classes=10, fields={"image": Image()})


def views_at(step, images=IMAGES, first_index=0):
    batch = {"image": jnp.asarray(images), "label": jnp.arange(len(images))}
    return two_views(AUGMENT)(stream_key(3, "augment", step), batch, jnp.int32(first_index))


def test_the_views_differ_from_each_other_from_the_image_and_from_step_to_step():
    first, later = views_at(0), views_at(1)
    shown = [IMAGES, first["image"], first["view"], later["image"], later["view"]]
    for index, one in enumerate(shown):
        for other in shown[:index]:
            # Of each image, not only of some.
            assert (np.abs(one - other).max(axis=(1, 2, 3)) > 0.05).all()
    np.testing.assert_array_equal(first["label"], np.arange(8))


def test_both_views_are_draws_of_the_same_policy():
    batch = {"image": jnp.asarray(IMAGES)}
    key = stream_key(3, "augment", 0)
    made = views_at(0)
    for name, stream in (("image", "first view"), ("view", "second view")):
        expected = AUGMENT(stream_key(key, stream, 0), batch, jnp.int32(0))["image"]
        np.testing.assert_array_equal(made[name], expected)


def test_a_view_does_not_depend_on_the_device_that_holds_the_example():
    whole = views_at(5)
    for start in range(0, 8, 2):
        part = views_at(5, IMAGES[start : start + 2], first_index=start)
        for name in ("image", "view"):
            np.testing.assert_allclose(part[name], whole[name][start : start + 2], atol=1e-6)


def test_the_second_view_is_of_the_image_whatever_the_dataset_holds():
    batch = {"image": jnp.asarray(IMAGES), "view": jnp.zeros_like(IMAGES)}
    made = two_views(AUGMENT)(stream_key(3, "augment", 0), batch, jnp.int32(0))
    np.testing.assert_array_equal(made["view"], views_at(0)["view"])


def test_fixed_views_are_a_function_of_seed_and_place():
    images = np.round(255 * IMAGES).astype(np.uint8)
    whole = fixed_views(images, AUGMENT, seed=1)
    assert whole.dtype == np.uint8 and whole.shape == images.shape
    in_parts = fixed_views(images, AUGMENT, seed=1, batch_size=3)
    assert np.abs(whole.astype(int) - in_parts).max() <= 1
    other = fixed_views(images, AUGMENT, seed=2)
    assert (np.abs(whole.astype(int) - other).max(axis=(1, 2, 3)) > 10).all()
    assert fixed_views(images[:0], AUGMENT, seed=1).shape == (0, 12, 12, 1)


def test_views_without_augmentation_are_refused():
    with pytest.raises(UserError, match="by augmentation alone"):
        two_views(make_augment("", num_classes=10))
