"""Networks whose paths branch and join: cross stages, trees, dual paths, aggregation, exchange."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.models import hrnet
from cnnjax.models.darknet import CSPResNet, DarkNet
from cnnjax.models.dla import DLA, Tree
from cnnjax.models.dpn import DPN
from cnnjax.models.hrnet import HRNet
from cnnjax.models.resnet import basic_branch
from cnnjax.models.vovnet import VoVNet
from tests.models.checks import check_family
from tests.models.quick import quick_jit

MODELS = {
    "darknet": DarkNet((1, 1), 3, features=4, stem="cifar"),
    "cspdarknet": DarkNet((1, 1), 3, cross_stage=True, features=4, stem="cifar"),
    "cspresnet": CSPResNet((1, 1), 3, features=8, groups=2, stem="cifar", stem_features=8),
    "dla": DLA((1, 2), (8, 8), 3, "basic", stem="cifar", stem_features=(4, 4)),
    "dla_bottleneck": DLA((2,), (8,), 3, residual_root=True, stem="cifar", stem_features=(4, 4)),
    "dpn": DPN((2, 1), (2, 4), 8, 3, features=8, groups=2, stem="cifar", stem_features=4),
    "vovnet": VoVNet(
        (2, 1), 2, 3, (8, 8), (4, 6), depthwise=True, stem="cifar", stem_features=(4, 4, 4)
    ),
    "hrnet": HRNet(4, 3, (1, 1), 1, 1, 4, stem="cifar", stem_features=4),
}
KEY = jax.random.key(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_holds_for_every_family(name, monkeypatch):
    check_family(name, MODELS[name], monkeypatch)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("cspresnet50", (32, 16, 8, 4)),
        ("cspdarknet53", (32, 32, 16, 8, 4)),
        ("dla46_c", (32, 16, 8, 4)),
        ("dpn68", (32, 16, 8, 4)),
        ("ese_vovnet19b_dw", (32, 16, 8, 4)),
        ("hrnet_w18_small", (32, 16, 8, 4)),
    ],
)
@pytest.mark.slow
def test_small_stem_leaves_out_two_halvings(name, sides):
    model = models.create(name, num_classes=10, stem="cifar")

    def outputs(image):
        variables = model.init(KEY, image)
        _, state = model.apply(variables, image, mutable=["intermediates"])
        return state["intermediates"]

    found = jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32))
    stages = [found[f"stage{n}"]["output"][0] for n in range(1, len(found) + 1)]
    assert tuple(stage.shape[1] for stage in stages) == sides


def test_half_of_a_cross_stage_goes_past_its_blocks():
    """Sixteen features, of which eight go through the blocks; all sixteen are merged."""
    model, image = MODELS["cspdarknet"], jnp.ones((1, 8, 8, 3))
    variables = jax.eval_shape(model.init, KEY, image)
    stage = variables["params"]["stage2"]
    assert stage["expand"]["conv"]["kernel"].shape == (1, 1, 16, 16)
    assert stage["block1"]["conv1"]["conv"]["kernel"].shape == (1, 1, 8, 8)
    assert stage["branch"]["conv"]["kernel"].shape == (1, 1, 8, 8)
    assert stage["merge"]["conv"]["kernel"].shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    ("levels", "keeps_input", "gathered"),
    [(1, False, [2]), (1, True, [3]), (2, True, [2, 4]), (3, False, [2, 3, 2, 4])],
)
def test_roots_gather_what_the_trees_before_them_made(levels, keeps_input, gathered):
    """Maps of 4 features each that enter each root, in order (Figure 3f)."""
    layers = models.Layers().factories(train=False)
    tree = Tree(levels, 4, 1, basic_branch, False, layers, keeps_input)
    shapes = jax.eval_shape(tree.init, KEY, jnp.zeros((1, 4, 4, 4)))["params"]

    def roots(node):
        own = [node["root"]["conv"]["kernel"].shape[2] // 4] if "root" in node else []
        return [n for part in ("tree1", "tree2") if part in node for n in roots(node[part])] + own

    assert roots(shapes) == gathered


def test_the_dense_path_grows_and_the_residual_one_keeps_its_width():
    model = models.create("dpn68", num_classes=None)
    shapes = jax.eval_shape(model.init, KEY, jnp.zeros((1, 64, 64, 3)))["params"]
    widths = [shapes["stage1"][f"block{n}"]["reduce"]["norm"]["scale"].shape[0] for n in (1, 2, 3)]
    # The stem; then 64 of the residual path, twice 16 of the projection, 16 of each block.
    assert widths == [10, 64 + 3 * 16, 64 + 4 * 16]


def test_coarser_maps_are_repeated_and_cut():
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    found = hrnet.enlarge(x, 2, (3, 4))[0, :, :, 0]
    np.testing.assert_array_equal(found, [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]])


def test_every_branch_hears_of_every_other():
    """One exchange block: a change of one map reaches all."""
    layers = models.Layers().factories(train=False)
    block = hrnet.ExchangeBlock(1, layers)
    generator = np.random.default_rng(0)
    maps = [
        jnp.asarray(generator.normal(size=(1, 8 // 2**n, 8 // 2**n, 2**n)), jnp.float32)
        for n in range(3)
    ]
    variables = quick_jit(block.init)(KEY, maps)
    apply = quick_jit(block.apply)
    before = apply(variables, maps)
    for changed in range(3):
        other = [x + 3.0 * (n == changed) for n, x in enumerate(maps)]
        after = apply(variables, other)
        assert all(not np.allclose(a, b) for a, b in zip(before, after, strict=True))
