"""Branches folded into one convolution: the same outputs from fewer parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, trees
from cnnjax.errors import UserError
from cnnjax.models.reparametrize import BranchedConv, identity_kernel, reparametrize, widened
from tests.models.quick import quick_apply, quick_init
from tests.models.test_families import IMAGE, MODELS, random_variables, train_outputs

NAMES = ("repvgg", "mobileone", "fastvit")


def assert_same_outputs(model, variables):
    before = jax.tree.map(np.array, variables)
    deployed, fewer = reparametrize(model, variables)
    # The function is pure.
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, variables))
    shapes = jax.eval_shape(deployed.init, jax.random.key(0), IMAGE)
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(jnp.shape, shapes)
    assert trees.count_parameters(fewer) < trees.count_parameters(variables)
    outputs, expected = quick_apply(deployed, fewer, IMAGE), quick_apply(model, variables, IMAGE)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_with_random_statistics(name):
    assert_same_outputs(MODELS[name], random_variables(MODELS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_with_statistics_from_training(name):
    model = MODELS[name]
    variables = random_variables(model)
    for seed in range(3):
        image = jax.random.normal(jax.random.key(seed), IMAGE.shape)
        _, updates = train_outputs(model, variables, image, jax.random.key(seed))
        variables = variables | updates
    assert_same_outputs(model, variables)


def test_kernel_by_hand():
    """Without norms' effect the kernels add up: 3x3, 1x1 at the center, and the identity."""
    layers = models.Layers(norm_epsilon=0.0).factories(train=False)
    image = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    conv = BranchedConv(2, (3, 1), layers)
    variables = quick_init(conv, image)
    params = variables["params"]
    small, large = params["branch2"]["conv"]["kernel"], params["branch1"]["conv"]["kernel"]
    expected = np.asarray(large).copy()
    expected[1, 1] += np.asarray(small)[0, 0] + np.eye(2)
    deployed = BranchedConv(2, (3, 1), layers, deployed=True)
    folded = {"params": {"conv": {"kernel": jnp.asarray(expected), "bias": jnp.zeros(2)}}}
    np.testing.assert_allclose(
        quick_apply(deployed, folded, image), quick_apply(conv, variables, image), atol=1e-5
    )


def test_identity_kernel_of_groups_and_margins():
    image = jax.random.normal(jax.random.key(0), (1, 5, 5, 6))
    for groups in (1, 2, 6):
        kernel = identity_kernel((3, 3, 6 // groups, 6))
        output = jax.lax.conv_general_dilated(
            image,
            jnp.asarray(kernel, jnp.float32),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        np.testing.assert_allclose(output, image, rtol=1e-6)
    wide = widened(np.ones((1, 1, 2, 3)), 5)
    assert wide.shape == (5, 5, 2, 3)
    assert wide.sum() == wide[2, 2].sum() == 6


def test_what_cannot_be_folded_is_one_clear_error():
    variables = {"params": {}, "batch_stats": {}}
    with pytest.raises(UserError, match="ResNet has no deployed form"):
        reparametrize(MODELS["resnet"], variables)
    with pytest.raises(UserError, match="only batch norm"):
        reparametrize(models.with_fields(MODELS["repvgg"], norm="group"), variables)
    with pytest.raises(UserError, match="deployed already"):
        reparametrize(models.with_fields(MODELS["repvgg"], deployed=True), variables)
