"""Models by name, their features and their tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.errors import UserError


def test_create_sets_classes_and_overrides():
    model = models.create("lenet5", num_classes=3, activation="tanh", pool="average")
    assert (model.num_classes, model.activation, model.pool) == (3, "tanh", "average")


def test_create_takes_values_of_the_kind_of_the_default():
    model = models.create(
        "cnn_32_64", num_classes=2, widths=[8, 8], dropout_rate=0, activation=jnp.tanh
    )
    assert (model.widths, model.dropout_rate, model.layers.activation) == ((8, 8), 0, jnp.tanh)


def test_create_keeps_what_the_variant_sets():
    model = models.create("cnn_32_64_dense128_dropout", num_classes=10)
    assert (model.dense_widths, model.dropout_rate) == ((128,), 0.5)
    assert models.model_fields("cnn_32_64_dense128_dropout")["dropout_rate"] == 0.5
    assert models.presets("vgg16_bn") == {"stage_sizes": (2, 2, 3, 3, 3), "norm": "batch"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "unknown model 'lenet': did you mean lenet5"),
        (
            "lenet5",
            {"activaton": "relu"},
            "unknown argument 'activaton': did you mean activation",
        ),
        ("lenet5", {"parent": None}, "unknown argument 'parent'"),
        (
            "mlp",
            {"dropout_rate": "half"},
            r"'mlp\(dropout_rate=half\)': dropout_rate='half': give a number",
        ),
        ("mlp", {"dense_widths": 64}, "dense_widths=64: give a tuple"),
        ("lenet5", {"pool": 2}, "pool=2: give a word"),
        ("googlenet", {"auxiliary_heads": 1}, "auxiliary_heads=1: give True or False"),
        ("lenet5", {"num_classes": 0}, "num_classes must be .*got 0"),
        ("lenet5", {"num_classes": 2.0}, "num_classes must be .*got 2.0"),
    ],
)
def test_create_refuses(name, options, message):
    with pytest.raises(UserError, match=message):
        models.create(name, **{"num_classes": 10} | options)


@pytest.mark.parametrize("function", [models.input_shape, models.canonical_classes])
def test_unknown_names_are_refused_everywhere(function):
    with pytest.raises(UserError, match="did you mean vgg16"):
        function("vgg_16")


@pytest.mark.parametrize(
    "name", ["vgg11", "googlenet", "inception_v3", "squeezenet1_0", "cnn_32_64"]
)
def test_epsilon_and_momentum_of_norms_are_arguments(name):
    """They are another framework's conventions, which its weights need."""
    model = models.create(name, num_classes=10, norm="batch", norm_epsilon=0.5, norm_momentum=0.25)
    norms = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            norms.append((context.module.epsilon, context.module.momentum))
        return call(*args, **kwargs)

    image = jnp.zeros((1, *models.input_shape(name)))
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), image)
    assert set(norms) == {(0.5, 0.25)}


def test_list_models_matches_shell_patterns():
    assert models.list_models("lenet5*") == ["lenet5", "lenet5_1998"]
    assert models.list_models("vgg1[13]*_bn") == ["vgg11_bn", "vgg13_bn"]
    assert models.list_models("nothing*") == []
    assert models.list_models() == sorted(models.MODELS)


def test_features_are_what_the_stages_compute():
    image = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    model = models.create("lenet5", num_classes=10)
    shapes = jax.eval_shape(model.init, jax.random.key(1), image)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: generator.normal(0, 0.1, leaf.shape), shapes)
    names = ["stage2", "stage4", "dense2", "head"]
    found = jax.jit(lambda v, x: models.features(model, v, x, names))(variables, image)
    assert sorted(found) == sorted(names)
    assert found["stage2"].shape == (2, 4, 4, 16)
    # A stage is its layer after the activation; a layer's path gives what the layer returns.
    np.testing.assert_array_equal(found["stage4"], np.maximum(found["dense2"], 0))
    np.testing.assert_allclose(found["head"], jax.jit(model.apply)(variables, image), rtol=1e-5)
    headless = models.create("lenet5", num_classes=None)
    np.testing.assert_allclose(
        found["stage4"], jax.jit(headless.apply)(variables, image), rtol=1e-5, atol=1e-6
    )


def test_features_by_path_within_a_stage():
    image = jnp.zeros((1, 32, 32, 3))
    model = models.create("vgg11", num_classes=10, stem="cifar", dense_widths=(16,))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    found = jax.eval_shape(
        lambda v, x: models.features(model, v, x, ["stage3", "stage3/conv1"]), variables, image
    )
    assert found["stage3"].shape == (1, 4, 4, 256)
    assert found["stage3/conv1"].shape == (1, 8, 8, 256)


def test_unknown_feature_names_the_nearest():
    image = jnp.zeros((1, 28, 28, 1))
    model = models.create("lenet5", num_classes=10)
    variables = jax.eval_shape(model.init, jax.random.key(1), image)
    with pytest.raises(UserError, match="unknown stage or layer 'stage9': did you mean stage"):
        jax.eval_shape(lambda v, x: models.features(model, v, x, ["stage9"]), variables, image)


def test_stage_names_follow_the_computation():
    model = models.create("vgg11", num_classes=10)
    assert models.stage_names(model, (64, 64, 3)) == [f"stage{n}" for n in range(1, 6)]


def test_summary_of_lenet_by_hand():
    result = models.summary(models.create("lenet5", num_classes=10), (28, 28, 1))
    rows = [(row.path, row.output_shape, row.parameters, row.macs) for row in result.rows]
    assert rows == [
        ("conv1", (12, 12, 6), 156, 24 * 24 * 25 * 6),
        ("conv2", (4, 4, 16), 2416, 8 * 8 * 25 * 6 * 16),
        ("dense1", (120,), 30_840, 256 * 120),
        ("dense2", (84,), 10_164, 120 * 84),
        ("head", (10,), 850, 84 * 10),
    ]
    assert result.activation_bytes == 4 * (864 + 256 + 120 + 84 + 10)
    text = models.format_summary(result)
    assert "44,426 parameters" in text
    assert "conv2" in text
    assert "conv2" not in models.format_summary(result, layers=False)


def test_summary_counts_running_statistics_apart():
    model = models.create("cnn_32_64", num_classes=10, norm="batch")
    result = models.summary(model, (28, 28, 1))
    assert result.statistics == 2 * (32 + 64)
    # Without their biases the convolutions have 96 parameters fewer; the norms have 192.
    assert result.parameters == 34_826 - 96 + 192


def test_summary_runs_nothing_and_leaves_the_model_usable():
    model = models.create("vgg19", num_classes=1000)
    assert models.summary(model, (224, 224, 3)) == models.summary(model, (224, 224, 3))
