"""Residual networks: sizes counted by hand, shortcuts and branches by their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, trees
from cnnjax.errors import UserError
from cnnjax.models import resnet
from cnnjax.models.layers import Layers
from tests.models.quick import quick_apply, quick_init

KEY = jax.random.key(0)
LAYERS = Layers().factories(train=False)


def shapes(model, side, channels=3):
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return jax.eval_shape(model.init, KEY, image)


def cifar_resnet_parameters(blocks_per_stage):
    """3x3 convolutions of 16, 32 and 64 channels, each with scale and shift; dense to 10."""
    total = 3 * 9 * 16 + 2 * 16
    channels = 16
    for width in (16, 32, 64):
        for _ in range(blocks_per_stage):
            total += 9 * channels * width + 9 * width * width + 2 * 2 * width
            channels = width
    return total + 64 * 10 + 10


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_cifar_resnet_has_the_parameters_of_the_paper(depth, millions):
    """arXiv 1512.03385, Table 6; exactly as counted by hand."""
    model = models.create(f"cifar_resnet{depth}", num_classes=10)
    params = shapes(model, 32)["params"]
    assert trees.count_parameters(params) == cifar_resnet_parameters((depth - 2) // 6)
    assert round(trees.count_parameters(params) / 1e6, 2) == millions
    kernels = [path for path in trees.named_leaves(params) if path.endswith("kernel")]
    assert len(kernels) == depth


@pytest.mark.parametrize(
    ("depth", "widening", "millions"),
    [(16, 8, 11.0), (28, 2, 1.5), (28, 10, 36.5), (40, 2, 2.2), (40, 4, 8.9)],
)
def test_wide_resnet_has_the_parameters_of_the_paper(depth, widening, millions):
    """arXiv 1605.07146, Tables 4 and 5; 28 layers include the projections."""
    total, macs, statistics, channels = 3 * 9 * 16, 3 * 9 * 16 * 32**2, 0, 16
    for width, side in ((16 * widening, 32), (32 * widening, 16), (64 * widening, 8)):
        total += channels * width
        macs += channels * width * side**2
        for _ in range((depth - 4) // 6):
            total += 2 * channels + 9 * channels * width + 2 * width + 9 * width * width
            macs += (9 * channels * width + 9 * width * width) * side**2
            statistics += 2 * channels + 2 * width
            channels = width
    total += 2 * channels + channels * 10 + 10
    row = models.MODELS[f"wide_resnet{depth}_{widening}"]
    assert row.parameters == total
    assert (row.macs, row.statistics) == (macs + channels * 10, statistics + 2 * channels)
    assert round(total / 1e6, 1) == millions


def test_basic_network_projects_only_where_the_shape_changes():
    params = shapes(models.create("resnet18", num_classes=1000), 224)["params"]
    projections = {path for path in trees.named_leaves(params) if "downsample/conv" in path}
    assert projections == {f"stage{n}/block1/downsample/conv/kernel" for n in (2, 3, 4)}
    bottleneck = shapes(models.create("resnet50", num_classes=1000), 224)["params"]
    assert bottleneck["stage1"]["block1"]["downsample"]["conv"]["kernel"].shape == (1, 1, 64, 256)


def test_option_a_shortcut_by_hand():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    expected = np.zeros((1, 2, 2, 4))
    expected[0, :, :, :2] = [[[0, 1], [4, 5]], [[16, 17], [20, 21]]]
    np.testing.assert_array_equal(resnet.pad_shortcut(x, 4, 2), expected)

    block = resnet.ResidualBlock(resnet.basic_branch(4, 2), LAYERS, "pad")
    variables = quick_init(block, x)
    assert set(variables["params"]) == {"conv1", "norm1", "conv2", "norm2"}
    variables["params"]["norm2"] = jax.tree.map(jnp.zeros_like, variables["params"]["norm2"])
    np.testing.assert_array_equal(quick_apply(block, variables, x), expected)


def test_zero_init_residual_starts_every_block_as_the_identity():
    x = jnp.abs(jax.random.normal(KEY, (2, 4, 4, 8)))
    for zero in (True, False):
        block = resnet.ResidualBlock(
            resnet.bottleneck_branch(2, 1, version="v1.5"), LAYERS, zero_init_residual=zero
        )
        output = quick_apply(block, quick_init(block, x), x)
        assert np.array_equal(output, x) == zero


def test_pre_activation_block_is_the_identity_without_its_last_convolution():
    """Nothing stands on the shortcut, not even an activation (arXiv 1603.05027, section 2)."""
    x = jax.random.normal(KEY, (2, 4, 4, 8))
    block = resnet.PreActivationBlock(resnet.basic_branch(8, 1), LAYERS)
    variables = quick_init(block, x)
    variables["params"]["conv2"]["kernel"] *= 0
    np.testing.assert_array_equal(quick_apply(block, variables, x), x)


@pytest.mark.parametrize(("version", "side"), [("v1", 2), ("v1.5", 4)])
def test_version_places_the_stride(version, side):
    model = resnet.ResNet((1, 1), stem="cifar", features=4, num_classes=3, version=version)

    def outputs(image):
        variables = model.init(KEY, image)
        names = ["stage2/block1/conv1", "stage2/block1/conv2", "stage2"]
        return models.features(model, variables, image, names)

    found = jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32))
    sides = {name.removeprefix("stage2/block1/"): value.shape[1] for name, value in found.items()}
    assert sides == {"conv1": side, "conv2": 2, "stage2": 2}


def test_grouped_and_wide_bottlenecks():
    resnext = resnet.bottleneck_branch(64, 1, groups=32, width_per_group=4, version="v1.5")
    assert resnext == ((128, 1, 1, 1), (128, 3, 1, 32), (256, 1, 1, 1))
    wide = resnet.bottleneck_branch(512, 2, width_per_group=128, version="v1.5")
    assert wide == ((1024, 1, 1, 1), (1024, 3, 2, 1), (2048, 1, 1, 1))


def test_squeeze_excite_reduces_by_16():
    params = shapes(models.create("se_resnet50", num_classes=1000), 224)["params"]
    assert params["stage3"]["block2"]["se"]["fc1"]["kernel"].shape == (1, 1, 1024, 64)


def test_imagenet_stem_pools_a_constant_to_itself_at_the_border():
    """Padding of the pool is minus infinity: a zero would win over a negative constant."""
    image = jnp.zeros((1, 8, 8, 3))
    stem = resnet.Stem("imagenet", 4, Layers(activation=lambda x: x).factories(train=False))
    variables = quick_init(stem, image)
    variables["params"]["norm"]["bias"] -= 5.0
    np.testing.assert_array_equal(quick_apply(stem, variables, image), jnp.full((1, 2, 2, 4), -5.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "botleneck"}, "unknown block 'botleneck': did you mean bottleneck"),
        ({"version": "v3"}, "unknown version 'v3'"),
        ({"shortcut": "padd"}, "unknown shortcut 'padd': did you mean pad"),
        ({"block": "basic", "groups": 32}, "groups=32 and width_per_group=64 need block="),
        ({"version": "v2", "zero_init_residual": True}, "zero_init_residual=True needs version"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(options, message):
    with pytest.raises(UserError, match=message):
        shapes(resnet.ResNet((1,), **options), 32)
