"""What belongs together is read from the program: by hand for small networks, and by equality."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import compress, models, ops
from cnnjax.compress import blocks, channels, couplings
from cnnjax.errors import UserError
from cnnjax.models.reshaped import changes_of
from cnnjax.models.summary import abstract_variables, summary
from cnnjax.trees import named_leaves

SHAPE = (16, 16, 3)


class Residual(nn.Module):
    """A residual sum, a depthwise convolution, a gate, concatenation, flattening and a head."""

    num_classes: int | None = 5

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(ops.Conv(8, (3, 3), name="stem")(image))
        y = ops.Conv(6, (3, 3), use_bias=False, name="inner")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(y))
        y = ops.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(y)
        means = nn.relu(nn.Dense(4, name="squeeze")(y.mean((1, 2))))
        y = y * nn.sigmoid(nn.Dense(6, name="excite")(means))[:, None, None]
        x = x + ops.Conv(8, (1, 1), name="outer")(y)
        x = jnp.concatenate([x, nn.relu(ops.Conv(4, (3, 3), name="side")(x))], -1)
        x = ops.max_pool(x, (8, 8), (8, 8)).reshape(x.shape[0], -1)
        return x if self.num_classes is None else nn.Dense(self.num_classes, name="head")(x)


class Shuffled(nn.Module):
    """Groups of channels, dealt out in turn, as in ShuffleNet; then halves."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(ops.Conv(8, (3, 3), name="stem")(image))
        x = ops.Conv(12, (1, 1), feature_group_count=2, name="grouped")(x)
        batch, height, width, depth = x.shape
        x = x.reshape(batch, height, width, 2, depth // 2).swapaxes(-1, -2)
        left, right = jnp.split(nn.relu(x.reshape(batch, height, width, depth)), 2, -1)
        x = jnp.concatenate([left, ops.Conv(right.shape[-1], (3, 3), name="half")(right)], -1)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class LayerNormed(nn.Module):
    """A mean over channels, which is another without some of them; but not behind it."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.LayerNorm(name="norm")(ops.Conv(8, (3, 3), name="stem")(image))
        x = nn.gelu(nn.Dense(16, name="expand")(x))
        return nn.Dense(5, name="head")(nn.Dense(8, name="project")(x).mean((1, 2)))


def randomized(model, shape=SHAPE, seed=0):
    """Variables without zeros and ones, as training leaves them."""
    variables = jax.jit(lambda image: model.init(jax.random.key(seed), image, train=False))(
        jnp.zeros((1, *shape))
    )
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = generator.normal(0, 0.3, leaf.shape).astype(np.float32)
        if "kernel" in name:
            return np.asarray(leaf)
        return np.abs(noise) + 0.5 if "var" in name else np.asarray(leaf) + noise

    variables = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    return jax.tree_util.tree_map_with_path(draw, variables)


def sets_of(coupled, layer, axis=-1):
    """The sets of the entries of a kernel's axis."""
    found = {a: s for (path, a), s in coupled.channels.items() if path == f"params/{layer}/kernel"}
    return found[max(found) if axis == -1 else axis].tolist()


def halved(model, shape=SHAPE, macs=0.5, **choice):
    variables = randomized(model, shape)
    coupled = compress.trace(model, shape)
    budget = compress.Budget(model, shape, coupled)
    scores = channels.norm_scores(coupled, variables, 2)
    removed = compress.choose(coupled, budget, scores, macs=macs, **choice)
    return variables, compress.remove(model, variables, shape, coupled, removed)


def test_a_sum_a_gate_and_a_depthwise_convolution_couple_by_hand():
    coupled = compress.trace(Residual(), SHAPE)
    assert sets_of(coupled, "stem") == sets_of(coupled, "outer")
    assert sets_of(coupled, "inner") == sets_of(coupled, "depthwise") == sets_of(coupled, "excite")
    assert sets_of(coupled, "outer", 2) == sets_of(coupled, "inner")
    assert set(sets_of(coupled, "head")) == {0}
    # Flattening 2x2 positions repeats the twelve channels that were concatenated.
    concatenated = sets_of(coupled, "stem") + sets_of(coupled, "side")
    assert sets_of(coupled, "head", 0) == 4 * concatenated
    assert len(coupled.removable) == 8 + 6 + 4 + 4


def test_groups_lose_the_same_channels_through_a_shuffle():
    coupled = compress.trace(Shuffled(), SHAPE)
    stem, grouped = sets_of(coupled, "stem"), sets_of(coupled, "grouped")
    assert stem[:4] == stem[4:] == sets_of(coupled, "grouped", 2)
    assert grouped[:6] == grouped[6:]
    # Shuffled: 0 6 1 7 2 8 | 3 9 4 10 5 11, and the halves lose the same places.
    assert grouped[0] == grouped[3] and grouped[1] == grouped[4] and grouped[2] == grouped[5]


def test_what_a_mean_over_channels_reads_stays():
    coupled = compress.trace(LayerNormed(), SHAPE)
    assert set(sets_of(coupled, "stem")) == {0}
    assert 0 not in sets_of(coupled, "expand") and 0 not in sets_of(coupled, "project")


def logits_of(model, variables, image):
    with ops.lowering("lax"):
        return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, image)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "model",
    [Residual(), pytest.param(Shuffled(), marks=slow), pytest.param(LayerNormed(), marks=slow)],
    ids=lambda model: type(model).__name__,
)
def test_the_smaller_network_computes_what_the_masked_one_does(model):
    variables, smaller = halved(model, macs=0.6, scope="layer")
    image = jax.random.normal(jax.random.key(3), (4, *SHAPE))
    wanted = logits_of(model, smaller.masked, image)
    found = logits_of(smaller.model, smaller.variables, image)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    # Not by chance: the logits are not those of the whole network, and differ from each other.
    assert float(jnp.abs(logits_of(model, variables, image) - wanted).max()) > 1e-3
    assert float(wanted.std()) > 1e-3
    before, after = summary(model, SHAPE), summary(smaller.model, SHAPE)
    assert after.macs <= 0.6 * before.macs and after.parameters < before.parameters


