"""EfficientNet: the scaled depths and widths of the authors' code."""

import re

import jax
import jax.numpy as jnp
import pytest

from cnnjax import models, trees


@pytest.mark.parametrize(
    ("name", "depths", "stem", "last"),
    [
        ("efficientnet_b0", (1, 2, 2, 3, 3, 4, 1), 32, 1280),
        pytest.param("efficientnet_b4", (2, 4, 4, 6, 6, 8, 2), 48, 1792, marks=pytest.mark.slow),
        pytest.param(
            "efficientnet_b7", (4, 7, 7, 10, 10, 13, 4), 64, 2560, marks=pytest.mark.exhaustive
        ),
        # Neither the ends' widths nor their depths are scaled.
        ("efficientnet_lite4", (1, 4, 4, 6, 6, 8, 1), 32, 1280),
    ],
)
def test_compound_scaling(name, depths, stem, last):
    model = models.create(name, num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert tuple(len(params[f"stage{n}"]) for n in range(1, 8)) == depths
    assert params["stem"]["conv"]["kernel"].shape[-1] == stem
    assert params["head"]["kernel"].shape[0] == last


def test_gate_has_a_quarter_of_the_blocks_input():
    model = models.create("efficientnet_b0", num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    for path, kernel in trees.named_leaves(params).items():
        if re.fullmatch(r"stage[2-7]/block\d/se/fc1/kernel", path):
            block = params[path.split("/")[0]][path.split("/")[1]]
            channels = block["expand"]["conv"]["kernel"].shape[2]
            assert kernel.shape[-2:] == (6 * channels, channels // 4)
    assert params["stage1"]["block1"]["se"]["fc1"]["kernel"].shape[-2:] == (32, 8)


@pytest.mark.parametrize(
    ("name", "dropout", "epsilon", "momentum"),
    [
        ("efficientnet_b0", 0.2, 1e-5, 0.9),
        ("efficientnet_b4", 0.4, 1e-5, 0.9),
        ("efficientnet_b5", 0.4, 1e-3, 0.99),
        ("efficientnet_b7", 0.5, 1e-3, 0.99),
    ],
)
def test_constants_are_those_of_torchvision(name, dropout, epsilon, momentum):
    model = models.create(name, num_classes=1000)
    assert (model.dropout_rate, model.layers.norm_epsilon, model.layers.norm_momentum) == (
        dropout,
        epsilon,
        momentum,
    )
    assert model.stochastic_depth_rate == 0.2


def test_lite_has_no_gates_and_the_constants_of_tensorflow():
    model = models.create("efficientnet_lite0", num_classes=10)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert not [path for path in trees.named_leaves(params) if "/se/" in path]
    layers = model.layers
    assert (layers.activation, layers.norm_epsilon, model.padding) == ("relu6", 1e-3, "same")
