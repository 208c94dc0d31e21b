"""mixup and CutMix: images and labels by hand, devices, masks, and what a step makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax import losses
from cnnjax.augment import mixup, policy
from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from tests.tiny import BatchNormNet, batch_of, random_arrays, setup

KEY = jax.random.key(0)
# Each image is one number, so that a mixed pixel says what it is made of.
LEVELS = np.array([0.0, 1.0, 0.25, 0.75, 0.5, 0.1], np.float32)
LABELS = np.array([0, 2, 1, 1, 2, 0], np.int32)


def batch(size=6):
    image = jnp.broadcast_to(LEVELS[:size, None, None, None], (size, 8, 10, 3))
    return {"image": image, "label": jnp.asarray(LABELS[:size]), "mask": jnp.ones(size, bool)}


def fixed(share):
    return lambda key, height, width: jnp.full((1, 1, 1), share)


def left_half(key, height, width):
    return (jnp.arange(width) < width // 2).astype(jnp.float32)[None, :, None] * jnp.ones(
        (height, 1, 1)
    )


def test_a_share_of_three_quarters_by_hand():
    mixed = mixup.mix_neighbors(KEY, batch(), [fixed(0.75)], num_classes=3)
    np.testing.assert_allclose(
        mixed["image"][:, 0, 0, 0], [0.25, 0.75, 0.375, 0.625, 0.4, 0.2], atol=1e-6
    )
    np.testing.assert_allclose(
        mixed["label"],
        [[0.75, 0, 0.25], [0.25, 0, 0.75], [0, 1, 0], [0, 1, 0], [0.25, 0, 0.75], [0.75, 0, 0.25]],
    )


def test_half_of_the_pixels_by_hand():
    mixed = mixup.mix_neighbors(KEY, batch(), [left_half], num_classes=3)
    assert (mixed["image"][0, :, :5] == 0.0).all() and (mixed["image"][0, :, 5:] == 1.0).all()
    assert (mixed["image"][1, :, :5] == 1.0).all() and (mixed["image"][1, :, 5:] == 0.0).all()
    np.testing.assert_allclose(mixed["label"][0], [0.5, 0, 0.5])


def test_binary_and_soft_labels():
    binary = batch() | {"label": jnp.array([0, 1, 1, 1, 0, 0])}
    mixed = mixup.mix_neighbors(KEY, binary, [fixed(0.75)], num_classes=1)
    np.testing.assert_allclose(mixed["label"], [0.25, 0.75, 1, 1, 0, 0])
    loss = losses.sigmoid_binary_cross_entropy(jnp.zeros((6, 1)), mixed["label"])
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    soft = batch(2) | {"label": jnp.array([[0.2, 0.8], [1.0, 0.0]])}
    mixed = mixup.mix_neighbors(KEY, soft, [fixed(0.5)], num_classes=2)
    np.testing.assert_allclose(mixed["label"], [[0.6, 0.4], [0.6, 0.4]], rtol=1e-6)


def test_padding_is_mixed_with_nothing_and_the_last_of_an_odd_number_stays():
    padded = batch() | {"mask": jnp.array([True, False, True, True, True, True])}
    padded["image"] = padded["image"].at[1].set(jnp.nan)
    mixed = mixup.mix_neighbors(KEY, padded, [fixed(0.5)], num_classes=3)
    np.testing.assert_array_equal(mixed["image"][0], padded["image"][0])
    np.testing.assert_array_equal(mixed["label"][0], [1, 0, 0])
    odd = mixup.mix_neighbors(KEY, batch(5), [fixed(0.5)], num_classes=3)
    np.testing.assert_array_equal(odd["image"][4], batch()["image"][4])
    np.testing.assert_array_equal(odd["label"][4], [0, 0, 1])
    np.testing.assert_allclose(odd["image"][:4, 0, 0, 0], [0.5, 0.5, 0.5, 0.5])


def test_mixup_draws_from_beta():
    share = jax.vmap(lambda key: mixup.mixup(0.4)(key, 8, 8))(jax.random.split(KEY, 4000))
    assert share.shape == (4000, 1, 1, 1)
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (4 * 1.8), rel=0.05)


def test_cutmix_replaces_a_box_and_its_share_of_the_label():
    size, count = 16, 3000
    weights = jax.jit(jax.vmap(lambda key: mixup.cutmix(1.0)(key, size, 2 * size)))
    own = np.asarray(weights(jax.random.split(KEY, count)))[..., 0]
    assert set(np.unique(own)) == {0.0, 1.0}
    for each in own[:200]:
        rows, columns = (each == 0).any(1), (each == 0).any(0)
        assert (each == 0).sum() == rows.sum() * columns.sum()
        # A box of the image's proportions: longer ones are cut at the border.
        for inside in (rows, columns):
            assert (np.diff(np.flatnonzero(inside)) == 1).all()
    # The box of area 1 - l before it is cut has E[1 - l] = 1 / 2; what is cut off makes it less.
    assert 0.25 < 1 - own.mean() < 0.45
    pair = {"image": jnp.asarray([0.0, 1.0])[:, None, None, None] * jnp.ones((2, 16, 16, 1))}
    pair |= {"label": jnp.array([0, 1]), "mask": jnp.ones(2, bool)}
    mixed = mixup.mix_neighbors(KEY, pair, [mixup.cutmix(1.0)], num_classes=2)
    # The share of pixels that are the other image's is the share of its label.
    np.testing.assert_allclose(mixed["label"][0, 1], mixed["image"][0].mean(), rtol=1e-6)
    np.testing.assert_allclose(mixed["label"][1, 1], mixed["image"][1].mean(), rtol=1e-6)


def test_nothing_is_mixed_at_zero():
    for ways in ([mixup.mixup(0.0)], [mixup.cutmix(0.0)], [mixup.mixup(0.0), mixup.cutmix(0.0)]):
        mixed = mixup.mix_neighbors(KEY, batch(), ways, num_classes=3)
        np.testing.assert_array_equal(mixed["image"], batch()["image"])
        np.testing.assert_array_equal(mixed["label"], jax.nn.one_hot(LABELS, 3))
    with pytest.raises(UserError, match="alpha=-1"):
        mixup.mixup(-1)


def test_each_example_takes_one_of_several_ways():
    many = {
        "image": jnp.tile(jnp.asarray([0.0, 1.0]), 200)[:, None, None, None]
        * jnp.ones((1, 2, 4, 1)),
        "label": jnp.tile(jnp.array([0, 1]), 200),
        "mask": jnp.ones(400, bool),
    }
    mixed = mixup.mix_neighbors(KEY, many, [fixed(0.75), left_half], num_classes=2)
    by_half = np.asarray((mixed["label"] == 0.5).all(1))
    assert 150 < by_half.sum() < 250
    assert np.isin(np.asarray(mixed["image"])[by_half], [0.0, 1.0]).all()
    assert np.isin(np.asarray(mixed["image"])[~by_half], [0.25, 0.75]).all()


@pytest.mark.slow
def test_the_same_on_any_number_of_devices():
    arrays = random_arrays(32)
    whole = batch_of(arrays, 0, 32) | {"image": jnp.asarray(arrays.image / 255.0, jnp.float32)}
    change = policy.make_augment("flip,mixup:0.3,cutmix:1", num_classes=10)
    expected = jax.jit(change)(KEY, whole, 0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(change)(KEY, jax.device_put(whole, split), 0)
    assert not sharded["image"].sharding.is_fully_replicated
    part = jax.jit(change)(KEY, jax.tree.map(lambda leaf: leaf[8:12], whole), 8)
    for name in ("image", "label"):
        np.testing.assert_allclose(sharded[name], expected[name], atol=1e-5)
        np.testing.assert_allclose(part[name], expected[name][8:12], atol=1e-5)


@pytest.mark.slow
def test_a_step_trains_on_the_mixed_labels():
    """Its loss is that of the mixed batch; its accuracy counts the heaviest class."""
    change = policy.make_augment("mixup:1", num_classes=10)
    state, make_step = setup(BatchNormNet(), augment=change)
    stored = batch_of(random_arrays(16), 0, 16)
    _, metrics = jax.jit(make_step())(state, stored)
    floats = stored | {"image": stored["image"] / 255.0}
    mixed = jax.jit(change)(stream_key(state.key, "augment", 0), floats, 0)
    logits, _ = BatchNormNet().apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        mixed["image"],
        train=True,
        mutable=["batch_stats"],
    )
    expected = optax.softmax_cross_entropy(logits, mixed["label"]).mean()
    assert metrics["loss"][0] / 16 == pytest.approx(float(expected), rel=1e-5)
    right = (logits.argmax(1) == mixed["label"].argmax(1)).sum()
    assert metrics["accuracy"] == (right, 16)
