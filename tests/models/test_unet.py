"""U-Net: the sizes of figure 1, its crops, transposed convolutions, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import models, ops
from cnnjax.errors import UserError
from cnnjax.models.layers import Layers
from cnnjax.models.unet import UNet, middle, output_side
from tests.models.quick import quick_apply, quick_init, quick_jit
from tests.models.test_families import random_variables


@pytest.fixture(autouse=True)
def plain_convolutions():
    """These tests are of the model; `lax` convolutions compile soonest."""
    with ops.lowering("lax"):
        yield


def test_parameters_by_hand():
    """Two 3x3 convolutions a level, a 2x2 and two 3x3 on the way up, 1x1 at the end; all biased."""
    widths = (64, 128, 256, 512, 1024)
    down = sum(
        9 * before * width + width + 9 * width * width + width
        for before, width in zip((1, *widths), widths, strict=False)
    )
    up = sum(
        4 * 2 * width * width + width + 9 * 2 * width * width + width + 9 * width * width + width
        for width in widths[:-1]
    )
    result = models.summary(models.create("unet_2015", num_classes=2), (572, 572, 1))
    assert result.parameters == down + up + 64 * 2 + 2 == 31_030_658


def test_published_sides_of_figure_1():
    model = models.create("unet_2015", num_classes=2)
    result = models.summary(model, (572, 572, 1))
    sides = [row.output_shape[0] for row in result.rows]
    down = [570, 568, 282, 280, 138, 136, 66, 64, 30, 28]
    up = [56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388]
    assert sides == [*down, *up, 388]
    assert result.rows[-1].output_shape == (388, 388, 2)
    assert output_side(572, 5, padded=False) == 388
    assert output_side(188, 5, padded=False) == 4


def test_padded_variant_is_as_large_as_the_image():
    model = models.create("unet", num_classes=11, widths=(4, 8, 12))
    image = jnp.zeros((2, 16, 24, 3))
    shape = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], image).shape
    assert shape == (2, 16, 24, 11)
    headless = models.create("unet", num_classes=None, widths=(4, 8, 12))
    shape = jax.eval_shape(lambda x: headless.init_with_output(jax.random.key(0), x)[0], image)
    assert shape.shape == (2, 16, 24, 4)


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("unet", 72, "side of 72 pixels.*pad it to 80"),
        ("unet_2015", 570, "side of 570 pixels.*pad it to 572"),
        ("unet_2015", 64, "side of 64 pixels.*pad it to 188"),
    ],
)
def test_sides_that_pools_cannot_halve_are_refused(name, side, message):
    model = models.create(name, num_classes=2)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 1)))


def test_middle_crops_the_center():
    image = jnp.arange(64).reshape(1, 8, 8, 1)
    np.testing.assert_array_equal(middle(image, (4, 2))[0, :, :, 0], image[0, 2:6, 3:5, 0])


def test_transposed_convolution_is_flax_turned_by_180_degrees():
    image = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    layer, flax_layer = (
        ops.ConvTranspose(6, (2, 2), turned=True),
        nn.ConvTranspose(6, (2, 2), (2, 2)),
    )
    variables = random_variables(layer, image)
    params = variables["params"]
    turned = {"params": params | {"kernel": params["kernel"][::-1, ::-1]}}
    output = quick_apply(layer, variables, image)
    assert output.shape == (2, 6, 10, 6)
    np.testing.assert_allclose(output, quick_apply(flax_layer, turned, image), rtol=1e-5, atol=1e-6)
    row, column = 2, 7
    by_hand = image[1, 1, 3] @ params["kernel"][0, 1] + params["bias"]
    np.testing.assert_allclose(output[1, row, column], by_hand, rtol=1e-5, atol=1e-6)


def test_transposed_convolution_starts_with_the_variance_of_its_fan_in():
    """Each output sees one tap of the kernel: fan-in is the channels, not four times as many."""
    model = UNet(widths=(64, 256))
    variables = quick_init(model, jnp.zeros((1, 4, 4, 1)))
    kernel = variables["params"]["up1_transposed"]["kernel"]
    assert kernel.shape == (2, 2, 256, 64)
    assert float(kernel.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)


def test_skips_carry_the_resolution():
    """With all but the skip of level 1 cut off, a pixel's change is seen next to it only."""
    model = UNet(num_classes=3, widths=(2, 4))
    image = jax.random.normal(jax.random.key(0), (1, 16, 16, 1))
    variables = random_variables(model, image)
    zero = jax.tree.map(jnp.zeros_like, variables["params"]["up1_transposed"])
    cut = {"params": variables["params"] | {"up1_transposed": zero}}
    changed = image.at[0, 8, 8].add(1.0)
    apply = quick_jit(model.apply)
    change = jnp.any(apply(cut, image) != apply(cut, changed), axis=-1)[0]
    rows, columns = np.nonzero(change)
    # Four 3x3 convolutions see four pixels far.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 12, 4, 12)
    whole = jnp.any(apply(variables, image) != apply(variables, changed), axis=-1)[0]
    assert whole.sum() > change.sum()


@pytest.mark.slow
@pytest.mark.parametrize("padded", [True, False])
def test_gradient_is_that_of_finite_differences(padded):
    with jax.enable_x64(True):
        model = UNet(
            num_classes=2,
            widths=(2, 3),
            padded=padded,
            layers=Layers(norm="none", activation="tanh"),
        )
        side = 4 if padded else 20
        image = jax.random.normal(jax.random.key(0), (1, side, side, 1), jnp.float64)
        variables = random_variables(model, image)
        leaves, structure = jax.tree.flatten(variables["params"])
        directions = [
            jax.random.normal(jax.random.key(number), leaf.shape, jnp.float64)
            for number, leaf in enumerate(leaves)
        ]

        def loss(leaves):
            logits = model.apply({"params": structure.unflatten(leaves)}, image)
            return jnp.sum(jnp.sin(logits + jnp.arange(2)))

        value = quick_jit(loss)
        for number, (slope, direction) in enumerate(
            zip(quick_jit(jax.grad(loss))(leaves), directions, strict=True)
        ):
            step = 1e-6 * direction
            ahead, behind = (
                value([*leaves[:number], leaves[number] + change, *leaves[number + 1 :]])
                for change in (step, -step)
            )
            exact = jnp.sum(slope * direction)
            np.testing.assert_allclose(exact, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


def test_dropout_acts_in_training_at_the_end_of_the_contracting_path():
    model = UNet(num_classes=2, widths=(2, 2, 4), dropout_rate=0.5)
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = random_variables(model, image)

    def first_stage_and_logits(key):
        logits, state = model.apply(
            variables, image, train=True, rngs={"dropout": key}, mutable=["intermediates"]
        )
        return state["intermediates"]["down1"]["output"][0], logits

    run = quick_jit(first_stage_and_logits)
    (first, logits), (same, other) = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(logits, other)
    evaluated = quick_apply(model, variables, image)
    plain = quick_apply(model.clone(dropout_rate=0.0), variables, image)
    np.testing.assert_array_equal(evaluated, plain)


def test_stages_are_the_levels_down_and_up():
    model = models.create("unet", num_classes=2)
    names = [*(f"down{n}" for n in range(1, 6)), *(f"up{n}" for n in range(4, 0, -1))]
    assert models.stage_names(model, (32, 32, 1)) == names