@slow
def test_a_smaller_network_is_pruned_again_and_built_from_its_table():
    model = models.create("lenet5", num_classes=10)
    shape = (28, 28, 1)
    _, smaller = halved(model, shape)
    coupled = compress.trace(smaller.model, shape)
    budget = compress.Budget(smaller.model, shape, coupled)
    scores = channels.norm_scores(coupled, smaller.variables, 1)
    removed = compress.choose(coupled, budget, scores, macs=0.6)
    again = compress.remove(smaller.model, smaller.variables, shape, coupled, removed)
    changes = changes_of(again.model)
    built = models.create("lenet5", num_classes=10, layer_changes=changes)
    image = jax.random.normal(jax.random.key(0), (2, *shape))
    wanted = logits_of(smaller.model, again.masked, image)
    found = logits_of(built, again.variables, image)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    # A head for other classes is as wide as they are many.
    assert "head" not in changes
    other = models.create("lenet5", num_classes=3, layer_changes=changes)
    assert jax.eval_shape(lambda x: other.init(jax.random.key(0), x), image)["params"]["head"][
        "kernel"
    ].shape == (changes["dense2"]["features"], 3)
    features = models.with_fields(built, num_classes=None).apply(again.variables, image)
    assert features.shape == (2, changes["dense2"]["features"])


def test_blocks_that_return_their_input_go():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = nn.relu(ops.Conv(4, (3, 3), name="stem")(image))
            for name in ("one", "two"):
                x = Block(name=name)(x)
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(ops.Conv(8, (3, 3), name="conv1")(x))
            return nn.relu(x + ops.Conv(4, (3, 3), name="conv2")(y))

    model = Net()
    variables = randomized(model)
    image = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    changes = blocks.removable(model, variables, image)
    # Not the convolutions in them, which keep their shapes, too.
    assert set(changes) == {"one", "two"} and min(changes.values()) > 0
    least = min(changes, key=changes.get)
    assert blocks.choose(model, changes, SHAPE, count=1) == [least]
    smaller = blocks.remove(model, variables, SHAPE, [least])
    assert least not in smaller.variables["params"]
    wanted = logits_of(model, smaller.masked, image)
    np.testing.assert_allclose(
        logits_of(smaller.model, smaller.variables, image), wanted, rtol=1e-5
    )
    with pytest.raises(UserError, match="2 blocks can be removed"):
        blocks.choose(model, changes, SHAPE, count=3)


def test_the_budget_counts_what_the_summary_counts():
    model = Residual()
    coupled = compress.trace(model, SHAPE)
    budget = compress.Budget(model, SHAPE, coupled)
    assert budget.macs == summary(model, SHAPE).macs
    assert budget.parameters == summary(model, SHAPE).parameters
    variables, smaller = halved(model)
    removed = set(coupled.removable) & set(
        compress.choose(coupled, budget, channels.norm_scores(coupled, variables, 2), macs=0.5)
    )
    assert all(budget.remove(one) for one in removed)
    assert budget.macs == summary(smaller.model, SHAPE).macs
    assert budget.parameters == summary(smaller.model, SHAPE).parameters


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    ("name", "shape", "arguments", "multiple"),
    [
        ("cnn_5conv_2dense", (28, 28, 1), {}, 16),
        ("lenet5", (28, 28, 1), {}, 4),
        ("resnext50_32x4d", (16, 16, 3), {"stage_sizes": (1, 1), "stem": "cifar"}, 64),
    ],
)
def test_layers_that_lose_channels_keep_a_multiple(name, shape, arguments, multiple, scope):
    model = models.create(name, num_classes=10, **arguments)
    _, smaller = halved(model, shape, macs=0.7, scope=scope, multiple=multiple)
    widths = [
        [
            leaf.shape[-1]
            for path, leaf in named_leaves(abstract_variables(network, shape)).items()
            if path.endswith("/kernel")
        ]
        for network in (model, smaller.model)
    ]
    assert widths[0] != widths[1]
    for before, after in zip(*widths, strict=True):
        assert after == before or after % multiple == 0
    assert summary(smaller.model, shape).macs <= 0.7 * summary(model, shape).macs


