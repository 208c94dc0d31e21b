"""The small networks: layers by hand, dropout, norms, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, ops, trees
from cnnjax.errors import UserError
from cnnjax.models.simple import MLP, SimpleCNN

DIGIT = (2, 28, 28, 1)


@pytest.fixture(autouse=True)
def plain_convolutions():
    """These tests are of the models; `lax` convolutions compile soonest."""
    with ops.lowering("lax"):
        yield


def randomized(model, image):
    """Variables of `model` with every leaf drawn from (0, 0.2): as good as any for these tests."""
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.0, 0.2, leaf.shape), leaf.dtype), shapes
    )


def shapes(model, image_shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(image_shape))
    return {path: leaf.shape for path, leaf in trees.named_leaves(variables["params"]).items()}


@pytest.mark.parametrize(
    ("name", "image_shape", "kernels"),
    [
        (
            "cnn_32_64",
            (1, 28, 28, 1),
            {"conv1": (3, 3, 1, 32), "conv2": (3, 3, 32, 64), "head": (5 * 5 * 64, 10)},
        ),
        (
            "cnn_32_64_dense64",
            (1, 28, 28, 1),
            {
                "conv1": (3, 3, 1, 32),
                "conv2": (3, 3, 32, 64),
                "dense1": (5 * 5 * 64, 64),
                "head": (64, 10),
            },
        ),
        (
            "cnn_32_dense64",
            (1, 32, 32, 3),
            {"conv1": (3, 3, 3, 32), "dense1": (15 * 15 * 32, 64), "head": (64, 10)},
        ),
        (
            "cnn_5conv_2dense",
            (1, 28, 28, 1),
            {
                "conv1": (3, 3, 1, 32),
                "conv2": (3, 3, 32, 32),
                "conv3": (3, 3, 32, 64),
                "conv4": (3, 3, 64, 64),
                "conv5": (3, 3, 64, 128),
                "dense1": (3 * 3 * 128, 128),
                "head": (128, 10),
            },
        ),
        ("mlp", (1, 28, 28, 1), {"dense1": (784, 300), "dense2": (300, 100), "head": (100, 10)}),
    ],
)
def test_layers(name, image_shape, kernels):
    expected = {}
    for layer, shape in kernels.items():
        expected[f"{layer}/kernel"] = shape
        expected[f"{layer}/bias"] = shape[-1:]
    assert shapes(models.create(name, num_classes=10), image_shape) == expected


def test_binary_classifier_has_one_logit():
    model = models.create("dense_dropout", num_classes=1)
    assert shapes(model, DIGIT)["head/kernel"] == (64, 1)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(DIGIT))
    assert jax.eval_shape(model.apply, variables, jnp.zeros(DIGIT)).shape == (2, 1)


def test_the_convolutions_by_flax_layers():
    """The same parameters through plain Flax layers, pooled and not, give the same logits."""
    import flax.linen as nn

    class Reference(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), padding="SAME", name="conv1")(x))
            x = nn.relu(nn.Conv(6, (3, 3), padding="SAME", name="conv2")(x))
            x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(8, name="dense1")(x))
            return nn.Dense(3, name="head")(x)

    image = jax.random.normal(jax.random.key(0), (2, 9, 9, 2))
    model = SimpleCNN(3, widths=(4, 6), pooled=(False, True), dense_widths=(8,), padding="SAME")
    variables = randomized(model, image)
    expected = jax.jit(Reference().apply)(variables, image)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, image), expected, atol=1e-5)


def test_dropout_acts_in_training_only():
    image = jax.random.normal(jax.random.key(0), DIGIT)
    model = MLP(4, dense_widths=(64,), dropout_rate=0.5)
    variables = randomized(model, image)

    @jax.jit
    def train(key):
        return model.apply(variables, image, train=True, rngs={"dropout": key})

    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    without = MLP(4, dense_widths=(64,)).apply(variables, image, train=True)
    np.testing.assert_allclose(model.apply(variables, image), without, rtol=1e-5)
    # What is kept is doubled, so the mean over many masks is the logits of evaluation.
    many = jax.lax.map(train, jax.random.split(jax.random.key(2), 2000))
    np.testing.assert_allclose(many.mean(0), without, atol=0.15 * float(many.std(0).max()))


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_every_parameter_gets_a_gradient(norm):
    image = jax.random.normal(jax.random.key(0), (4, 12, 12, 1))
    model = models.build(
        SimpleCNN, num_classes=3, widths=(8, 8), dense_widths=(16,), norm=norm, dropout_rate=0.2
    )
    variables = randomized(model, image)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = model.apply(
                variables | {"params": params},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(2)},
            )
            return jnp.sum(jnp.sin(logits) * jnp.arange(1.0, 4.0))

        return jax.grad(loss)(params)

    for path, leaf in trees.named_leaves(gradient(variables["params"])).items():
        assert jnp.any(leaf != 0), path


def test_batch_statistics_over_an_axis_are_those_of_the_whole_batch():
    image = jax.random.normal(jax.random.key(0), (8, 12, 12, 1))
    model = models.build(SimpleCNN, num_classes=3, norm="batch")
    variables = randomized(model, image)

    def train(model, image):
        return model.apply(variables, image, train=True, mutable=["batch_stats"])

    logits, whole = jax.jit(lambda x: train(model, x))(image)
    parts = jax.jit(
        jax.vmap(
            lambda x: train(models.with_fields(model, axis_name="device"), x), axis_name="device"
        )
    )(image.reshape(4, 2, 12, 12, 1))
    np.testing.assert_allclose(parts[0].reshape(8, 3), logits, atol=1e-5)
    for device in range(4):
        jax.tree.map(
            lambda part, value: np.testing.assert_allclose(part[device], value, atol=1e-5),  # noqa: B023
            parts[1]["batch_stats"],
            whole["batch_stats"],
        )


@pytest.mark.parametrize(
    ("padding", "pooled", "smallest"),
    [("VALID", (), 10), ("SAME", (), 4), ("VALID", (False, True), 6)],
)
def test_the_smallest_image(padding, pooled, smallest):
    model = SimpleCNN(3, padding=padding, pooled=pooled)
    layers = shapes(model, (1, smallest, smallest, 1))
    assert layers["head/kernel"] == (64, 3)
    with pytest.raises(UserError, match=f"at least {smallest}x{smallest}"):
        shapes(model, (1, smallest - 1, smallest, 1))


def test_unknown_activation_norm_and_pool_are_named():
    for options in ({"activation": "rellu"}, {"norm": "bacth"}, {"pool": "maximum"}):
        (value,) = options.values()
        with pytest.raises(UserError, match=value):
            shapes(models.create("cnn_32_64", num_classes=10, **options), DIGIT)
