"""The running variance of PyTorch, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import models
from cnnjax.models.norms import norm_layer

X = np.random.default_rng(0).normal(1, 2, (4, 3, 2, 5)).astype(np.float32)


def layer(norm, **options):
    return norm_layer(norm, train=True, momentum=0.9, **options)(name=None)


def test_running_statistics_average_unbiased_variances():
    """PyTorch's documentation of BatchNorm2d: the running variance is of the unbiased estimator."""
    unbiased = layer("batch_unbiased")
    variables = unbiased.init(jax.random.key(0), X)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(5))
    expected = np.ones(5)
    for step in range(2):
        y, updated = unbiased.apply(variables, X * (step + 1), mutable=["batch_stats"])
        variables = {**variables, **updated}
        expected = 0.9 * expected + 0.1 * (X * (step + 1)).reshape(-1, 5).var(0, ddof=1)
    np.testing.assert_allclose(variables["batch_stats"]["var"], expected, rtol=1e-5)
    biased, _ = layer("batch").apply(variables, X * 2, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, biased)


def test_evaluation_and_names_are_those_of_batch_norm():
    variables = layer("batch").init(jax.random.key(0), X)
    ours = layer("batch_unbiased").init(jax.random.key(0), X)
    assert jax.tree.structure(ours) == jax.tree.structure(variables)
    outputs = [
        norm_layer(norm, train=False)(name=None).apply(variables, X)
        for norm in ("batch", "batch_unbiased")
    ]
    np.testing.assert_array_equal(*outputs)


def test_devices_count_together():
    whole = layer("batch_unbiased")
    variables = whole.init(jax.random.key(0), X)
    _, expected = whole.apply(variables, X, mutable=["batch_stats"])
    shared = layer("batch_unbiased", axis_name="device")
    _, updated = jax.vmap(
        lambda x: shared.apply(variables, x, mutable=["batch_stats"]), axis_name="device"
    )(X.reshape(2, 2, 3, 2, 5))
    for name in ("mean", "var"):
        for device in range(2):
            np.testing.assert_allclose(
                updated["batch_stats"][name][device], expected["batch_stats"][name], rtol=1e-5
            )


def test_a_single_value_keeps_the_statistics_finite():
    norm = layer("batch_unbiased")
    x = jnp.ones((1, 1, 1, 3))
    _, updated = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 * np.ones(3))


def test_a_model_takes_it_by_name():
    model = models.create("cifar_resnet20", num_classes=10, norm="batch_unbiased")
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert variables["batch_stats"]["stem"]["norm"]["var"].shape == (16,)
