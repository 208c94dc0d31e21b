"""Transformers: attention, windows, positions, and the maps that they sow."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import convert, finetune, models, trees
from cnnjax.errors import UserError
from cnnjax.models import attention, maxvit, swin, vit
from cnnjax.models.maxvit import MaxViT
from cnnjax.models.swin import Swin
from cnnjax.models.vit import ViT
from tests.models.checks import check_family
from tests.models.quick import quick_apply, quick_init, quick_jit

MODELS = {
    "vit": ViT(4, 8, 2, (1, 1), 3, grid_size=2),
    "vit_distilled": ViT(4, 8, 2, (1,), 3, grid_size=3, distilled=True),
    "swin": Swin((2, 1), (2, 2), 8, 3, window=2, patch_size=2),
    "swin_v2": Swin((2, 1), (2, 2), 8, 3, "v2", window=2, patch_size=2),
    "maxvit": MaxViT((1, 1), (8, 16), 8, 3, "cifar", side=2, stochastic_depth_rate=0.0),
}


@functools.partial(quick_jit, static_argnums=(0, 3))
def outputs(model, variables, image, names):
    return models.features(model, variables, image, names)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_holds_for_every_family(name, monkeypatch):
    check_family(name, MODELS[name], monkeypatch)


def test_attend_is_softmax_of_products_for_each_head():
    generator = np.random.default_rng(0)
    query, key, value = generator.normal(size=(3, 2, 4, 5, 3, 6)).astype(np.float32)
    bias = generator.normal(size=(3, 5, 5)).astype(np.float32)
    found = attention.attend(query, key, value, scale=0.5, bias=bias)
    for head in range(3):
        scores = 0.5 * query[:, :, :, head] @ key[:, :, :, head].swapaxes(-1, -2) + bias[head]
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(
            found[:, :, :, head], weights @ value[:, :, :, head], rtol=1e-4, atol=1e-5
        )


def test_relative_positions_are_the_differences_of_rows_and_columns():
    table = attention.relative_positions(3)
    for first in range(9):
        for second in range(9):
            down, right = first // 3 - second // 3, first % 3 - second % 3
            assert table[first, second] == (down + 2) * 5 + right + 2


@pytest.mark.parametrize(
    ("cut", "join", "spread"),
    [
        (attention.to_windows, attention.from_windows, 1),
        (maxvit.to_grid, maxvit.from_grid, 4),
    ],
)
def test_windows_hold_neighbors_and_grids_what_is_spread(cut, join, spread):
    image = np.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    parts = cut(image, 2)
    assert parts.shape == (2, 16, 4, 3)
    first = [image[0, row, column] for row in (0, spread) for column in (0, spread)]
    np.testing.assert_array_equal(parts[0, 0], first)
    np.testing.assert_array_equal(join(parts, 2, 8, 8), image)


@pytest.mark.parametrize("shift", [(1, 1), (2, 0)])
def test_shifted_windows_attend_to_true_neighbors_only(shift):
    """After the cyclic shift, tokens of a window see each other if they were neighbors before."""
    window, height, width = 4, 8, 12
    places = np.stack(np.mgrid[:height, :width], axis=-1)[None]
    shifted = np.roll(places, (-shift[0], -shift[1]), axis=(1, 2))
    windows = np.asarray(attention.to_windows(shifted, window))[0]
    apart = np.abs(windows[:, :, None] - windows[:, None, :]).max(-1) >= window
    bias = swin.shifted_bias(height, width, window, shift)[:, 0]
    np.testing.assert_array_equal(bias == swin.APART, apart)


def test_a_token_sees_its_window_and_through_the_shift_the_next():
    """One block reaches the 2x2 patches of a window; a second, shifted, those around it."""
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    model = Swin((2,), (2,), 8, 3, window=4, patch_size=2)
    variables = quick_init(model, image)

    def run(image):
        return outputs(model, variables, image, ("stage1/block1", "stage1/block2"))

    before, after = run(image), run(image.at[0, 0, 0].add(5.0))
    for name, reach in (("stage1/block1", 4), ("stage1/block2", 6)):
        changed = np.abs(before[name] - after[name]).max(-1)[0] > 0
        assert changed[:reach, :reach].any() and changed[reach - 1, reach - 1]
        assert not changed[reach:].any() and not changed[:, reach:].any()


def test_log_distances_are_the_papers():
    distances = swin.log_distances(8)
    assert distances.shape == (1, 15, 15, 2)
    np.testing.assert_allclose(distances[0, 14, 0], [np.log2(9) / 3, -np.log2(9) / 3])
    np.testing.assert_array_equal(distances[0, 7, 7], [0, 0])


def test_positions_are_interpolated_and_extra_tokens_keep_theirs():
    """A ramp down and one to the right stay ramps; half a cell stays at each edge."""
    side, extra = 6, np.full((1, 2, 2), 9.0)
    ramp = np.stack(np.mgrid[:side, :side], axis=-1).reshape(1, -1, 2).astype(np.float32)
    positions = np.concatenate([extra, ramp], axis=1)
    assert vit.resize_positions(positions, side, (side, side)) is positions
    larger = vit.resize_positions(jnp.asarray(positions), side, (12, 6))
    np.testing.assert_array_equal(larger[:, :2], extra)
    larger = larger[0, 2:].reshape(12, 6, 2)
    np.testing.assert_allclose(larger[3:-3, 2, 0], np.arange(3, 9) / 2 - 0.25, atol=1e-5)
    np.testing.assert_allclose(larger[5, :, 1], np.arange(6), atol=1e-5)


def test_a_vit_takes_images_of_other_sizes_with_the_same_parameters():
    model = MODELS["vit"]
    shapes = [
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
        for size in ((8, 8), (12, 20))
    ]
    assert shapes[0] == shapes[1]


def test_stages_of_a_vit_are_maps_of_patches_and_can_be_changed():
    model, image = MODELS["vit_distilled"], jnp.ones((2, 8, 12, 3))
    variables = quick_init(model, image)
    assert outputs(model, variables, image, ("stage1",))["stage1"].shape == (2, 2, 3, 8)
    with models.changed_stages(lambda name, x: 0 * x):
        changed = outputs(model, variables, image, ("stage1", "norm"))
    assert not changed["stage1"].any()
    # The class token goes past the map.
    assert changed["norm"][:, 0].any()


def test_distilled_logits_are_the_mean_of_both_heads():
    model, image = MODELS["vit_distilled"], jnp.ones((1, 8, 8, 3))
    variables = quick_init(model, image)
    found = outputs(model, variables, image, ("head", "head_distilled"))
    mean = (found["head"] + found["head_distilled"]) / 2
    np.testing.assert_allclose(quick_apply(model, variables, image), mean, rtol=1e-5)


def test_both_heads_of_a_distilled_network_are_for_other_classes():
    """Weights of another number of classes: both heads are drawn; a linear probe trains both."""
    model, image_shape = MODELS["vit_distilled"], (8, 8, 3)
    names = convert.find_names(model, "timm")
    table = convert.entries(model.clone(num_classes=5), image_shape, names)
    arrays = {entry.name: np.ones(entry.their_shape, np.float32) for entry in table}
    variables = convert.to_cnnjax(
        arrays, model, image_shape, framework="timm", new_head_key=jax.random.key(0)
    )
    heads = [variables["params"][name]["kernel"] for name in ("head", "head_distilled")]
    assert [kernel.shape for kernel in heads] == [(8, 3), (8, 3)]
    trained = finetune.make_method("head", model, image_shape).trainable
    paths = trees.named_leaves(variables["params"])
    found = [path for path in paths if any(re.fullmatch(pattern, path) for pattern in trained)]
    layers = ("head", "head_distilled")
    assert found == [f"{layer}/{leaf}" for layer in layers for leaf in ("bias", "kernel")]


def test_maxvit_names_the_size_that_does_not_fit():
    model = models.create("maxvit_t", num_classes=10)
    with pytest.raises(UserError, match="24x24 pixels of a stage into windows of side=7"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))


def products(tokens, windows, features, blocks):
    """Multiply-accumulates of queries with keys and of weights with values."""
    return 2 * blocks * windows * tokens**2 * features


@pytest.mark.parametrize(
    ("name", "in_attention", "published"),
    [
        ("vit_b_16", products(197, 1, 768, 12), 17.564),
        ("vit_b_32", products(50, 1, 768, 12), 4.409),
        ("vit_l_16", products(197, 1, 1024, 24), 61.555),
        ("vit_l_32", products(50, 1, 1024, 24), 15.378),
        ("vit_h_14", products(257, 1, 1280, 32), 167.295),
        *(
            (
                name,
                sum(
                    products(window**2, 64 // 4**stage, features * 2**stage, depth)
                    for stage, depth in enumerate((2, 2, deep, 2))
                ),
                published,
            )
            for name, window, features, deep, published in (
                ("swin_t", 7, 96, 6, 4.491),
                ("swin_s", 7, 96, 18, 8.741),
                ("swin_b", 7, 128, 18, 15.431),
                ("swin_v2_t", 8, 96, 6, 5.94),
                ("swin_v2_s", 8, 96, 18, 11.546),
                ("swin_v2_b", 8, 128, 18, 20.325),
            )
        ),
        (
            "maxvit_t",
            sum(
                2 * products(49, 64 // 4**stage, 64 * 2**stage, depth)
                for stage, depth in enumerate((2, 2, 5, 2))
            ),
            5.558,
        ),
    ],
)
def test_with_the_products_of_attention_sizes_are_torchvisions(name, in_attention, published):
    """Its `_ops`, in units of 1e9; the rows have the layers' alone."""
    assert (models.MODELS[name].macs + in_attention) / 1e9 == pytest.approx(published, abs=6e-4)
