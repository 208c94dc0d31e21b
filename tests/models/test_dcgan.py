"""DCGAN: sizes by hand, the paper's rules for initialization and batch norm, what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, trees
from cnnjax.errors import UserError
from cnnjax.models.dcgan import Discriminator, Generator, dcgan


@pytest.fixture(scope="module")
def variables():
    model = dcgan()
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))


def test_sizes_are_those_by_hand(variables):
    """Generator 100 -> 7x7x128 -> 14x14x64 -> 28x28x1; the discriminator back to 7x7x128."""
    generator = 100 * 6272 + 2 * 128 + (16 * 128 * 64 + 2 * 64) + (16 * 64 + 1)
    discriminator = (16 * 64 + 64) + (16 * 64 * 128 + 2 * 128) + (6272 + 1)
    found = {name: trees.count_parameters(tree) for name, tree in variables["params"].items()}
    assert found == {"generator": generator, "discriminator": discriminator}
    assert trees.count_parameters(variables["batch_stats"]) == 2 * (128 + 64) + 2 * 128
    # A transposed convolution uses each weight once at each position of its input.
    up = 627200 + 49 * 16 * 128 * 64 + 196 * 16 * 64
    down = 196 * 16 * 64 + 49 * 16 * 64 * 128 + 6272
    assert models.summary(dcgan(), (28, 28, 1)).macs == up + down


def test_weights_start_as_in_section_4(variables):
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        kind = path[-1].key
        mean, std = {"kernel": (0, 0.02), "scale": (1, 0.02), "bias": (0, 0)}[kind]
        assert abs(leaf.mean() - mean) < 0.01, path
        assert abs(leaf.std() - std) < 0.005, path


def test_batch_norm_is_everywhere_but_at_the_images(variables):
    """Section 3: neither at the output of the generator nor at the input of the discriminator."""
    normed = {name: set(tree) for name, tree in variables["batch_stats"].items()}
    assert normed == {
        "generator": {"project_norm", "up1_norm"},
        "discriminator": {"conv2_norm"},
    }
    with_bias = {
        f"{network}/{layer}"
        for network, layers in variables["params"].items()
        for layer, leaves in layers.items()
        if "bias" in leaves and not layer.endswith("_norm")
    }
    assert with_bias == {"generator/output", "discriminator/conv1", "discriminator/head"}


def test_images_are_in_the_range_of_tanh_and_logits_are_of_both(variables):
    image = jax.random.uniform(jax.random.key(1), (5, 28, 28, 1), minval=-1.0)
    noise = jax.random.normal(jax.random.key(2), (5, 100))
    outputs = dcgan().apply(variables, {"image": image, "noise": noise})
    assert outputs["sample"].shape == image.shape and np.abs(outputs["sample"]).max() < 1
    assert len(np.unique(outputs["sample"])) > 5 * 28 * 28 / 2
    each = {name: {c: variables[c][name] for c in variables} for name in variables["params"]}
    sample = Generator().apply(each["generator"], noise)
    np.testing.assert_array_equal(outputs["sample"], sample)
    for name, images in (("real", image), ("fake", sample)):
        logit = Discriminator().apply(each["discriminator"], images)
        np.testing.assert_array_equal(outputs[name], logit[:, 0])


def test_leaky_relu_has_slope_a_fifth():
    model = Discriminator(widths=(2,), num_classes=None)
    image = jnp.full((1, 2, 2, 1), 1.0)
    variables = model.init(jax.random.key(0), image)
    kernel = variables["params"]["conv1"]["kernel"][1:3, 1:3, 0].sum((0, 1))
    expected = jnp.where(kernel > 0, kernel, 0.2 * kernel)
    np.testing.assert_allclose(model.apply(variables, image)[0], expected, rtol=1e-5)


def test_statistics_over_devices_are_those_of_the_whole_batch():
    model = Generator((8, 8, 1), 6, (4, 4))
    noise = jax.random.normal(jax.random.key(2), (16, 6))
    variables = model.init(jax.random.key(0), noise)
    expected, new = model.apply(variables, noise, train=True, mutable=["batch_stats"])

    def on_each(noise):
        return models.with_fields(model, axis_name="i").apply(
            variables, noise, train=True, mutable=["batch_stats"]
        )

    found, split = jax.pmap(on_each, "i")(noise.reshape(8, 2, 6))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-7), split, new)


def test_a_discriminator_is_a_model_as_others():
    model, image = Discriminator(widths=(4, 8)), jnp.zeros((2, 8, 8, 3))
    variables = model.init(jax.random.key(0), image)
    assert model.apply(variables, image).shape == (2, 1)
    assert model.clone(num_classes=None).apply(variables, image).shape == (2, 2 * 2 * 8)
    assert models.stage_names(model, image.shape[1:]) == ["stage1", "stage2"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="32x32"):
        dcgan((28, 30, 1), num_stages=3)
    with pytest.raises(UserError, match=r"noise \[batch, 100\]"):
        Generator().init(jax.random.key(0), jnp.zeros((2, 99)))
