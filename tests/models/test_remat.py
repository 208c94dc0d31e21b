"""Rematerialized blocks: the same numbers and parameters, in less memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.devices import backend
from cnnjax.models.resnet import ResNet
from cnnjax.models.vgg import VGG
from tests.models.quick import quick_jit
from tests.models.test_families import MODELS as FAMILIES

KEY = jax.random.key(0)
PLAIN = {
    "vgg": (VGG((1, 1, 1, 1, 1), num_classes=3, dense_widths=(8,)), 32),
    "googlenet": (models.create("googlenet", num_classes=3, stem="cifar"), 16),
    "inception_v3": (models.create("inception_v3", num_classes=3), 75),
    "squeezenet": (models.create("squeezenet1_1", num_classes=3, stem="cifar"), 8),
    "unet": (models.create("unet", num_classes=3, widths=(4, 8)), 8),
}
MODELS = {name: (model, 8) for name, model in FAMILIES.items()} | PLAIN
# Large, or made of blocks and loops that others are made of, too.
SLOW = {
    *("googlenet", "inception_v3", "efficientnet_v2", "mnasnet", "repvgg", "mobileone", "fastvit"),
    *("ghostnet", "ghostnet_v2", "mobilenet_v4", "convnext_v2", "convmixer"),
}
WITHOUT_BLOCKS = ("lenet", "simple", "alexnet", "airbench", "resnet9")


def image_of(size):
    return jax.random.normal(jax.random.key(1), (4, size, size, 3))


def recomputed_parts(function, *arguments):
    """The number of `jax.checkpoint`s that are traced."""
    # The primitive's name changes with the version of JAX.
    return len(re.findall(r"\b(remat2?|checkpoint)\[", str(jax.make_jaxpr(function)(*arguments))))


def test_every_model_with_blocks_has_the_field():
    for name, row in models.MODELS.items():
        without = row.network.__module__.rpartition(".")[2] in WITHOUT_BLOCKS
        assert ("remat" in models.model_fields(name)) != without, name


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS],
)
def test_paths_stay_and_only_training_recomputes(name):
    model, size = MODELS[name]
    image, other = image_of(size), models.with_fields(model, remat=True)
    rngs = {"params": KEY, "dropout": KEY}
    shapes = jax.eval_shape(functools.partial(model.init, train=True), rngs, image)
    assert shapes == jax.eval_shape(functools.partial(other.init, train=True), rngs, image)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def parts(model, train):
        options = {"train": train, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}}
        return recomputed_parts(lambda v: model.apply(v, image, **options), variables)

    assert parts(other, True) > parts(model, True)
    assert parts(other, False) == parts(model, False)


def training(model, image, variables):
    """Returns (loss, statistics), gradient of a training pass; dropout draws from one key."""

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": KEY},
        )
        return jnp.sum(jnp.sin(logits)), updated

    return quick_jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def assert_same_training(model, size):
    with jax.enable_x64(True):
        image = image_of(size).astype(jnp.float64)
        variables = jax.eval_shape(model.init, KEY, image)
        generator = np.random.default_rng(0)
        variables = jax.tree.map(lambda leaf: 0.5 + generator.normal(0, 0.1, leaf.shape), variables)
        plain = training(model, image, variables)
        recomputed = training(models.with_fields(model, remat=True), image, variables)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
            # Some gradients are rounding only: no less than 1 is the size of what is compared.
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * max(1.0, np.abs(a).max()))


@pytest.mark.slow
def test_values_statistics_and_gradients_are_those_without():
    """Dropout and stochastic depth draw the same in the second computation."""
    options = {"block_dropout_rate": 0.3, "stochastic_depth_rate": 0.4, "dropout_rate": 0.2}
    assert_same_training(FAMILIES["resnet"].clone(**options), 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet", "mobilenet_v2", "shufflenet", "vgg"])
def test_other_families_train_the_same(name):
    assert_same_training(*MODELS[name])


def test_activations_within_blocks_take_no_memory():
    image = jnp.zeros((16, 16, 16, 3))
    sizes = []
    for remat in (False, True):
        layers = models.Layers(remat=remat)
        model = ResNet((4,), "basic", 3, stem="cifar", stem_features=8, features=8, layers=layers)
        variables = jax.eval_shape(model.init, KEY, image)

        def loss(params, model=model, statistics=variables["batch_stats"]):
            statistics = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), statistics)
            logits, _ = model.apply(
                {"params": params, "batch_stats": statistics}, image, train=True,
                mutable=["batch_stats"],
            )  # fmt: skip
            return jnp.sum(logits)

        options = backend.compiler_options(remat=remat)
        compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile(options)
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.65 * sizes[0]