def test_scores_by_hand():
    model = Residual()
    variables = randomized(model)
    coupled = compress.trace(model, SHAPE)
    scores = channels.norm_scores(coupled, variables, 1)
    kernel = np.abs(variables["params"]["side"]["kernel"]).sum((0, 1, 2))
    relative = kernel / np.sqrt(np.mean(kernel**2))
    found = [scores[one] for one in sets_of(coupled, "side")]
    np.testing.assert_allclose(found, relative, rtol=1e-6)
    scales = channels.scale_scores(coupled, variables)
    wanted = np.abs(variables["params"]["norm"]["scale"])
    np.testing.assert_allclose([scales[one] for one in sets_of(coupled, "inner")], wanted)
    ones = jax.tree.map(np.ones_like, variables["params"])
    taylor = channels.taylor_scores(coupled, variables, [ones])
    side = variables["params"]["side"]
    by_hand = (side["kernel"].sum((0, 1, 2)) + side["bias"]) ** 2
    np.testing.assert_allclose(
        [taylor[one] for one in sets_of(coupled, "side")], by_hand, rtol=1e-4
    )


def test_impossible_widths_are_refused_in_words():
    model = models.create("lenet5", num_classes=10)
    with pytest.raises(UserError, match="stay: give more"):
        halved(model, (28, 28, 1), macs=0.001)
    # The six channels of the first layer stay, and are a third of the work.
    with pytest.raises(UserError, match=r"a multiple of 8\), .*% of the multiply-accumulates stay"):
        halved(model, (28, 28, 1), macs=0.3, multiple=8)
    with pytest.raises(UserError, match="no channel here has one"):
        channels.scale_scores(couplings.trace(model, (28, 28, 1)), randomized(model, (28, 28, 1)))

    class Written(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = ops.Conv(8, (16, 16), padding="VALID", name="stem")(image)
            return nn.Dense(3, name="head")(x.reshape(x.shape[0], 8))

    with pytest.raises(UserError, match="written for its widths"):
        halved(Written())


# Small members: every kind of block, few of each.
FAMILIES = {
    "cnn_5conv_2dense": ((28, 28, 1), {}),
    "cifar_resnet20": ((16, 16, 3), {"stage_sizes": (1, 1, 1)}),
    "resnet18": ((16, 16, 3), {"stage_sizes": (1, 2), "stem": "cifar"}),
    "resnext50_32x4d": ((16, 16, 3), {"stage_sizes": (1, 1), "stem": "cifar"}),
    "vgg11_bn": ((32, 32, 3), {"dense_widths": (64, 64)}),
    "mobilenet_v2": (
        (16, 16, 3),
        {"stem": "cifar", "stages": ((1, 16, 1, 1), (6, 24, 2, 2)), "last_features": 64},
    ),
    "shufflenet_v2_x0_5": (
        (32, 32, 3),
        {"stem": "cifar", "stage_sizes": (2, 2, 1), "last_features": 64},
    ),
    "convnext_tiny": (
        (16, 16, 3),
        {"stem": "cifar", "stage_sizes": (1, 1), "stage_features": (16, 32)},
    ),
    "efficientnet_b0": (
        (16, 16, 3),
        {"stem": "cifar", "stages": ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2))},
    ),
    "cifar_densenet_bc100": ((16, 16, 3), {"stage_sizes": (2, 2, 2)}),
}


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loses_a_third_of_its_work_and_computes_the_same(name):
    shape, arguments = FAMILIES[name]
    model = models.create(name, num_classes=10, **arguments)
    variables, smaller = halved(model, shape, macs=0.67, scope="layer")
    # `remove` has compared the logits, and would have refused.
    assert smaller.difference <= channels.TOLERANCE
    before, after = summary(model, shape), summary(smaller.model, shape)
    assert after.macs <= 0.67 * before.macs and after.parameters < before.parameters
    image = jax.random.normal(jax.random.key(1), (2, *shape))
    whole, masked = (logits_of(model, v, image) for v in (variables, smaller.masked))
    assert float(jnp.abs(whole - masked).max()) > 1e-4 * float(jnp.abs(whole).max())
