"""ConvNeXt: the block by its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.models import convnext
from tests.models.quick import quick_apply, quick_init

KEY = jax.random.key(0)


def test_block_by_hand():
    """A depthwise kernel that is 1 at its center leaves norm, dense, GELU, dense, scale."""
    layers = convnext.ConvNeXt.layers.factories(train=False)
    block = convnext.ConvNeXtBlock(layers, layer_scale_init=0.5)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 3, 3, 4)).astype(np.float32)
    params = quick_init(block, jnp.asarray(x))["params"]
    expand, project = generator.normal(size=(4, 16)), generator.normal(size=(16, 4))
    center = np.zeros((7, 7, 1, 4), np.float32)
    center[3, 3] = 1
    params["depthwise"]["kernel"] = jnp.asarray(center)
    params["expand"]["kernel"] = jnp.asarray(expand, jnp.float32)
    params["project"]["kernel"] = jnp.asarray(project, jnp.float32)

    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    y = y @ expand
    y = y * np.vectorize(normal_distribution)(y)
    expected = x + 0.5 * (y @ project)
    output = quick_apply(block, {"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


def normal_distribution(value):
    return 0.5 * (1 + float(jax.scipy.special.erf(value / np.sqrt(2))))


def test_layer_scale_starts_at_a_millionth_so_that_blocks_start_near_the_identity():
    model = convnext.ConvNeXt((2,), (4,), 3)
    params = quick_init(model, jnp.zeros((1, 8, 8, 3)))["params"]
    for block in params["stage1"].values():
        np.testing.assert_array_equal(block["layer_scale"], np.full(4, 1e-6, np.float32))


def test_features_before_the_head_are_normalized():
    image = jax.random.normal(KEY, (2, 8, 8, 3))
    model = convnext.ConvNeXt((1,), (16,), None)
    features = quick_apply(model, quick_init(model, image), image)
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(-1), 1, rtol=1e-2)


def test_response_norm_by_hand():
    """A channel with all of the energy doubles, with a scale of 1/2 and one of two channels."""
    x = np.zeros((1, 2, 2, 2), np.float32)
    x[0, :, :, 0] = [[3.0, 0.0], [0.0, 4.0]]
    params = {"scale": jnp.full(2, 0.5), "bias": jnp.asarray([0.0, 1.0])}
    norm = convnext.ResponseNorm(epsilon=0.0)
    output = quick_apply(norm, {"params": params}, jnp.asarray(x))
    # The roots of the energies are 5 and 0, their mean is 2.5.
    np.testing.assert_allclose(output[..., 0], 2 * x[..., 0], rtol=1e-6)
    np.testing.assert_allclose(output[..., 1], 1.0)
    gradient = jax.grad(lambda x: norm.apply({"params": params}, x).sum())(jnp.asarray(x))
    assert np.isfinite(gradient).all()


def test_second_version_has_no_layer_scale():
    model = convnext.ConvNeXt((1,), (4,), 3, layer_scale_init=None, response_norm=True)
    block = quick_init(model, jnp.zeros((1, 8, 8, 3)))["params"]["stage1"]["block1"]
    assert set(block) == {"depthwise", "norm", "expand", "response_norm", "project"}
