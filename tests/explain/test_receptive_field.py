"""Receptive fields against published ones, closed forms, and the pixels that count at all."""

from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, ops
from cnnjax.errors import UserError
from cnnjax.explain import inside
from cnnjax.models.summary import abstract_variables


def fields_of(model, image_shape):
    return inside.receptive_fields(model, abstract_variables(model, image_shape), image_shape)


def of_name(name, image_shape=None, **fields):
    row = models.MODELS[name]
    model = models.create(name, num_classes=row.num_classes, **fields)
    return model, fields_of(model, image_shape or row.image)


class Net(nn.Module):
    """What `function(self, image)` computes, as layers named by it."""

    function: object

    @nn.compact
    def __call__(self, image, *, train=False):
        return self.function(image)


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


# Araujo et al. 2019, table 1, for networks with the same definition; LeNet-5: LeCun et al. 1998.
PUBLISHED = [
    ("lenet5", {}, "stage2", 16, 4),
    ("vgg16", {}, "stage5", 212, 32),
    ("resnet18", {}, "stage4", 435, 32),
    ("mobilenet_v1", {}, "stage5", 315, 32),
]
PUBLISHED_SLOW = [
    ("resnet50", {"version": "v1"}, "stage4", 483, 32),
    ("inception_v3", {}, "stage5", 1311, 32),
    ("bagnet9", {}, "stage4", 9, 8),
    ("bagnet33", {}, "stage4", 33, 8),
]


PUBLISHED_DEEPEST = [
    ("resnet101", {"version": "v1"}, "stage4", 1027, 32),
    ("resnet152", {"version": "v1"}, "stage4", 1507, 32),
]


def check_published(name, arguments, layer, size, stride):
    _, fields = of_name(name, **arguments)
    assert (fields[layer].rows.size, fields[layer].columns.size) == (size, size)
    assert fields[layer].rows.stride == stride
    assert not fields[layer].is_infinite


@pytest.mark.parametrize(("name", "arguments", "layer", "size", "stride"), PUBLISHED)
def test_sizes_are_those_published(name, arguments, layer, size, stride):
    check_published(name, arguments, layer, size, stride)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "layer", "size", "stride"), PUBLISHED_SLOW)
def test_sizes_of_deep_networks_are_those_published(name, arguments, layer, size, stride):
    check_published(name, arguments, layer, size, stride)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "arguments", "layer", "size", "stride"), PUBLISHED_DEEPEST)
def test_sizes_of_the_deepest_networks_are_those_published(name, arguments, layer, size, stride):
    check_published(name, arguments, layer, size, stride)


def test_a_chain_of_windows_follows_the_closed_form():
    """Size 1 + sum of (window - 1) dilation times the strides before it; center of the first by
    the pads before it (Araujo et al. 2019, equations 3 and 5)."""
    chain = [(7, 2, 3, 1), (3, 2, 1, 1), (3, 1, 4, 4), (5, 3, 0, 1), (3, 1, 2, 2)]

    def function(x):
        for window, stride, pad, dilation in chain:
            kernel = jnp.ones((window, window, x.shape[-1], 2))
            pads = ((pad, pad), (pad, pad))
            x = ops.conv2d(
                x,
                kernel,
                strides=(stride, stride),
                padding=pads,
                kernel_dilation=(dilation, dilation),
            )
        return Named(name="end")(x)

    size, step, start = 1, 1, Fraction(0)
    for window, stride, pad, dilation in chain:
        size += (window - 1) * dilation * step
        start += (Fraction((window - 1) * dilation, 2) - pad) * step
        step *= stride
    side = fields_of(Net(function), (120, 120, 1))["end"].rows
    assert (side.size, side.stride, side.center) == (size, step, start)


