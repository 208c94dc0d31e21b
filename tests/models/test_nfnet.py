"""NFNet: scaled weight standardization, and the bookkeeping of the signal's variance."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.errors import UserError
from cnnjax.models import nfnet
from tests.models.quick import quick_apply, quick_init

KEY = jax.random.key(0)


def test_standardized_convolution_ignores_shift_and_scale_of_its_kernel():
    """Gain times (kernel - mean) / sqrt(fan_in * variance): equation 1 of arXiv 2101.08692."""
    x = jax.random.normal(KEY, (1, 4, 4, 6))
    conv = nfnet.WSConv(8, 1)
    variables = quick_init(conv, x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)[0, 0]
    standardized = (kernel - kernel.mean(0)) / np.sqrt(6 * kernel.var(0))
    expected = np.asarray(x) @ standardized
    np.testing.assert_allclose(quick_apply(conv, variables, x), expected, rtol=1e-4, atol=1e-5)

    variables["params"]["kernel"] = 3 * variables["params"]["kernel"] + 0.7
    np.testing.assert_allclose(quick_apply(conv, variables, x), expected, rtol=1e-4, atol=1e-4)
    variables["params"] |= {"gain": jnp.full(8, 2.0), "bias": jnp.full(8, 0.5)}
    np.testing.assert_allclose(
        quick_apply(conv, variables, x), 2 * expected + 0.5, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", nfnet.SCALED_ACTIVATIONS)
def test_scaled_activations_keep_unit_variance(name):
    """By integration over the standard normal; the authors' constants are good to 0.2%."""
    z = np.linspace(-8, 8, 8_001)
    weight = np.exp(-(z**2) / 2)
    weight /= weight.sum()
    y = np.asarray(nfnet.scaled_activation(name)(jnp.asarray(z, jnp.float32)))
    variance = (weight * y**2).sum() - (weight * y).sum() ** 2
    np.testing.assert_allclose(variance, 1, atol=4e-3)


def test_each_block_divides_by_the_expected_deviation_of_its_input():
    """Variance grows by alpha squared = 0.04 a block and restarts from 1 + 0.04 in each stage."""
    model = nfnet.NFNet((2, 3), (8, 16), 3, "cifar", group_width=4)
    betas = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nfnet.NFBlock) and context.method_name == "__call__":
            betas.append(context.module.beta)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    variances = [1.0, 1.04, 1.08, 1.04, 1.08]
    np.testing.assert_allclose(betas, 1 / np.sqrt(variances), rtol=1e-6)


def test_blocks_start_as_their_shortcut():
    """Bachlechner et al.'s SkipInit: the branch's gain starts at zero."""
    model = nfnet.NFNet((2,), (8,), 3, "cifar", group_width=4)
    params = quick_init(model, jnp.zeros((1, 8, 8, 3)))["params"]["stage1"]
    assert [float(block["skip_gain"]) for block in params.values()] == [0, 0]
    assert "downsample" in params["block1"]
    assert "downsample" not in params["block2"]


def test_unknown_activation_names_the_nearest():
    with pytest.raises(UserError, match="unknown activation 'gellu': did you mean gelu"):
        nfnet.scaled_activation("gellu")
