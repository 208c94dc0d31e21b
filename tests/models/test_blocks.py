"""The shared parts of the residual and mobile networks, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.models import blocks, images, layers, norms
from tests.models.quick import quick_apply, quick_init

KEY = jax.random.key(0)


FACTORIES = layers.Layers().factories(train=False)


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [6, 7])
def test_padding_is_symmetric_at_stride_2(kernel_size, size):
    """A kernel that is 1 at its center picks pixels 0, 2, 4 ..., as PyTorch's convolutions do."""
    image = jnp.arange(size * size, dtype=jnp.float32).reshape(1, size, size, 1)
    conv = layers.conv_layer(1, kernel_size, 2, name="conv")
    kernel = np.zeros((kernel_size, kernel_size, 1, 1), np.float32)
    kernel[kernel_size // 2, kernel_size // 2] = 1
    output = conv.apply({"params": {"kernel": jnp.asarray(kernel)}}, image)
    np.testing.assert_array_equal(output, image[:, ::2, ::2])


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(32 * 0.75, 24), (16 * 0.75, 16), (11, 16), (15.9, 16), (3, 8), (1280 * 1.4, 1792), (18, 24)],
)
def test_make_divisible(channels, expected):
    assert blocks.make_divisible(channels) == expected


@settings(max_examples=50)
@given(st.floats(1, 5000), st.sampled_from([1, 2, 8, 24, 56]))
def test_make_divisible_stays_close(channels, divisor):
    result = blocks.make_divisible(channels, divisor)
    assert result % divisor == 0
    assert result >= 0.9 * channels - 1e-9
    assert result <= max(divisor, channels + divisor)


def test_strides_for_small_images_leave_out_two_halvings():
    assert images.strides_for("imagenet", (2, 1, 2, 2, 1)) == [2, 1, 2, 2, 1]
    assert images.strides_for("cifar", (2, 1, 2, 2, 1)) == [1, 1, 1, 2, 1]
    assert images.strides_for("cifar", (1, 2)) == [1, 1]
    with pytest.raises(UserError, match="unknown stem 'cifer': did you mean cifar"):
        images.strides_for("cifer", (2, 2))


def test_stochastic_depth_keeps_or_drops_whole_examples():
    """5,000 examples: each dropped or scaled by 1 / 0.7; the mean is the input's to 5 sigma."""
    examples, rate = 5_000, 0.3
    x = jnp.ones((examples, 1, 1, 2))
    layer = blocks.StochasticDepth(rate)
    output = np.asarray(layer.apply({}, x, train=True, rngs={"dropout": KEY}))[:, 0, 0]
    np.testing.assert_array_equal(output[:, 0], output[:, 1])
    kept = output[:, 0] != 0
    np.testing.assert_allclose(output[kept], 1 / (1 - rate), rtol=1e-6)
    sigma = np.sqrt(rate / (1 - rate) / examples)
    assert abs(output.mean() - 1) < 5 * sigma
    np.testing.assert_array_equal(layer.apply({}, x, train=False), x)
    np.testing.assert_array_equal(blocks.StochasticDepth(0.0).apply({}, x, train=True), x)


def test_stochastic_depth_rates_rise_linearly():
    np.testing.assert_allclose(blocks.stochastic_depth_rates(0.4, 5), [0, 0.1, 0.2, 0.3, 0.4])
    assert blocks.stochastic_depth_rates(0.4, 1) == [0]
    for rate in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"stochastic_depth_rate is {rate}"):
            blocks.stochastic_depth_rates(rate, 3)


def test_squeeze_excite_by_hand():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 3, 5, 4)).astype(np.float32)
    first, second = generator.normal(size=(4, 2)), generator.normal(size=(2, 4))
    first_bias, second_bias = generator.normal(size=2), generator.normal(size=4)
    params = {
        "fc1": {"kernel": jnp.asarray(first[None, None]), "bias": jnp.asarray(first_bias)},
        "fc2": {"kernel": jnp.asarray(second[None, None]), "bias": jnp.asarray(second_bias)},
    }
    output = blocks.SqueezeExcite(2, layers.conv_layer).apply({"params": params}, jnp.asarray(x))

    hidden = np.maximum(x.mean(axis=(1, 2)) @ first + first_bias, 0)
    gates = 1 / (1 + np.exp(-(hidden @ second + second_bias)))
    np.testing.assert_allclose(output, x * gates[:, None, None], rtol=2e-5)


def test_group_norm_has_32_groups_or_the_largest_power_of_two_that_divides():
    x = np.random.default_rng(0).normal(2, 3, size=(2, 4, 4, 24)).astype(np.float32)
    norm = norms.norm_layer("group", train=True)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm(name="norm")(x)

    variables = quick_init(Layer(), jnp.asarray(x))
    output = quick_apply(Layer(), variables, jnp.asarray(x))
    assert jax.tree.map(jnp.shape, variables["params"]) == {"norm": {"bias": (24,), "scale": (24,)}}
    groups = x.reshape(2, 16, 8, 3)
    mean = groups.mean(axis=(1, 3), keepdims=True)
    deviation = np.sqrt(groups.var(axis=(1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(output, ((groups - mean) / deviation).reshape(x.shape), atol=1e-4)


def test_layer_norm_is_over_the_channels_of_each_position():
    x = np.random.default_rng(0).normal(2, 3, size=(2, 2, 2, 8)).astype(np.float32)
    layer = norms.norm_layer("layer", train=True)(name=None)
    output, _ = layer.init_with_output(KEY, jnp.asarray(x))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(output, expected, atol=1e-4)


def test_convolutions_have_biases_only_without_normalization():
    for norm in norms.NORMS:
        conv = layers.Layers(norm=norm).factories(train=False).conv
        assert conv(3, 1, name="conv").use_bias == (norm == "none")


@pytest.mark.parametrize(
    ("strides", "features", "residual"), [(1, 4, True), (2, 4, False), (1, 6, False)]
)
def test_inverted_residual_adds_its_input_only_where_the_shape_stays(strides, features, residual):
    """With a projection of zeros the block is the identity, or zero."""
    x = jax.random.normal(KEY, (2, 4, 4, 4))
    block = blocks.InvertedResidual(features, 8, 3, strides, FACTORIES)
    variables = quick_init(block, x)
    variables["params"]["project"] = jax.tree.map(jnp.zeros_like, variables["params"]["project"])
    output = quick_apply(block, variables, x)
    np.testing.assert_array_equal(output, x if residual else jnp.zeros_like(output))


def test_unknown_names_are_one_clear_error():
    with pytest.raises(UserError, match="unknown norm 'bach': did you mean batch"):
        norms.norm_layer("bach", train=False)
    with pytest.raises(UserError, match="unknown activation 'rellu': did you mean relu"):
        layers.activation_function("rellu")
    assert layers.activation_function(jnp.sin) is jnp.sin