def test_rows_and_columns_of_parallel_branches_take_the_union():
    def function(x):
        one = ops.conv2d(x, jnp.ones((1, 7, 1, 1)), padding="SAME")
        other = ops.max_pool(x, (5, 1), (1, 1), ((4, 0), (0, 0)))
        return Named(name="end")(jnp.concatenate([one, other + x], -1))

    net = Net(function)
    field = fields_of(net, (20, 20, 1))["end"]
    assert (field.rows.size, field.rows.center) == (5, -2)
    assert (field.columns.size, field.columns.center) == (7, 0)
    assert field.box(10, 10, (20, 20, 1)) == ((6, 11), (7, 14))
    # The union is no rectangle: the exact answer knows.
    (mask,) = np.asarray(inside.influence(net, {}, (20, 20, 1), "end", [(10, 10)]))
    expected = np.zeros((20, 20), bool)
    expected[6:11, 10] = expected[10, 7:14] = True
    np.testing.assert_array_equal(mask, expected)


def test_holes_of_dilated_windows_are_seen_exactly():
    net = Net(
        lambda x: Named(name="end")(
            ops.conv2d(x, jnp.ones((3, 3, 1, 1)), padding="SAME", kernel_dilation=(3, 2))
        )
    )
    masks = inside.influence(net, {}, (9, 9, 1), "end", [(4, 4), (0, 8)])
    expected = np.zeros((2, 9, 9), bool)
    expected[0][np.ix_([1, 4, 7], [2, 4, 6])] = True
    expected[1][np.ix_([0, 3], [6, 8])] = True
    np.testing.assert_array_equal(np.asarray(masks), expected)


