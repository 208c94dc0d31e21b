"""Policies by a string: what they mean, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.augment import geometry, mixup, policy
from cnnjax.errors import UserError

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 9, 9, 1)), jnp.float32)
BATCH = {"image": IMAGES, "label": jnp.array([0, 1, 2, 0]), "mask": jnp.ones(4, bool)}


def applied(text_or_functions, num_classes=3):
    change = policy.make_augment(text_or_functions, num_classes=num_classes)
    return jax.jit(change)(KEY, BATCH, 0)


def test_neighboring_affine_changes_are_one_map():
    text = "rotate:7,scale:0.07,translate:1.5,shear:6"
    function = geometry.random_affine(7.0, (1 / 1.07, 1.07), 1.5, 6.0)
    np.testing.assert_array_equal(applied(text)["image"], applied([function])["image"])
    assert len(policy.parse_policy(text).changes) == 1
    assert len(policy.parse_policy("rotate:7,flip,scale:0.1").changes) == 3
    assert len(policy.parse_policy("rotate:7,scale:0.1,rotate:7").changes) == 2


def test_functions_and_strings_mean_the_same():
    functions = (geometry.pad_and_crop(2), geometry.random_flip(0.3))
    ways = (mixup.mixup(0.2), mixup.cutmix(1.0))
    by_text = applied("mixup:0.2, crop:2 ,flip:0.3,cutmix:1.0")
    by_hand = applied(policy.Policy(functions, ways))
    for name in ("image", "label"):
        np.testing.assert_array_equal(by_text[name], by_hand[name])
    assert by_text["label"].shape == (4, 3)
    np.testing.assert_array_equal(applied("crop:2,flip:0.3")["image"], applied(functions)["image"])


def test_nothing_is_nothing():
    assert policy.make_augment("", num_classes=3) is None
    assert policy.make_augment((), num_classes=3) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filp", "unknown augmentation 'filp': did you mean flip"),
        ("crop:4,,flip", "unknown augmentation ''"),
        (
            "rotate",
            r"'rotate': missing a .* 'degrees'. Write it as rotate\(degrees\)",
        ),
        ("rotate:1:2", "'rotate:1:2': too many positional arguments"),
        ("crop", r"Write it as crop\(pixels, fill=0.0\)"),
        ("crop:2.5", "'crop:2.5': pixels=2.5: give a whole number"),
        ("crop:-4", "'crop:-4': max_pixels=-4: give a magnitude of 0 or more"),
        ("crop:4:mirror", "fill='mirror': give a number"),
        ("rotate:-15", "'rotate:-15': rotation_degrees=-15.0: give a magnitude of 0 or more"),
        ("scale:-0.1", "'scale:-0.1': change=-0.1"),
        ("shear:95", "shear_degrees=95.0: give less than 90"),
        ("noise:much", "deviation='much': give a number"),
        ("noise:nan", "deviation='nan': give a number"),
        ("flip:1.5", r"probability=1.5: give a number in \[0, 1\]"),
        ("randaugment:2:40", "magnitude=40.0: the scale ends at 30"),
        ("mixup:-1", "'mixup:-1': alpha=-1.0"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        policy.parse_policy(text)
