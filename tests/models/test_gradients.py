"""Every network as published: gradients reach every parameter; the modes differ as intended.

At full depth and width, on the smallest images whose last maps still have some pixels, so that the
statistics of a batch of two are not those of two numbers. Numbers are computed for the smallest of
each family; for its deeper and wider members, which take minutes each to compile, it is followed
through the traced program that every gradient depends on the loss.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, ops, trees
from tests.models.quick import quick_jit
from tests.models.test_counts import LARGE

# As many as digits: the network of 1998 takes no other number.
NUM_CLASSES = 10
# Height and width of the images where 64 pixels will not do.
SIZES = {
    "lenet5": 28,
    "lenet5_1998": 32,
    **dict.fromkeys(models.list_models("cnn_*"), 28),
    "mlp": 28,
    "dense_dropout": 28,
    "alexnet_2012": 67,
    "inception_v3": 299,
    **dict.fromkeys(("inception_v4", "inception_resnet_v2"), 139),
    **dict.fromkeys(models.list_models("cifar_*"), 32),
    **dict.fromkeys(("wide_resnet16_8", "wide_resnet28_10"), 32),
    "unet_2015": 188,
    "maxvit_t": 224,
}
# Gates that normalize one number an example: of two, rounding would decide.
BATCHES = {"bam_resnet50": 8, "resnest14d": 8, "sk_resnet18": 8}
# What draws at random in training, and auxiliary heads, which act in training only.
DROPS = ("dropout_rate", "block_dropout_rate", "stochastic_depth_rate")
HEADS = ("auxiliary_heads", "auxiliary_head")
# Numbers are drawn once and repeat; a prime period is no multiple of any kernel's size.
PERIOD = 1_000_003

SMALL = [name for name in models.list_models() if not LARGE.fullmatch(name)]
# Of these, what is much like another one: made of the same blocks.
ALIKE = {
    *("alexnet_2012", "cifar_resnet56", "densenet121", "regnet_x_400mf", "squeezenet1_0", "vgg11"),
    *("cnn_32_64", "cnn_32_64_dense64", "mobilenet_v3_large", "resnet18", "resnet50_v1"),
    *("resnet50_v2", "wide_resnet16_8", "wide_resnet28_10", "wide_resnet50_2"),
    *("resnet10t", "se_resnet50", "inception_v4", "efficientnet_lite0", "resnet_rs50", "bagnet9"),
    *("inception_v3", "nfnet_f0", "hrnet_w18_small"),
    *("mnasnet0_5", "mobileone_s1", "convmixer_1024_20_ks9_p14", "repvgg_a0", "convnext_v2_atto"),
    # Small ones of their classes are tested in test_branched, test_residual and test_attention.
    *(
        "res2net50_14w_8s",
        "bit_resnet50x1",
        "dpn68",
        "cspresnet50",
        "maxvit_t",
        "swin_t",
        "vit_s_16",
    ),
    *("cbam_resnet18", "bam_resnet50", "sk_resnet18", "eca_resnet26t", "xception", "se_resnet18"),
    *(name for name in SMALL if name.startswith(("vgg13", "vgg16", "vgg19"))),
}


@pytest.fixture(autouse=True)
def plain_convolutions():
    """These tests are of the models; `lax` convolutions compile soonest."""
    with ops.lowering("lax"):
        yield


def network(name, drops=0.0):
    """Returns a network with its auxiliary heads and these drop rates, and images for it."""
    fields = models.model_fields(name)
    options = dict.fromkeys(fields.keys() & set(DROPS), drops)
    options |= dict.fromkeys(fields.keys() & set(HEADS), True)
    size, channels = SIZES.get(name, 64), models.input_shape(name)[-1]
    shape = (BATCHES.get(name, 2), size, size, channels)
    image = jax.random.normal(jax.random.key(0), shape)
    return models.create(name, num_classes=NUM_CLASSES, **options), image


def drawn(shapes):
    """Returns params of which none is a 0 or 1 of an initializer: He's variance, scales near 1.

    And running statistics of zeros, which training does not read.
    """
    generator = np.random.default_rng(0)
    normal = generator.standard_normal(PERIOD, np.float32)

    def draw(path, leaf):
        values = np.roll(normal, -generator.integers(PERIOD))
        values = np.resize(values, leaf.size).reshape(leaf.shape)
        if len(leaf.shape) > 1:
            return values * np.float32((2 / math.prod(leaf.shape[:-1])) ** 0.5)
        return values * np.float32(0.1) + (path[-1].key in ("scale", "gain", "skip_gain"))

    params = jax.tree_util.tree_map_with_path(draw, shapes["params"])
    statistics = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.get("batch_stats", {})
    )
    return params, statistics


def loss_of(model, image, params, statistics, weight):
    """Returns a scalar of all logits in training mode, then the logits and new statistics."""
    logits, updated = model.apply(
        {"params": params, "batch_stats": statistics},
        image,
        train=True,
        mutable=["batch_stats", "auxiliary_logits"],
        rngs={"dropout": jax.random.key(1)},
    )
    outputs = [logits, *jax.tree.leaves(updated.get("auxiliary_logits", {}))]
    loss = sum(jnp.sum(jnp.sin(weight * output + jnp.arange(10.0))) for output in outputs)
    return loss, (logits, updated.get("batch_stats", {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.exhaustive] if n in ALIKE else []) for n in SMALL],
)
def test_gradients_and_modes(name):
    """In training, without drops; with the batch's statistics evaluation gives the same logits."""
    model, image = network(name)
    params, statistics = drawn(jax.eval_shape(model.init, jax.random.key(0), image))

    @quick_jit
    def run(params, statistics):
        gradient, aux = jax.grad(
            lambda params: loss_of(model, image, params, statistics, 1.0), has_aux=True
        )(params)
        return jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf)), gradient), aux

    sizes, (logits, updated) = run(params, statistics)
    largest = {path: float(leaf) for path, leaf in trees.named_leaves(sizes).items()}
    assert all(np.isfinite(value) for value in largest.values())
    assert [path for path, value in largest.items() if value == 0] == []

    momentum = models.fields(model).get("norm_momentum", 0.9)
    batch = jax.tree.map(lambda leaf: leaf / (1 - momentum), updated)
    evaluated = quick_jit(model.apply)({"params": params, "batch_stats": batch}, image)
    scale = float(jnp.max(jnp.abs(logits)))
    np.testing.assert_allclose(evaluated, logits, atol=1e-3 * scale, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name == "resnet34" else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in sorted(set(models.list_models()) - set(SMALL))
    ],
)
def test_gradients_depend_on_the_loss(name):
    """With dropout and stochastic depth, too."""
    model, image = network(name, drops=0.1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert unreached(model, image, shapes) == []


def unreached(model, image, shapes):
    """Returns the paths of parameters whose gradient is a constant whatever the loss."""

    def gradient(weight, params, statistics):
        return jax.grad(lambda params: loss_of(model, image, params, statistics, weight)[0])(params)

    weight = jax.ShapeDtypeStruct((), jnp.float32)
    statistics = shapes.get("batch_stats", {})
    program = jax.make_jaxpr(gradient)(weight, shapes["params"], statistics).jaxpr
    dependent = {program.invars[0]}
    for equation in program.eqns:
        # A constant is no variable, and has no hash.
        inputs = [atom for atom in equation.invars if isinstance(atom, type(program.invars[0]))]
        if dependent.intersection(inputs):
            dependent.update(equation.outvars)
    paths = trees.named_leaves(shapes["params"])
    outputs = zip(paths, program.outvars, strict=True)
    return [path for path, output in outputs if output not in dependent]


def test_an_unreached_parameter_is_found():
    import flax.linen as nn

    class Cut(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = nn.relu(nn.Dense(4, name="used")(image.reshape(2, -1)))
            cut = jax.lax.stop_gradient(nn.relu(nn.Dense(4, name="cut")(x)))
            return nn.Dense(NUM_CLASSES, name="head")(x + cut)

    model, image = Cut(), jnp.zeros((2, 2, 2, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert unreached(model, image, shapes) == ["cut/bias", "cut/kernel"]