def test_shuffled_split_and_rearranged_channels_do_not_mix_pixels():
    def function(x):
        # Blocks of 2 x 2 pixels as channels; groups exchanged; halves; every second row.
        x = x.reshape(1, 8, 2, 8, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(1, 8, 8, 8)
        x = x.reshape(1, 8, 8, 2, 4).swapaxes(3, 4).reshape(1, 8, 8, 8)
        one, other = jnp.split(x, 2, axis=-1)
        return Named(name="end")((one * nn.sigmoid(other))[:, ::2])

    field = fields_of(Net(function), (16, 16, 2))["end"]
    assert (field.rows.size, field.rows.stride, field.rows.center) == (2, 4, 0.5)
    assert (field.columns.size, field.columns.stride, field.columns.center) == (2, 2, 0.5)


def test_patches_are_told_apart_until_they_become_tokens():
    _, fields = of_name("vit_s_16", (32, 32, 3))
    field = next(iter(fields.values()))
    assert (field.rows.size, field.rows.stride, field.rows.center) == (16, 16, 7.5)


@pytest.mark.slow
def test_what_sees_all_is_said_to_and_by_which_operation():
    _, fields = of_name("efficientnet_b0")
    field = fields["stage3"]
    assert field.is_infinite
    assert "stage1/block1/se" in field.rows.whole
    # Without the gates: windows of 3 and 3, at stride 2 one of 3 and one of 3, at 4 two of 5.
    assert field.rows.size == 1 + 2 + 2 * 2 + 2 * 2 + 2 * 4 + 4 * 4 + 4 * 8
    assert str(field).startswith("the whole image through stage1/block1/se")
    assert "67 x 67 pixels, stride 8" in str(field)


def test_a_layer_behind_a_global_pool_sees_the_whole_image():
    net = Net(lambda x: Named(name="end")(jnp.mean(x, (1, 2), keepdims=True)))
    field = fields_of(net, (8, 8, 3))["end"]
    assert field.is_infinite and field.rows.size == 0
    assert field.box(0, 0, (8, 8, 3)) == ((0, 8), (0, 8))
    assert np.asarray(inside.influence(net, {}, (8, 8, 3), "end", [(0, 0)])).all()


def check_borders(name, size, layers, **arguments):
    """The box, cut at the border, is that of the pixels that can influence a unit at all."""
    channels = models.MODELS[name].image[-1]
    shape = (size, size, channels)
    model, fields = of_name(name, image_shape=shape, **arguments)
    variables = abstract_variables(model, shape)
    shapes = inside.program.trace(model, variables, shape).shapes
    for layer in layers:
        _, height, width, _ = shapes[layer]
        units = [(0, 0), (height // 2, width // 3), (height - 1, width - 1)]
        for unit, mask in zip(
            units, np.asarray(inside.influence(model, variables, shape, layer, units)), strict=True
        ):
            (top, bottom), (left, right) = fields[layer].box(*unit, shape)
            expected = np.zeros(shape[:2], bool)
            expected[max(top, 0) : bottom, max(left, 0) : right] = True
            if fields[layer].is_infinite:
                expected[:] = True
            np.testing.assert_array_equal(mask, expected, err_msg=f"{layer} {unit}")


def test_fields_are_exact_at_borders():
    check_borders("lenet5", 28, ["stage1", "stage2"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("cifar_resnet20", 32, ["stage1", "stage3"]),
        ("resnet18", 64, ["stage1", "stage4"]),
        ("hrnet_w18_small", 64, ["stage2"]),
        ("efficientnet_b0", 32, ["stage1"]),
    ],
)
def test_fields_of_families_are_exact_at_borders(name, size, layers):
    check_borders(name, size, layers)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("convnext_tiny", 64, ["stage1"]),
        ("shufflenet_v2_x0_5", 64, ["stage1"]),
        ("unet", 32, ["down3", "up3"]),
    ],
)
def test_fields_of_more_families_are_exact_at_borders(name, size, layers):
    check_borders(name, size, layers)


def test_pixels_that_no_window_reads_influence_nothing():
    """Where the last windows do not fit, the box is larger than what counts."""
    net = Net(lambda x: Named(name="end")(ops.max_pool(x, (3, 3), (2, 2), "VALID")))
    mask = np.asarray(inside.influence(net, {}, (8, 8, 1), "end", [(2, 2)]))[0]
    assert mask[4:7, 4:7].all() and mask.sum() == 9


def test_the_effective_field_of_averages_is_a_power_of_a_box():
    """Luo et al. 2016, section 3: of `n` windows of equal weights, the box convolved with itself,
    whose variance is n (k^2 - 1) / 12."""

    def function(x):
        for _ in range(6):
            x = ops.conv2d(x, jnp.ones((3, 3, 1, 1)), padding="SAME")
        return Named(name="end")(x)

    image = jax.random.normal(jax.random.key(0), (2, 33, 33, 1))
    field = np.asarray(inside.effective_field(Net(function), {}, image, "end"))
    row = np.ones(1)
    for _ in range(6):
        row = np.convolve(row, np.ones(3))
    np.testing.assert_allclose(field[10:23, 10:23], np.outer(row, row) / row.max() ** 2, rtol=1e-5)
    assert field[9].max() == 0
    marginal = field.sum(0) / field.sum()
    assert np.sum(marginal * (np.arange(33) - 16) ** 2) == pytest.approx(6 * 8 / 12, rel=1e-4)
    # Within two deviations of its middle a Gaussian is above 0.135 of its largest value.
    assert inside.effective_size(field) < 13


def test_bad_units_and_layers_are_one_error():
    model = models.create("lenet5", num_classes=10)
    variables = abstract_variables(model, (28, 28, 1))
    arguments = model, variables, (28, 28, 1)
    with pytest.raises(UserError, match=r"stage9.*stage2"):
        inside.influence(*arguments, "stage9", [(0, 0)])
    with pytest.raises(UserError, match="head is no image"):
        inside.influence(*arguments, "head", [(0, 0)])
    with pytest.raises(UserError, match=r"no unit \(4, 0\): it is 4 x 4"):
        inside.influence(*arguments, "stage2", [(4, 0)])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
    with pytest.raises(UserError, match="no unit"):
        inside.effective_field(model, zeros, jnp.zeros((1, 28, 28, 1)), "stage2", unit=(9, 9))
