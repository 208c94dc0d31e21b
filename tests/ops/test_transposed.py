"""Transposed convolution: `lax`'s values and gradients, Flax's parameters, PyTorch's padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from tests.ops.test_convolution import value_and_gradients

FORMS = [
    (window, strides)
    for window in ((2, 2), (3, 3), (4, 4), (5, 4), (6, 7))
    for strides in ((1, 1), (2, 2), (2, 1), (3, 3))
    if min(np.subtract(window, strides)) >= 0
]


def arrays(window=(4, 4), dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0))
    image = jax.random.normal(keys[0], (3, 5, 4, 2), dtype)
    return image, jax.random.normal(keys[1], (*window, 2, 3), dtype)


@pytest.mark.parametrize(("window", "strides"), FORMS)
def test_both_forms_are_that_of_lax(window, strides):
    def form(lowering):
        return lambda x, w: ops.conv_transpose2d(x, w, strides=strides, lowering=lowering)

    with jax.enable_x64(True):
        image, kernel = arrays(window)
        expected = jax.lax.conv_transpose(
            image, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        assert expected.shape == (3, 5 * strides[0], 4 * strides[1], 3)
        own = value_and_gradients(form("im2col"), image, kernel)
        lax = value_and_gradients(form("lax"), image, kernel)
    np.testing.assert_array_equal(lax[0], expected)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(lax), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_it_is_the_gradient_of_a_convolution_of_stride_two():
    """A 4x4 window with one pixel of padding, as PyTorch's `ConvTranspose2d(4, 2, 1)`."""
    with jax.enable_x64(True):
        image, kernel = arrays()

        def convolve(x):
            turned = kernel[::-1, ::-1].swapaxes(2, 3)
            return ops.conv2d(x, turned, strides=(2, 2), padding=((1, 1), (1, 1)))

        large = jnp.zeros((3, 10, 8, 3), image.dtype)
        (expected,) = jax.vjp(convolve, large)[1](image)
        found = ops.conv_transpose2d(image, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_layer_has_the_parameters_and_values_of_flax():
    image, _ = arrays(dtype=jnp.float32)
    bias = nn.initializers.normal()
    own = ops.ConvTranspose(3, (4, 4), bias_init=bias)
    flax = nn.ConvTranspose(3, (4, 4), (2, 2), bias_init=bias)
    variables = own.init(jax.random.key(1), image)
    jax.tree.map(np.testing.assert_array_equal, variables, flax.init(jax.random.key(1), image))
    found, expected = own.apply(variables, image), flax.apply(variables, image)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_add_up_in_thirty_two():
    image, kernel = arrays(dtype=jnp.float32)
    narrow = ops.conv_transpose2d(
        image.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), lowering="im2col"
    )
    assert narrow.dtype == jnp.bfloat16
    expected = ops.conv_transpose2d(
        *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (image, kernel)), lowering="im2col"
    )
    np.testing.assert_array_equal(narrow, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("kernel", "strides", "words"),
    [
        (jnp.ones((4, 4, 3, 1)), (2, 2), "not shapes"),
        (jnp.ones((4, 4, 2, 1), jnp.bfloat16), (2, 2), "one dtype"),
        (jnp.ones((2, 2, 2, 1)), (3, 3), "leaves gaps"),
        (jnp.ones((2, 2, 2, 1)), (0, 1), "positive"),
    ],
)
def test_what_does_not_fit_is_refused(kernel, strides, words):
    with pytest.raises(UserError, match=words):
        ops.conv_transpose2d(jnp.ones((1, 4, 4, 2)), kernel, strides=strides)


@pytest.mark.parametrize(("window", "strides"), FORMS)
@pytest.mark.parametrize("lowering", ["lax", "im2col", "auto"])
def test_a_turned_kernel_is_pytorchs(window, strides, lowering):
    with jax.enable_x64(True):
        image, kernel = arrays(window)
        turned = ops.conv_transpose2d(
            image, kernel, strides=strides, turned=True, lowering=lowering
        )
        plain = ops.conv_transpose2d(image, kernel[::-1, ::-1], strides=strides, lowering="lax")
    np.testing.assert_allclose(turned, plain, rtol=1e-12, atol=1e-12)


def test_windows_that_do_not_overlap_are_one_product():
    """The bits of what computed the U-Net's before, a matrix product and a change of layout."""
    image, kernel = arrays((2, 2), jnp.float32)
    bias = jnp.arange(3, dtype=jnp.float32) / 7

    @jax.jit
    def product(image, kernel, bias):
        batch, height, width, channels = image.shape
        taps = jnp.matmul(image, kernel.transpose(2, 0, 1, 3).reshape(channels, -1))
        taps = taps.reshape(batch, height, width, 2, 2, -1) + bias
        return taps.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)

    layer = ops.ConvTranspose(3, (2, 2), turned=True)
    variables = {"params": {"kernel": kernel, "bias": bias}}
    np.testing.assert_array_equal(
        jax.jit(layer.apply)(variables, image), product(image, kernel, bias)
    )
    names = jax.eval_shape(layer.init, jax.random.key(0), image)["params"]
    assert {name: leaf.shape for name, leaf in names.items()} == {
        "kernel": (2, 2, 2, 3),
        "bias": (3,),
    }
