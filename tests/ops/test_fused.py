"""The fused convolution and pool equals its parts; ConvPool has nn.Conv's parameters."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.ops import blocks, choice, geometry


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def composed(image, kernel, bias, padding, activation):
    result = lax.conv_general_dilated(
        image, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return nn.max_pool(activation(result + bias), (2, 2), (2, 2))


def derivatives(function, arrays):
    """Value, gradients and a Hessian-vector product, as one compiled program."""

    def objective(*arrays):
        return jnp.sum(jnp.sin(function(*arrays)))

    gradient = jax.grad(objective, (0, 1, 2))
    tangents = jax.tree.map(jnp.cos, arrays)
    return jax.jit(lambda: (function(*arrays), jax.jvp(gradient, arrays, tangents)))()


def assert_fused_equals_composed(arrays, padding, activation):
    ours = functools.partial(
        ops.conv2d_activation_max_pool, padding=padding, activation=activation, lowering="im2col"
    )
    theirs = functools.partial(composed, padding=padding, activation=activation)
    results = derivatives(ours, arrays), derivatives(theirs, arrays)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=6, deadline=None)
@given(
    batch=st.sampled_from((1, 3, 16)),
    size=st.tuples(st.integers(6, 13), st.integers(6, 13)),
    channels=st.sampled_from((1, 5)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.sampled_from(("SAME", "VALID", ((2, 0), (0, 1)))),
    activation=st.sampled_from((jax.nn.relu, nn.tanh, jax.nn.sigmoid)),
    sharded=st.booleans(),
    row_stride=st.sampled_from((1, 2)),
)
def test_fused_equals_its_parts(
    batch, size, channels, window, padding, activation, sharded, row_stride
):
    patches = mock.patch.multiple(
        choice,
        batch_may_be_sharded=lambda: sharded,
        fused_row_stride=lambda *_: row_stride,
    )
    with jax.enable_x64(True), patches:
        arrays = normal(1, batch, *size, channels), normal(2, *window, channels, 4), normal(3, 4)
        assert_fused_equals_composed(arrays, padding, activation)


@pytest.mark.parametrize("size", [13, 14])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_odd_sizes_drop_the_last_row_and_column(size, padding):
    with jax.enable_x64(True):
        arrays = normal(1, 16, size, size, 3), normal(2, 3, 3, 3, 4), normal(3, 4)
        assert_fused_equals_composed(arrays, padding, jax.nn.relu)


def test_rows_are_apart_where_products_cost_more_than_copies():
    image, kernel = jnp.zeros((64, 13, 13, 32)), jnp.zeros((3, 3, 32, 64))
    how = geometry.make_geometry(image, kernel, (1, 1), "VALID", (1, 1), 1, None)
    assert choice.fused_row_stride(image, kernel, how) == 1
    first_layer = jnp.zeros((64, 28, 28, 1)), jnp.zeros((3, 3, 1, 32))
    assert choice.fused_row_stride(*first_layer, how) == 2
    # Patches that are made block by block must not be cut within a window.
    assert choice.fused_row_stride(jnp.zeros((64, 200, 200, 32)), kernel, how) == 2


def test_fused_in_row_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_PATCH_BYTES", 40_000)
    monkeypatch.setattr(blocks, "MAX_SAVED_PATCH_BYTES", 40_000)
    with jax.enable_x64(True):
        arrays = normal(1, 4, 12, 11, 3), normal(2, 5, 5, 3, 4), normal(3, 4)
        assert_fused_equals_composed(arrays, "SAME", jax.nn.relu)


@pytest.mark.parametrize("row_stride", [1, 2])
def test_ties_go_to_the_first_position(monkeypatch, row_stride):
    """Equal outputs under one window: the gradient of the image is that of the top left one."""
    monkeypatch.setattr(choice, "fused_row_stride", lambda *_: row_stride)
    image, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((1, 1, 1, 1))
    pool = lambda image: jnp.sum(  # noqa: E731
        ops.conv2d_activation_max_pool(image, kernel, lowering="im2col")
    )
    gradient = jax.jit(jax.grad(pool))(image)[0, :, :, 0]
    np.testing.assert_array_equal(gradient, jnp.zeros((4, 4)).at[::2, ::2].set(1))


def test_an_activation_that_may_decrease_is_applied_before_the_pool():
    image, kernel = normal(1, 16, 8, 8, 1), normal(2, 3, 3, 1, 4)
    for activation in (jax.nn.gelu, jnp.abs, lambda values: -values):
        fused = functools.partial(
            ops.conv2d_activation_max_pool,
            padding="VALID",
            activation=activation,
            lowering="im2col",
        )
        ours = jax.jit(fused)(image, kernel)
        theirs = composed(image, kernel, 0.0, "VALID", activation)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_conv_pool_is_conv_activation_pool(pool, use_bias):
    image, key = normal(1, 16, 13, 13, 3), jax.random.key(7)
    fused = ops.ConvPool(4, (3, 3), activation=nn.relu, pool=pool, use_bias=use_bias)
    plain = nn.Conv(4, (3, 3), use_bias=use_bias)
    params = plain.init(key, image)["params"]
    jax.tree.map(np.testing.assert_array_equal, fused.init(key, image)["params"], params)
    pool_function = {"max": nn.max_pool, "average": nn.avg_pool}[pool]
    expected = pool_function(nn.relu(plain.apply({"params": params}, image)), (2, 2), (2, 2))
    result = jax.jit(fused.apply)({"params": params}, image)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_conv_is_flax_conv():
    image, key = normal(1, 16, 9, 9, 4), jax.random.key(7)
    for options in (
        {"strides": 2, "padding": 1},
        {"feature_group_count": 2, "kernel_dilation": 2, "use_bias": False},
        {"padding": "CIRCULAR"},
        {"input_dilation": 2, "padding": ((1, 1), (0, 2))},
        {"dtype": jnp.bfloat16},
    ):
        ours, theirs = (layer(6, (3, 3), **options) for layer in (ops.Conv, nn.Conv))
        shapes = jax.eval_shape(theirs.init, key, image)
        assert jax.eval_shape(ours.init, key, image) == shapes
        variables = jax.tree.map(lambda leaf: normal(8, *leaf.shape).astype(leaf.dtype), shapes)
        with ops.lowering("im2col"):
            result = jax.jit(ours.apply)(variables, image)
        expected = jax.jit(theirs.apply)(variables, image)
        assert result.dtype == expected.dtype
        tolerance = 2e-2 if options.get("dtype") else 1e-5
        np.testing.assert_allclose(
            np.asarray(result, np.float32),
            np.asarray(expected, np.float32),
            rtol=tolerance,
            atol=tolerance,
        )


def test_unknown_pool_is_named():
    with pytest.raises(UserError, match=r"unknown pool 'maximum'.*did you mean max"):
        ops.ConvPool(4, (3, 3), pool="maximum").init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
