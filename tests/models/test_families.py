"""What holds for every family of residual and mobile networks, on small members of each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, trees
from cnnjax.errors import UserError
from cnnjax.models.convmixer import ConvMixer
from cnnjax.models.convnext import ConvNeXt
from cnnjax.models.densenet import DenseNet
from cnnjax.models.efficientnet import EfficientNet
from cnnjax.models.fastvit import FastViT
from cnnjax.models.ghostnet import GhostNet
from cnnjax.models.mnasnet import MNASNet
from cnnjax.models.mobilenet import MobileNetV1, MobileNetV2, MobileNetV3
from cnnjax.models.mobilenet_v4 import MobileNetV4
from cnnjax.models.mobileone import MobileOne
from cnnjax.models.nfnet import NFNet
from cnnjax.models.regnet import RegNet
from cnnjax.models.repvgg import RepVGG
from cnnjax.models.resnet import ResNet
from cnnjax.models.shufflenet import ShuffleNetV2
from tests.models.quick import quick_jit

NO_DROP = {"dropout_rate": 0.0, "stochastic_depth_rate": 0.0}
MODELS = {
    "resnet": ResNet((1, 1), "basic", 3, stem="cifar", stem_features=4, features=4),
    "resnet_pad": ResNet((1, 1), "basic", 3, stem_features=4, features=4, shortcut="pad"),
    "resnet_bottleneck": ResNet(
        (1,), num_classes=3, stem="cifar", stem_features=8, features=8, groups=2, se_reduction=4
    ),
    "resnet_v2": ResNet(
        (1, 1), "basic", 3, stem="cifar", stem_features=4, features=4, version="v2"
    ),
    "densenet": DenseNet((2, 1), 4, 8, 3, "cifar"),
    "mobilenet_v1": MobileNetV1(((16, 1, 2),), 3, width=0.5),
    "mobilenet_v2": MobileNetV2(((1, 8, 1, 1), (2, 8, 2, 2)), 16, 3, width=0.25, dropout_rate=0.0),
    "mobilenet_v3": MobileNetV3(
        (((3, 16, 16, True, False), (5, 24, 16, True, True)),), (2,), 16, 3, dropout_rate=0.0
    ),
    "shufflenet": ShuffleNetV2((8,), (2,), 16, 3, stem="cifar"),
    "efficientnet": EfficientNet(((1, 3, 1, 8, 1), (2, 5, 2, 8, 1)), 3, width=0.5, **NO_DROP),
    "efficientnet_v2": EfficientNet(
        ((1, 3, 1, 8, 1), (2, 3, 2, 8, 2), (2, 3, 1, 8, 1)), 3, fused_stages=2, **NO_DROP
    ),
    "mnasnet": MNASNet(((1, 3, 1, 8, 1), (2, 5, 2, 8, 2)), 16, 3, width=0.5, dropout_rate=0.0),
    "efficientnet_lite": EfficientNet(
        ((1, 3, 1, 8, 1), (2, 5, 2, 8, 1)), 3, 2.0, 2.0, gated=False, scaled_ends=False, **NO_DROP
    ),
    "regnet": RegNet(2, 8, 8.0, 2.0, 8, 1.0, 3, "cifar"),
    "fastvit": FastViT((1, 1), (8, 16), 2.0, 2.0, 3, layer_scale_init=0.5),
    "ghostnet": GhostNet(
        (((3, 8, 8, True),), ((5, 16, 8, False),)), (1, 2), None, 16, 3, dropout_rate=0.0
    ),
    "ghostnet_v2": GhostNet(
        (((3, 8, 8, False), (3, 16, 8, False)),), (1,), 1, 16, 3, dropout_rate=0.0
    ),
    "repvgg": RepVGG((2,), (8,), 8, 3, groups=2),
    "mobileone": MobileOne((8,), (2,), (1,), 2, 3),
    "convnext": ConvNeXt((1, 1), (4, 8), 3),
    "convnext_v2": ConvNeXt((1, 1), (4, 8), 3, layer_scale_init=None, response_norm=True),
    "convmixer": ConvMixer(8, 2, 5, 2, 3),
    "mobilenet_v4": MobileNetV4(
        (
            (("fused", 3, 2, 8), ("universal", 3, 0, 2, 8)),
            (("conv", 1, 16), ("universal", 3, 5, 2, 16)),
        ),
        (1, 2),
        8,
        16,
        3,
    ),
    "nfnet": NFNet((1,), (8,), 3, "cifar", group_width=4, **NO_DROP),
}
IMAGE = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def random_variables(model, image=IMAGE, scale=0.4):
    """Every parameter drawn at random, so that none hides behind a 0 or 1 of the initializer."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        center = 1.0 if path[-1].key in ("scale", "gain", "var", "skip_gain") else 0.0
        values = generator.normal(center, 0.1 if center else scale, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


compiled = functools.partial(quick_jit, static_argnums=0)


@compiled
def train_outputs(model, variables, image, key=None):
    """Returns the logits and the updated statistics of a training pass."""
    rngs = {} if key is None else {"dropout": key}
    return model.apply(variables, image, train=True, mutable=["batch_stats"], rngs=rngs)


@compiled
def evaluate(model, variables, image):
    return model.apply(variables, image)


@compiled
def gradient(model, variables, image, target):
    """Returns the gradient of the logits' product with `target` by the parameters."""

    def loss(params):
        return jnp.sum(target * model.apply(variables | {"params": params}, image))

    return jax.grad(loss)(variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_every_parameter(name):
    """With given statistics: the batch's own would undo any shift in front of them."""
    model = MODELS[name]
    variables = random_variables(model)
    target = jax.random.normal(jax.random.key(2), (4, 3))
    gradients = trees.named_leaves(gradient(model, variables, IMAGE, target))
    largest = {path: float(jnp.max(jnp.abs(leaf))) for path, leaf in gradients.items()}
    assert all(np.isfinite(size) for size in largest.values())
    assert [path for path, size in largest.items() if size < 1e-7] == []


@pytest.mark.parametrize("name", ["resnet_bottleneck", "densenet", "mobilenet_v3", "shufflenet"])
def test_training_and_evaluation_differ_only_in_the_statistics(name):
    """With the batch's own statistics as running ones, evaluation gives the training logits."""
    model = models.with_fields(MODELS[name], norm_momentum=0.0)
    variables = random_variables(model)
    logits, updates = train_outputs(model, variables, IMAGE)
    evaluated = evaluate(model, {**variables, **updates}, IMAGE)
    np.testing.assert_allclose(evaluated, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["convnext", "convnext_v2", "nfnet"])
def test_without_batch_norm_training_is_evaluation(name):
    model = MODELS[name]
    variables = random_variables(model)
    assert "batch_stats" not in variables
    logits, _ = train_outputs(model, variables, IMAGE)
    np.testing.assert_allclose(logits, evaluate(model, variables, IMAGE), rtol=1e-6)


@pytest.mark.parametrize("field", ["dropout_rate", "stochastic_depth_rate", "block_dropout_rate"])
def test_drops_act_in_training_only_and_follow_their_key(field):
    model = models.with_fields(MODELS["resnet_v2"], norm="group", **{field: 0.5})
    variables = random_variables(model)
    first, again, other = (
        train_outputs(model, variables, IMAGE, jax.random.key(seed))[0] for seed in (0, 0, 1)
    )
    evaluated = evaluate(model, variables, IMAGE)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, evaluated)
    plain = models.with_fields(MODELS["resnet_v2"], norm="group")
    np.testing.assert_allclose(evaluated, evaluate(plain, variables, IMAGE), rtol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_only_batch_norm_mixes_the_examples_of_a_batch(norm):
    model = models.with_fields(MODELS["resnet"], norm=norm)
    variables = random_variables(model)
    assert ("batch_stats" in variables) == (norm == "batch")
    changed = IMAGE.at[0].multiply(-2.0)
    before, after = (train_outputs(model, variables, image)[0] for image in (IMAGE, changed))
    assert not np.allclose(before[0], after[0], rtol=1e-3)
    assert np.allclose(before[1:], after[1:], rtol=1e-5, atol=1e-5) == (norm != "batch")


def test_axis_name_gives_the_statistics_of_the_whole_batch():
    model = MODELS["resnet"]
    variables = random_variables(model)
    whole, whole_state = train_outputs(model, variables, IMAGE)
    mapped = models.with_fields(model, axis_name="device")
    parts, state = jax.vmap(
        lambda image: train_outputs(mapped, variables, image), axis_name="device"
    )(IMAGE.reshape(2, 2, 8, 8, 3))
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, rtol=1e-4, atol=1e-4)
    for part, all_at_once in zip(jax.tree.leaves(state), jax.tree.leaves(whole_state), strict=True):
        np.testing.assert_allclose(part[0], all_at_once, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(part[0], part[1])


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_computes_in_it_and_keeps_parameters_in_float32(name):
    model = models.with_fields(MODELS[name], dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, variables, IMAGE).dtype == jnp.bfloat16


def test_half_precision_is_close_to_single():
    model = MODELS["resnet_bottleneck"]
    variables = random_variables(model, scale=0.2)
    logits = np.asarray(evaluate(model, variables, IMAGE))
    half = evaluate(models.with_fields(model, dtype=jnp.bfloat16), variables, IMAGE)
    half = np.asarray(half, np.float32)
    np.testing.assert_allclose(half, logits, atol=0.05 * np.abs(logits).max())


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("resnet18", (32, 16, 8, 4)),
        ("mobilenet_v1", (32, 32, 16, 8, 4)),
        ("mobilenet_v2", (32, 32, 16, 8, 8, 4, 4)),
        ("mobilenet_v3_small", (32, 16, 8, 4)),
        ("shufflenet_v2_x0_5", (16, 8, 4)),
        ("efficientnet_b0", (32, 32, 16, 8, 8, 4, 4)),
        ("regnet_x_800mf", (32, 16, 8, 4)),
        ("convnext_tiny", (32, 16, 8, 4)),
        ("nfnet_f0", (32, 16, 8, 4)),
    ],
)
def test_small_stem_leaves_out_two_halvings(name, sides):
    model = models.create(name, num_classes=10, stem="cifar")

    def outputs(image):
        variables = model.init(jax.random.key(0), image)
        _, state = model.apply(variables, image, mutable=["intermediates"])
        return state["intermediates"]

    found = jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32))
    assert (
        tuple(found[f"stage{n}"]["output"][0].shape[1] for n in range(1, len(found) + 1)) == sides
    )


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"nfnet", "convmixer"}))
def test_unknown_stem_norm_and_activation_name_the_nearest(name):
    for field, wrong, right in (
        ("stem", "imagnet", "imagenet"),
        ("norm", "bach", "batch"),
        ("activation", "rellu", "relu"),
    ):
        model = models.with_fields(MODELS[name], **{field: wrong})
        with pytest.raises(UserError, match=f"unknown {field} '{wrong}': did you mean .*{right}"):
            jax.eval_shape(model.init, jax.random.key(0), IMAGE)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_without_batch_axis_is_one_clear_error(name):
    with pytest.raises(UserError, match=r"takes images \[batch, height, width, channels\]"):
        MODELS[name].init(jax.random.key(0), IMAGE[0])


@pytest.mark.parametrize("name", ["densenet121", "convnext_tiny"])
def test_an_image_too_small_is_one_clear_error(name):
    model = models.create(name, num_classes=10)
    with pytest.raises(UserError, match="at least 32x32 pixels, got 28x28"):
        model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
