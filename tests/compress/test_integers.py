"""Few bits: bounds of the rounding error, exact zeros, packing, derivatives straight through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax.compress.quantization import integers, lsq
from cnnjax.errors import UserError

RNG = np.random.default_rng(0)


@given(
    low=st.floats(-100, 0, width=32),
    high=st.floats(0, 100, width=32),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_an_activation_is_off_by_half_a_step_at_most(low, high, bits, symmetric):
    scale, zero = integers.activation_scale(low, high, bits, symmetric=symmetric)
    x = np.linspace(low, high, 41, dtype=np.float32)
    codes = np.asarray(integers.quantize(jnp.asarray(x), scale, zero, bits))
    restored = np.asarray(integers.dequantize(jnp.asarray(codes), scale, zero))
    # The zero point is a whole number: it may move the ends of the range by half a step.
    assert np.abs(restored - x).max() <= scale * (1 + 1e-3)
    inside = (x > low + scale) & (x < high - scale)
    assert np.abs(restored - x)[inside].max(initial=0) <= scale / 2 * (1 + 1e-3)
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1


@given(low=st.floats(-9, 0, width=32), high=st.floats(0, 9, width=32), bits=st.integers(2, 8))
def test_zero_is_exact_and_rounding_twice_changes_nothing(low, high, bits):
    scale, zero = integers.activation_scale(low, high, bits)
    assert float(integers.offsets(jnp.zeros(()), scale, zero, bits)) == 0
    once = integers.quantize(jnp.linspace(low, high, 17), scale, zero, bits)
    again = integers.quantize(integers.dequantize(once, scale, zero), scale, zero, bits)
    assert np.array_equal(once, again)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_is_off_by_half_a_step_of_its_channel(bits):
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 5)) * 10.0 ** np.arange(-2, 3), jnp.float32)
    scale = integers.weight_scale(kernel, bits)
    codes = integers.quantize_weight(kernel, scale, bits)
    bound = 2 ** (bits - 1) - 1
    assert np.abs(codes).max(axis=(0, 1, 2)).tolist() == [bound] * 5
    error = np.abs(integers.dequantize_weight(codes, scale) - kernel)
    assert (error <= np.asarray(scale) / 2 * (1 + 1e-5)).all()
    again = integers.quantize_weight(integers.dequantize_weight(codes, scale), scale, bits)
    assert np.array_equal(codes, again)


def test_clipping_has_no_larger_squared_error():
    kernel = jnp.asarray(RNG.standard_t(3, size=(5, 5, 8, 6)), jnp.float32)
    errors = {}
    for clip in ("absmax", "mse"):
        scale = integers.weight_scale(kernel, 4, clip=clip)
        codes = integers.quantize_weight(kernel, scale, 4)
        error = integers.dequantize_weight(codes, scale) - kernel
        errors[clip] = np.sum(np.square(error), axis=(0, 1, 2))
    assert (errors["mse"] <= errors["absmax"]).all()
    assert errors["mse"].sum() < 0.8 * errors["absmax"].sum()


def test_a_channel_of_zeros_stays():
    kernel = jnp.zeros((3, 3, 2, 4))
    scale = integers.weight_scale(kernel, 8, clip="mse")
    assert np.isfinite(scale).all() and not np.any(integers.quantize_weight(kernel, scale, 8))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("features", [1, 5, 8])
def test_packing_gives_back_every_code(bits, features):
    bound = 2 ** (bits - 1) - 1
    codes = RNG.integers(-bound, bound + 1, size=(3, 2, features)).astype(np.int8)
    packed = integers.pack(codes, bits)
    per_byte = 8 // integers.stored_bits(bits)
    assert packed.nbytes == 6 * -(-features // per_byte)
    assert np.array_equal(integers.unpack(jnp.asarray(packed), bits, features), codes)


def test_derivatives_pass_straight_through_where_nothing_is_clipped():
    x = jnp.asarray([-10.0, -0.3, 0.2, 0.49, 10.0])
    gradient = jax.grad(lambda x: integers.offsets(x, 0.1, 3, 4).sum())(x)
    # Codes -8 to 7 less the zero point 3: -1.1 to 0.4.
    assert gradient.tolist() == pytest.approx([0, 10, 10, 0, 0])


def test_the_derivatives_of_learned_steps_are_those_of_the_paper():
    # Esser et al. 2020, equation 3, by hand: step 0.5, codes -2 to 3.
    x = jnp.asarray([-4.0, -0.6, 0.2, 0.8, 9.0])
    value, (of_x, of_step) = jax.value_and_grad(
        lambda x, s: lsq.fake_quantize(x, s, -2, 3, 4).sum(), argnums=(0, 1)
    )(x, jnp.float32(0.5))
    assert float(value) == pytest.approx(0.5 * (-2 - 1 + 0 + 2 + 3))
    assert of_x.tolist() == [0, 1, 1, 1, 0]
    inside = (-1 + 1.2) + (0 - 0.4) + (2 - 1.6)
    assert float(of_step) == pytest.approx((-2 + inside + 3) / np.sqrt(4 * 3), rel=1e-5)


def test_a_step_for_each_channel_has_a_derivative_for_each():
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 2, 4)), jnp.float32)
    step = jnp.asarray([0.1, 0.2, 0.3, 0.4])

    def loss(step):
        return (lsq.fake_quantize(kernel, step, -7, 7, 18) ** 2).sum()

    whole = jax.grad(loss)(step)
    for channel in range(4):
        one = jax.grad(
            lambda s, c=channel: (lsq.fake_quantize(kernel[..., c], s, -7, 7, 18) ** 2).sum()
        )(step[channel])
        assert float(one) == pytest.approx(float(whole[channel]), rel=1e-4)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UserError, match="give 2 to 8 bits"):
        integers.check_bits(bits, "weights")
