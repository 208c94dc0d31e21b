"""What holds for every family, as in `test_families`, on small members of the residual ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import models, trees
from cnnjax.errors import UserError
from cnnjax.models.bagnet import BagNet
from cnnjax.models.layers import Layers
from cnnjax.models.res2net import Res2Net
from cnnjax.models.resnest import ResNeSt, SplitAttention
from cnnjax.models.resnet import ResNet
from cnnjax.models.sknet import SelectiveKernel, SKNet
from cnnjax.models.xception import Xception
from tests.models.quick import quick_apply, quick_init, quick_jit
from tests.models.test_families import evaluate, gradient, random_variables, train_outputs
from tests.models.test_remat import recomputed_parts

with_elu = functools.partial(models.with_fields, activation="elu")
D = {"stem_widths": (4, 4), "stem_features": 8, "features": 8, "shortcut": "average"}
# Each with the side of its images.
MODELS = {
    "resnet_d": (ResNet((1, 1), "basic", 3, **D), 32),
    "resnet_d_v2": (ResNet((1, 1), "basic", 3, "v2", **D), 32),
    "resnet_rs": (ResNet((1, 1), num_classes=3, stem_pool="conv", se_reduction=4, **D), 32),
    "eca": (ResNet((1, 1), "basic", 3, attention="eca", **D), 32),
    # A hidden layer of one unit that ReLU might switch off.
    "cbam": (with_elu(ResNet((1, 1), "basic", 3, attention="cbam", **D)), 32),
    "bam": (with_elu(ResNet((1, 1), "basic", 3, attention="bam", **D)), 32),
    "bit": (
        models.with_fields(
            ResNet((1, 1), "basic", 3, "v2", features=8, stem_features=8),
            weight_standardization=True,
            stem_pool="max_of_zeros",
            norm="group",
        ),
        32,
    ),
    "sk_basic": (SKNet((1, 1), "basic", 3, stem_features=8, features=8), 32),
    "sk_bottleneck": (
        SKNet((1, 1), num_classes=3, groups=4, width_per_group=16, split_input=False, **D),
        32,
    ),
    "resnest": (ResNeSt((1, 1), 3, groups=2, radix=2, **D), 32),
    "resnest_1s": (ResNeSt((1, 1), 3, groups=2, radix=1, pool_first=True, **D), 32),
    "res2net": (Res2Net((1, 2), 4, 4, 3, stem_features=8, features=8), 32),
    "xception": (Xception((8, 12), 1, (16, 20, 24), 3), 32),
    "bagnet": (BagNet(2, (1, 1, 2, 1), num_classes=3, features=4), 32),
    "inception_v4": (models.create("inception_v4", num_classes=3), 75),
    "inception_resnet_v2": (models.create("inception_resnet_v2", num_classes=3), 75),
}
# Of one width only, as published.
LARGE = ("inception_v4", "inception_resnet_v2")
SMALL = pytest.mark.parametrize("name", [name for name in MODELS if name not in LARGE])
ALL = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in MODELS]
)
KINDS = (nn.Conv, nn.Dense, nn.BatchNorm, nn.GroupNorm)


def small(name, batch=4):
    model, side = MODELS[name]
    return model, jax.random.normal(jax.random.key(1), (batch, side, side, 3))


@pytest.mark.slow
@SMALL
def test_gradient_reaches_every_parameter(name):
    model, image = small(name)
    variables = random_variables(model, image)
    target = jax.random.normal(jax.random.key(2), (4, 3))
    gradients = trees.named_leaves(gradient(model, variables, image, target))
    largest = {path: float(jnp.max(jnp.abs(leaf))) for path, leaf in gradients.items()}
    assert all(np.isfinite(size) for size in largest.values())
    assert [path for path, size in largest.items() if size < 1e-9] == []


@pytest.mark.slow
@SMALL
def test_training_and_evaluation_differ_only_in_the_statistics(name):
    model, image = small(name)
    model = models.with_fields(model, norm_momentum=0.0, dropout_rate=0.0)
    variables = random_variables(model, image)
    logits, updates = train_outputs(model, variables, image)
    evaluated = evaluate(model, {**variables, **updates}, image)
    scale = float(jnp.abs(logits).max())
    np.testing.assert_allclose(evaluated, logits, atol=1e-3 * scale)


@ALL
def test_half_precision_from_the_first_layer_on(name):
    """Parameters stay in float32."""
    model, image = small(name, batch=2)
    model = models.with_fields(model, dtype=jnp.bfloat16)
    dtypes = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if isinstance(context.module, KINDS):
            dtypes["/".join(context.module.path)] = (args[0].dtype, output.dtype)
        return output

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(record):
        logits, variables = jax.eval_shape(
            functools.partial(model.init_with_output, train=True), keys, image
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (_, first), *later = dtypes.values()
    assert {logits.dtype, first, *(d for pair in later for d in pair)} == {jnp.dtype("bfloat16")}


@ALL
def test_paths_stay_and_only_training_recomputes(name):
    model, image = small(name)
    other = models.with_fields(model, remat=True)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(functools.partial(model.init, train=True), rngs, image)
    assert shapes == jax.eval_shape(functools.partial(other.init, train=True), rngs, image)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def parts(model, train):
        options = {"train": train, "mutable": ["batch_stats"], "rngs": rngs}
        return recomputed_parts(lambda v: model.apply(v, image, **options), variables)

    assert parts(other, True) > parts(model, True)
    assert parts(other, False) == parts(model, False)


@ALL
def test_wrong_names_and_images_are_one_clear_error(name):
    model, image = small(name)
    for field, wrong in (("norm", "bach"), ("activation", "rellu")):
        with pytest.raises(UserError, match=f"unknown {field} '{wrong}': did you mean"):
            jax.eval_shape(
                models.with_fields(model, **{field: wrong}).init, jax.random.key(0), image
            )
    with pytest.raises(UserError, match=r"takes images \[batch, height, width, channels\]"):
        model.init(jax.random.key(0), image[0])


@pytest.mark.slow
@SMALL
def test_an_example_of_a_batch_is_evaluated_by_itself(name):
    model, image = small(name)
    variables = random_variables(model, image)
    together = evaluate(model, variables, image)
    alone = quick_jit(model.apply)(variables, image[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4 * float(jnp.abs(together).max()))


FACTORIES = Layers().factories(train=False)
X = jax.random.normal(jax.random.key(3), (2, 4, 4, 8))


def test_selective_kernel_without_a_preference_averages_its_paths():
    """Each sees its half of the channels; the second has holes of one pixel."""
    kernel = SelectiveKernel(6, FACTORIES, 1, 1, 8, split_input=True)
    variables = quick_init(kernel, X)
    params = jax.tree.map(np.array, variables["params"])
    params["select"]["kernel"][:] = 0
    for path, tap in (("path1", (0, 1)), ("path2", (1, 2))):
        params[path]["conv"]["kernel"][:] = 0
        params[path]["conv"]["kernel"][tap] = np.abs(np.eye(4, 6))
    above = np.pad(X[:, :-1, :, :4], ((0, 0), (1, 0), (0, 0), (0, 2)))
    right = np.pad(X[:, :, 2:, 4:], ((0, 0), (0, 0), (0, 2), (0, 2)))
    expected = (np.maximum(above, 0) + np.maximum(right, 0)) / 2 / np.sqrt(1 + 1e-5)
    result = quick_apply(kernel, {**variables, "params": params}, X)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("radix", [1, 2, 4])
def test_split_attention_without_a_preference_averages_its_splits(radix):
    layer = SplitAttention(8, FACTORIES, radix, 2)
    variables = quick_init(layer, X)
    params = jax.tree.map(np.array, variables["params"])
    params["fc2"]["kernel"][:] = 0
    params["conv"]["kernel"][:] = 0
    # Each output takes the first input of its group: of `2 * radix` groups.
    params["conv"]["kernel"][1, 1, 0] = 1
    groups = np.arange(8 * radix) // 4
    inputs = X[..., groups * (8 // (2 * radix))]
    splits = np.maximum(inputs, 0).reshape(2, 4, 4, radix, 8) / np.sqrt(1 + 1e-5)
    expected = splits[..., 0, :] / 2 if radix == 1 else splits.mean(3)
    result = quick_apply(layer, {**variables, "params": params}, X)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "side"), [(2, 9), (3, 17), (4, 33)])
def test_a_feature_of_bagnet_sees_a_patch(stages, side):
    """arXiv 1904.00760: 9, 17 or 33 pixels, and the whole of that."""
    model = BagNet(stages, (1, 1, 1, 1), num_classes=None, features=4)
    assert model.patch == side
    image = jnp.abs(X[:1, :1, :1, :3]) * jnp.ones((1, 48, 48, 1))
    variables = quick_init(model, image)
    variables["params"] = jax.tree.map(jnp.abs, variables["params"])

    def corner(image):
        _, found = model.apply(variables, image, mutable=["intermediates"])
        return jnp.sum(found["intermediates"]["stage4"]["output"][0][0, 0, 0])

    seen = np.asarray(quick_jit(jax.grad(corner))(image))[0].any(-1)
    assert seen.any(1).sum() == seen.any(0).sum() == side
    assert seen[:side, :side].any(1).all()


def test_res2net_needs_two_splits():
    with pytest.raises(UserError, match="splits is 1: Res2Net has at least 2"):
        jax.eval_shape(Res2Net((1,), 4, 1).init, jax.random.key(0), X)
