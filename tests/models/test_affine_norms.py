"""Normalization in few passes is Flax's: same variables, values, statistics and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from cnnjax.models import affine_norms
from cnnjax.models.layers import gelu

IMAGE = jax.random.normal(jax.random.key(0), (16, 5, 4, 6)) * 2 + 1
COTANGENT = jax.random.normal(jax.random.key(1), IMAGE.shape)
PAIRS = {
    "batch": (affine_norms.BatchNorm, nn.BatchNorm, {"use_running_average": False}),
    "batch, evaluated": (affine_norms.BatchNorm, nn.BatchNorm, {"use_running_average": True}),
    "layer": (affine_norms.LayerNorm, nn.LayerNorm, {}),
    "no scale": (
        affine_norms.BatchNorm,
        nn.BatchNorm,
        {"use_running_average": False, "use_scale": False},
    ),
    "layer without bias": (affine_norms.LayerNorm, nn.LayerNorm, {"use_bias": False}),
}


def random_variables(layer):
    variables = layer.init(jax.random.key(2), IMAGE)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    values = [
        1 + jax.random.uniform(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def pullback(layer, variables, image):
    """Value, new statistics, and the gradients of parameters and image."""

    def apply(params, image):
        return layer.apply({**variables, "params": params}, image, mutable=["batch_stats"])

    params = variables.get("params", {})
    value, gradients, statistics = jax.vjp(apply, params, image, has_aux=True)
    return value, statistics, gradients(COTANGENT.astype(value.dtype))


@pytest.mark.parametrize("name", PAIRS)
def test_equals_flax(name):
    ours, theirs, options = PAIRS[name]
    variables = random_variables(theirs(**options))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, ours(**options).init(jax.random.key(2), IMAGE)
    )
    found = jax.jit(functools.partial(pullback, ours(**options)))(variables, IMAGE)
    expected = jax.jit(functools.partial(pullback, theirs(**options)))(variables, IMAGE)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("layer", [affine_norms.BatchNorm, affine_norms.LayerNorm])
def test_derivatives_agree_with_finite_differences(layer):
    options = {"use_running_average": False} if layer is affine_norms.BatchNorm else {}
    with jax.enable_x64(True):
        image = IMAGE[:3].astype("float64")
        variables = jax.tree.map(
            lambda leaf: leaf.astype("float64"), random_variables(layer(**options))
        )

        def apply(image):
            return layer(**options).apply(variables, image, mutable=["batch_stats"])[0] ** 2

        # Flax's statistics are float32 or wider: here float64.
        check_grads(jax.jit(apply), (image,), order=2, eps=1e-5)


@pytest.mark.parametrize("layer", [affine_norms.BatchNorm, affine_norms.LayerNorm])
def test_16_bits_in_and_out_with_statistics_in_32(layer):
    options = {"use_running_average": False} if layer is affine_norms.BatchNorm else {}
    layer = layer(dtype=jnp.bfloat16, **options)
    variables = layer.init(jax.random.key(0), IMAGE)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    value, _ = layer.apply(variables, IMAGE.astype(jnp.bfloat16), mutable=["batch_stats"])
    assert value.dtype == jnp.bfloat16
    whole, _ = layer.clone(dtype=jnp.float32).apply(variables, IMAGE, mutable=["batch_stats"])
    np.testing.assert_allclose(value.astype("float32"), whole, atol=0.04)


def test_statistics_of_all_devices():
    layer = affine_norms.BatchNorm(use_running_average=False, axis_name="data")
    whole = affine_norms.BatchNorm(use_running_average=False)
    variables = random_variables(whole)

    def apply(image):
        return layer.apply(variables, image, mutable=["batch_stats"])

    data, same = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    mapped = jax.shard_map(apply, mesh=mesh, in_specs=data, out_specs=(data, same))
    found = jax.jit(mapped)(IMAGE)
    expected = whole.apply(variables, IMAGE, mutable=["batch_stats"])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


def test_gelu_is_flaxs_exact_one():
    x = jnp.linspace(-8, 8, 1001)
    exact = functools.partial(nn.gelu, approximate=False)
    np.testing.assert_allclose(gelu(x), exact(x), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(exact))(x), atol=1e-6, rtol=1e-6
    )
    assert gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
