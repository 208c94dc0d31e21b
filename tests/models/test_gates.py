"""Gates of residual networks, by their formulas; sizes counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.errors import UserError
from cnnjax.models import gates
from cnnjax.models.layers import Layers
from cnnjax.models.resnet import ResNet, Stem, shortcut
from cnnjax.models.standardized_conv import standardized
from tests.models.quick import quick_apply, quick_init, quick_jit

LAYERS = Layers().factories(train=False)
X = np.random.default_rng(0).normal(size=(2, 4, 4, 16)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("channels", "size"), [(64, 3), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_kernel_of_eca_grows_with_the_channels(channels, size):
    """Equation 12 with gamma 2 and b 1, rounded up to an odd number as in timm."""
    assert gates.eca_kernel_size(channels) == size


def test_eca_sees_neighboring_channels():
    layer = gates.EfficientChannelAttention(LAYERS)
    variables = {"params": {"conv": {"kernel": jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)}}}
    means = np.pad(X.mean((1, 2)), ((0, 0), (1, 1)))
    gated = sigmoid(means[:, :-2] + 2 * means[:, 1:-1] + 3 * means[:, 2:])
    expected = X * gated[:, None, None]
    np.testing.assert_allclose(quick_apply(layer, variables, X), expected, rtol=1e-5)


def perceptron(params, means):
    """Two 1x1 convolutions of `[batch, channels]`, as matrices."""
    first, second = (params[name]["kernel"][0, 0] for name in ("fc1", "fc2"))
    return np.maximum(means @ first, 0) @ second


def test_cbam_adds_the_perceptron_of_means_and_of_maxima():
    layer = gates.ConvBlockAttention(LAYERS, reduction=4)
    variables = quick_init(layer, X)
    params = jax.tree.map(np.array, variables["params"])
    params["norm"]["bias"][:] = 0.3
    params["conv"]["kernel"][:] = 0
    params["conv"]["kernel"][3, 3] = [[0.5], [-0.25]]
    gated = sigmoid(perceptron(params, X.mean((1, 2))) + perceptron(params, X.max((1, 2))))
    y = X * gated[:, None, None]
    middle = 0.5 * y.mean(-1, keepdims=True) - 0.25 * y.max(-1, keepdims=True)
    expected = y * sigmoid(middle / np.sqrt(1 + 1e-5) + 0.3)
    result = quick_apply(layer, {**variables, "params": params}, X)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_bam_adds_a_gate_of_channels_and_one_of_positions():
    layer = gates.BottleneckAttention(LAYERS, reduction=4, dilation=1)
    variables = quick_init(layer, X)
    params = jax.tree.map(np.array, variables["params"])
    for name in ("position2", "position3"):
        kernel = params[f"{name}_conv"]["kernel"]
        kernel[:] = 0
        kernel[1, 1] = np.eye(4)
    factor = 1 / np.sqrt(1 + 1e-5)

    def hidden(x, name):
        return np.maximum(x @ params[name]["kernel"][0, 0] * factor, 0)

    channel = hidden(X.mean((1, 2)), "channel1_conv") @ params["channel2"]["kernel"][0, 0]
    position = hidden(X, "position1_conv") * factor**2 @ params["position4"]["kernel"][0, 0]
    expected = X * (1 + sigmoid(channel[:, None, None] + position))
    result = quick_apply(layer, {**variables, "params": params}, X)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_holes_of_bam_are_four_pixels_wide():
    layer = gates.BottleneckAttention(LAYERS, reduction=4)
    x = jnp.ones((1, 21, 21, 4))
    variables = quick_init(layer, x)
    variables["params"] = jax.tree.map(jnp.abs, variables["params"])
    variables["params"]["channel2"]["kernel"] *= 0
    change = quick_jit(jax.grad(lambda x: jnp.sum(layer.apply(variables, x)[0, 10, 10])))
    seen = {tuple(place) for place in np.argwhere(np.asarray(change(x))[0].any(-1)).tolist()}
    assert seen <= {(row, column) for row in range(2, 21, 4) for column in range(2, 21, 4)}
    assert (10, 10) in seen and len(seen) > 9


def test_bam_resnet50_has_the_parameters_of_the_paper():
    """arXiv 1807.06514, Table 5: 25.92 million; the modules counted by hand."""
    total, macs = 25_557_032, 4_089_184_256
    for channels, side in ((256, 56), (512, 28), (1024, 14)):
        width = channels // 16
        total += channels * width + 3 * width + width * channels + channels
        total += channels * width + 3 * width + 2 * (9 * width * width + 3 * width) + width + 1
        macs += 2 * channels * width
        macs += (channels * width + 2 * 9 * width * width + width) * side * side
    row = models.MODELS["bam_resnet50"]
    assert (row.parameters, row.macs) == (total, macs)
    assert round(total / 1e6, 2) == 25.92


def test_standardized_kernels_have_mean_0_and_variance_1():
    kernel = np.random.default_rng(1).normal(3, 2, (3, 3, 8, 4)).astype(np.float32)
    result = np.asarray(standardized(kernel))
    np.testing.assert_allclose(result.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(result.var((0, 1, 2)), 1, atol=1e-6)
    np.testing.assert_allclose(np.asarray(standardized(5 * kernel + 1)), result, atol=1e-5)


def test_average_shortcut_projects_means_and_smaller_windows_at_the_edge():
    import flax.linen as nn

    class Shortcut(nn.Module):
        @nn.compact
        def __call__(self, x):
            return shortcut(x, 1, 2, LAYERS, "average")

    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    variables = quick_init(Shortcut(), x)
    variables["params"]["downsample"]["conv"]["kernel"] = jnp.ones((1, 1, 1, 1))
    expected = np.array([[2, 3.5], [6.5, 8]]) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(quick_apply(Shortcut(), variables, x)[0, :, :, 0], expected)


def test_zeros_of_the_stem_win_over_negative_pixels():
    image = jnp.zeros((1, 8, 8, 3))
    layers = Layers(activation=lambda x: x).factories(train=False)
    for pool, corner in (("max", -5.0), ("max_of_zeros", 0.0)):
        stem = Stem("imagenet", 4, layers, pool=pool)
        variables = quick_init(stem, image)
        variables["params"]["norm"]["bias"] -= 5.0
        np.testing.assert_allclose(quick_apply(stem, variables, image)[0, 0, 0], corner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_pool": "mx"}, "unknown stem_pool 'mx'"),
        ({"attention": "ecca"}, "unknown attention 'ecca': did you mean eca"),
        ({"shortcut": "averge"}, "unknown shortcut 'averge': did you mean average"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(ResNet((1,), **options).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("axis", [1, 3])
def test_derivative_of_a_maximum_goes_to_the_first_of_equal_ones(axis):
    x = np.round(X[:, :2])
    expected = np.zeros_like(x)
    place = np.expand_dims(x.argmax(axis), axis)
    np.put_along_axis(expected, place, 2.0, axis)
    found = quick_jit(jax.grad(lambda x: jnp.sum(2 * gates.largest(x, axis))))(x)
    np.testing.assert_array_equal(found, expected)
