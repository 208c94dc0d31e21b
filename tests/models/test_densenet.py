"""DenseNet: growth, transitions and the CIFAR network's size by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import models, trees
from cnnjax.models import densenet
from cnnjax.models.layers import Layers
from tests.models.quick import quick_apply, quick_init

KEY = jax.random.key(0)
LAYERS = Layers().factories(train=False)


def test_cifar_network_by_hand():
    """arXiv 1608.06993, Table 2: DenseNet-BC (100, 12) has 0.8 million parameters."""
    total, channels = 3 * 9 * 24, 24
    for stage in range(3):
        for _ in range(16):
            total += 2 * channels + channels * 48 + 2 * 48 + 9 * 48 * 12
            channels += 12
        if stage < 2:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
    total += 2 * channels + channels * 10 + 10
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(models.create("cifar_densenet_bc100", num_classes=10).init, KEY, image)[
        "params"
    ]
    assert trees.count_parameters(params) == total
    assert round(total / 1e6, 1) == 0.8
    convolutions = [path for path in trees.named_leaves(params) if path.endswith("kernel")]
    assert len(convolutions) == 100


def test_layer_appends_its_features_to_its_input():
    x = jax.random.normal(KEY, (2, 4, 4, 6))
    layer = densenet.DenseLayer(5, LAYERS)
    variables = quick_init(layer, x)
    output = quick_apply(layer, variables, x)
    assert output.shape == (2, 4, 4, 11)
    np.testing.assert_array_equal(output[..., :6], x)
    assert variables["params"]["conv1"]["kernel"].shape == (1, 1, 6, 20)
    assert variables["params"]["conv2"]["kernel"].shape == (3, 3, 20, 5)


def test_transition_averages_2x2_and_halves_the_features():
    x = jnp.abs(jax.random.normal(KEY, (1, 4, 4, 4)))
    transition = densenet.Transition(LAYERS)
    variables = quick_init(transition, x)
    variables["params"]["conv"]["kernel"] = jnp.eye(4, 2)[None, None]
    expected = x[..., :2].reshape(1, 2, 2, 2, 2, 2).mean(axis=(2, 4)) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(quick_apply(transition, variables, x), expected, rtol=1e-5)
