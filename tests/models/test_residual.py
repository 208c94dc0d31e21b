"""What holds for every family, as in `test_families`, on small members of the residual ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import models, trees
from cnnjax.errors import UserError
from cnnjax.models.resnet import ResNet
from tests.models.quick import quick_jit
from tests.models.test_families import evaluate, gradient, random_variables, train_outputs
from tests.models.test_remat import recomputed_parts

with_elu = functools.partial(models.with_fields, activation="elu")
D = {"stem_widths": (4, 4), "stem_features": 8, "features": 8, "shortcut": "average"}
# Each with the side of its images.
MODELS = {
    "resnet_d": (ResNet((1, 1), "basic", 3, **D), 32),
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
}
ALL = pytest.mark.parametrize("name", MODELS)
LAYERS = (nn.Conv, nn.Dense, nn.BatchNorm, nn.GroupNorm)


def small(name, batch=4):
    model, side = MODELS[name]
    return model, jax.random.normal(jax.random.key(1), (batch, side, side, 3))


@pytest.mark.slow
@ALL
def test_gradient_reaches_every_parameter(name):
    model, image = small(name)
    variables = random_variables(model, image)
    target = jax.random.normal(jax.random.key(2), (4, 3))
    gradients = trees.named_leaves(gradient(model, variables, image, target))
    largest = {path: float(jnp.max(jnp.abs(leaf))) for path, leaf in gradients.items()}
    assert all(np.isfinite(size) for size in largest.values())
    assert [path for path, size in largest.items() if size < 1e-9] == []


@pytest.mark.slow
@ALL
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
        if isinstance(context.module, LAYERS):
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
@ALL
def test_an_example_of_a_batch_is_evaluated_by_itself(name):
    model, image = small(name)
    variables = random_variables(model, image)
    together = evaluate(model, variables, image)
    alone = quick_jit(model.apply)(variables, image[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4 * float(jnp.abs(together).max()))
