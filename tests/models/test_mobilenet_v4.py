"""MobileNet v4: which convolutions a block has, and where its stride is."""

import jax
import jax.numpy as jnp
import pytest

from cnnjax.models.layers import Layers
from cnnjax.models.mobilenet_v4 import UniversalBottleneck

LAYERS = Layers().factories(train=False)


@pytest.mark.parametrize(
    ("start", "middle", "strides", "parts", "side"),
    [
        (5, 3, 2, ["start", "expand", "depthwise", "project"], 4),
        (3, 0, 2, ["start", "expand", "project"], 4),
        (0, 3, 2, ["expand", "depthwise", "project"], 4),
        (0, 0, 1, ["expand", "project"], 8),
    ],
)
def test_block_has_the_convolutions_of_its_kernels(start, middle, strides, parts, side):
    block = UniversalBottleneck(6, 12, start, middle, strides, LAYERS)
    image = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    output, variables = jax.eval_shape(block.init_with_output, jax.random.key(0), image)
    assert set(variables["params"]) == set(parts)
    assert output.shape == (1, side, side, 6)
    kernels = {name: part["conv"]["kernel"].shape for name, part in variables["params"].items()}
    if start:
        assert kernels["start"] == (start, start, 1, 4)
    if middle:
        assert kernels["depthwise"] == (middle, middle, 1, 12)
