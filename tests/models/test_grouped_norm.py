"""Batch normalization by groups: against its definition, and as one function on any devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cnnjax import models
from cnnjax.errors import UserError
from cnnjax.models.grouped_norm import GroupedBatchNorm
from cnnjax.models.norms import norm_layer

X = np.random.default_rng(0).normal(3.0, 2.0, (16, 3, 5, 4)).astype(np.float32)
SCALE, BIAS = np.float32([1.0, -2.0, 0.5, 3.0]), np.float32([0.0, 1.0, -1.0, 2.0])
VARIABLES = {
    "params": {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)},
    "batch_stats": {"mean": jnp.arange(4.0), "var": jnp.arange(4.0) + 1},
}


def apply(module, x, **options):
    return module.apply(VARIABLES, x, mutable=["batch_stats"], **options)


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_each_group_is_normalized_by_its_own_moments(size):
    y, updated = apply(GroupedBatchNorm(size, momentum=0.9, epsilon=1e-5), X)
    means, variances = [], []
    for start in range(0, 16, size):
        group = X[start : start + size].astype(np.float64)
        means.append(group.mean((0, 1, 2)))
        variances.append(group.var((0, 1, 2)))
        expected = (group - means[-1]) / np.sqrt(variances[-1] + 1e-5) * SCALE + BIAS
        np.testing.assert_allclose(y[start : start + size], expected, atol=3e-5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * np.arange(4) + 0.1 * np.mean(means, 0), 1e-5)
    running = 0.9 * (np.arange(4) + 1) + 0.1 * np.mean(variances, 0)
    np.testing.assert_allclose(stats["var"], running, 1e-5)


def test_one_group_is_flax_batch_norm_gradients_included():
    ours, theirs = GroupedBatchNorm(16, momentum=0.9), nn.BatchNorm(False, momentum=0.9)

    def objective(module):
        def scalar(params, x):
            y, updated = module.apply(VARIABLES | {"params": params}, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updated)

        return jax.grad(scalar, argnums=(0, 1), has_aux=True)(VARIABLES["params"], X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), objective(ours), objective(theirs)
    )


@pytest.mark.parametrize("size", [1, 8])
def test_groups_are_the_same_however_the_batch_is_divided(size):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def gradients(module):
        def scalar(x):
            y, updated = apply(module, x)
            return jnp.sum(jnp.sin(y)), (y, updated)

        return jax.grad(scalar, has_aux=True)

    expected = gradients(GroupedBatchNorm(size))(X)
    mapped = jax.shard_map(
        gradients(GroupedBatchNorm(size, axis_name="data")),
        mesh=mesh,
        in_specs=split,
        out_specs=(split, (split, whole)),
        check_vma=False,
    )
    placed = jax.device_put(X, jax.sharding.NamedSharding(mesh, split))
    for other in (jax.jit(mapped)(X), jax.jit(gradients(GroupedBatchNorm(size)))(placed)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, other)


def test_bfloat16_is_normalized_in_float32():
    exact, _ = apply(GroupedBatchNorm(4), jnp.asarray(X, jnp.bfloat16).astype(jnp.float32))
    y, updated = apply(GroupedBatchNorm(4, dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert updated["batch_stats"]["var"].dtype == jnp.float32
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_every_network_with_batch_norm_can_group():
    for name in models.list_models():
        fields = models.model_fields(name)
        assert ("norm_group_size" in fields) == ("axis_name" in fields), name


def test_a_batch_that_is_not_made_of_groups_is_refused():
    model = models.create("cnn_32_64", num_classes=3, norm="batch", norm_group_size=3)
    image = jnp.zeros((4, 28, 28, 1))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    with pytest.raises(UserError, match="norm_group_size is 3: a batch of 4 examples cannot"):
        jax.eval_shape(lambda v: model.apply(v, image, train=True, mutable=True), variables)


def test_groups_without_batch_norm_are_refused():
    with pytest.raises(UserError, match="norm_group_size is 8 with norm='group': give a positive"):
        norm_layer("group", train=True, group_size=8)
    with pytest.raises(UserError, match="norm_group_size is -1 with norm='batch'"):
        norm_layer("batch", train=True, group_size=-1)
