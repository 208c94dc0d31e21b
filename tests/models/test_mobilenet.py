"""MobileNets: the tables' details, by the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, trees
from cnnjax.models import mobilenet
from cnnjax.models.layers import Layers
from tests.models.quick import quick_apply, quick_init


@functools.cache
def params(name, **options):
    model = models.create(name, num_classes=1000, **options)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


@pytest.mark.parametrize(("width", "millions"), [(1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)])
def test_v1_width_multiplier_has_the_parameters_of_table_6(width, millions):
    assert round(trees.count_parameters(params("mobilenet_v1", width=width)) / 1e6, 1) == millions


def test_depthwise_separable_block_filters_each_channel_then_mixes():
    """With an identity for the 1x1 convolution, channel c depends on channel c alone."""
    layers = Layers(norm="none", activation=lambda x: x).factories(train=False)
    block = mobilenet.DepthwiseSeparable(3, 1, layers)
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 3))
    variables = quick_init(block, x)
    assert variables["params"]["depthwise"]["conv"]["kernel"].shape == (3, 3, 1, 3)
    variables["params"]["pointwise"]["conv"]["kernel"] = jnp.eye(3)[None, None]
    before, after = (quick_apply(block, variables, image) for image in (x, x.at[..., 1].add(1.0)))
    change = after - before
    assert np.abs(change[..., 1]).max() > 0.01
    np.testing.assert_allclose(change[..., [0, 2]], 0, atol=1e-6)


def test_v2_first_block_does_not_expand_and_last_convolution_keeps_its_width():
    assert "expand" not in params("mobilenet_v2")["stage1"]["block1"]
    assert params("mobilenet_v2")["stage2"]["block1"]["expand"]["conv"]["kernel"].shape[-1] == 96
    thin = params("mobilenet_v2", width=0.5)
    assert thin["last"]["conv"]["kernel"].shape == (1, 1, 160, 1280)
    wide = params("mobilenet_v2", width=1.4)
    assert wide["head"]["kernel"].shape == (1792, 1000)


def test_v3_gates_stand_where_the_table_has_them():
    """Table 1: column SE; the gate has a quarter of the expanded channels, divisible by 8."""
    large = params("mobilenet_v3_large")
    gated = {
        "/".join(path.split("/")[:2]): leaf.shape[-2:]
        for path, leaf in trees.named_leaves(large).items()
        if path.endswith("se/fc1/kernel")
    }
    expanded = [72, 120, 120, 480, 672, 672, 960, 960]
    reduced = [24, 32, 32, 120, 168, 168, 240, 240]
    assert list(gated.values()) == list(zip(expanded, reduced, strict=True))
    assert set(gated) == {
        *(f"stage3/block{n}" for n in (1, 2, 3)),
        *(f"stage4/block{n}" for n in (5, 6)),
        *(f"stage5/block{n}" for n in (1, 2, 3)),
    }
    assert large["dense"]["kernel"].shape == (960, 1280)


def test_v3_activation_replaces_only_the_marked_rows():
    """With activation zero, a network of unmarked rows still passes a signal through its stage."""
    rows = (((3, 16, 16, False, False),), ((3, 16, 16, False, True),))
    alive = []
    for row in rows:
        layers = Layers(activation=jnp.zeros_like)
        model = mobilenet.MobileNetV3((row,), (1,), 8, 2, layers=layers)
        block = model._block(row[0], 1)(layers=layers.factories(train=False), name=None)
        x = jax.random.normal(jax.random.key(0), (1, 4, 4, 16))
        output = quick_apply(block, quick_init(block, x), x)
        alive.append(bool(jnp.any(output != x)))
    assert alive == [True, False]


def test_v3_has_the_papers_epsilon_and_momentum():
    model = models.create("mobilenet_v3_small", num_classes=10)
    assert (model.layers.norm_epsilon, model.layers.norm_momentum) == (1e-3, 0.99)
