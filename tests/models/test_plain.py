"""AlexNet, VGG, GoogLeNet, Inception v3, SqueezeNet: their parts by hand, and their behavior.

Exact sizes are in test_counts.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, ops, trees
from cnnjax.errors import UserError
from cnnjax.models.alexnet import local_response_norm
from cnnjax.models.images import adaptive_average_pool, max_pool_ceil


@pytest.fixture(autouse=True)
def plain_convolutions():
    """These tests are of the models; `lax` convolutions compile soonest."""
    with ops.lowering("lax"):
        yield


# A small variant of each family, and an image it takes.
SMALL = {
    "alexnet": ({"stem": "cifar", "dropout_rate": 0.1}, (15, 15, 3)),
    "vgg11": ({"stem": "cifar", "dense_widths": (32,), "dropout_rate": 0.1}, (32, 32, 3)),
    "vgg11_bn": ({"stem": "cifar", "dense_widths": (32,), "dropout_rate": 0.1}, (32, 32, 3)),
    "googlenet": ({"stem": "cifar", "auxiliary_heads": True}, (16, 16, 3)),
    "squeezenet1_1": (
        {"stem": "cifar", "fires": ((8, 16), (8, 16), (12, 24)), "pools_before": (3,)},
        (16, 16, 3),
    ),
}


def randomized(model, image):
    """Variables of `model`: kernels of variance 2 / fan-in, scales and variances near 1."""
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        if leaf.ndim > 1:
            value = generator.normal(size=leaf.shape) * (2 / math.prod(leaf.shape[:-1])) ** 0.5
        else:
            center = 1.0 if path.endswith(("scale", "var")) else 0.0
            value = generator.uniform(center - 0.2, center + 0.2, size=leaf.shape)
        return jnp.asarray(value, jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves = [draw(path, leaf) for path, leaf in trees.named_leaves(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def shape_of(name, image_shape, **options):
    model = models.create(name, num_classes=7, **options)
    image = jnp.zeros((2, *image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return jax.eval_shape(model.apply, variables, image).shape


def test_local_response_norm_by_hand():
    image = np.random.default_rng(0).normal(0, 30, size=(1, 2, 2, 7)).astype(np.float32)
    expected = np.zeros_like(image)
    for channel in range(7):
        first, last = max(0, channel - 2), min(6, channel + 2)
        total = (image[..., first : last + 1] ** 2).sum(-1)
        expected[..., channel] = image[..., channel] / (2 + 1e-4 * total) ** 0.75
    np.testing.assert_allclose(local_response_norm(jnp.asarray(image)), expected, rtol=1e-5)


@pytest.mark.parametrize(("size", "window"), [(7, 3), (8, 3), (12, 3), (13, 3), (8, 2), (7, 2)])
def test_max_pool_ceil_by_hand(size, window):
    image = -1 - np.random.default_rng(0).random(size=(1, size, size, 2)).astype(np.float32)
    count = math.ceil((size - window) / 2) + 1
    expected = np.zeros((1, count, count, 2))
    for row in range(count):
        for column in range(count):
            rows, columns = slice(2 * row, 2 * row + window), slice(2 * column, 2 * column + window)
            expected[0, row, column] = image[0, rows, columns].max((0, 1))
    np.testing.assert_allclose(max_pool_ceil(jnp.asarray(image), window, 2), expected)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(7, 7, 7), (14, 10, 7), (9, 4, 6), (1, 2, 3)]
)
def test_adaptive_average_pool_by_hand(height, width, size):
    image = np.random.default_rng(0).random(size=(2, height, width, 3)).astype(np.float32)
    expected = np.zeros((2, size, size, 3))
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, math.ceil((i + 1) * height / size))
            columns = slice(j * width // size, math.ceil((j + 1) * width / size))
            expected[:, i, j] = image[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(image), size), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "smallest"),
    [
        ("alexnet", {}, 63),
        ("alexnet", {"stem": "cifar"}, 15),
        ("alexnet_2012", {}, 67),
        ("vgg11", {"stem": "cifar"}, 32),
        ("googlenet", {}, 15),
        ("inception_v3", {}, 75),
        ("inception_v3", {"auxiliary_head": True}, 299),
        ("squeezenet1_0", {}, 21),
        ("squeezenet1_1", {"stem": "cifar"}, 8),
    ],
)
def test_the_smallest_image(name, options, smallest):
    model = models.create(name, num_classes=7, **options)
    result = models.summary(model, (smallest, smallest, 3))
    assert all(min(row.output_shape) >= 1 for row in result.rows)
    with pytest.raises(UserError, match=f"at least {smallest}x{smallest} pixels"):
        models.summary(model, (smallest, smallest - 1, 3))


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "googlenet", "squeezenet1_0"])
def test_stem_for_small_images(name):
    assert shape_of(name, (32, 32, 3), stem="cifar") == (2, 7)
    with pytest.raises(UserError, match="unknown stem 'cifer': did you mean cifar"):
        shape_of(name, (32, 32, 3), stem="cifer")


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("vgg11", "batch"),
        ("vgg11", "group"),
        ("vgg11", "none"),
        ("googlenet", "group"),
        ("inception_v3", "none"),
        ("squeezenet1_0", "batch"),
        ("squeezenet1_0", "layer"),
    ],
)
def test_any_norm(name, norm):
    model = models.create(name, num_classes=7, norm=norm)
    image = jnp.zeros((1, *models.input_shape(name)))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert ("batch_stats" in variables) == (norm == "batch")
    assert any("norm" in path for path in trees.named_leaves(variables)) == (norm != "none")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "googlenet" else name for name in SMALL],
)
def test_gradients_and_modes(name):
    """Every parameter has a gradient; dropout and batch statistics act in training only."""
    options, image_shape = SMALL[name]
    model = models.create(name, num_classes=5, **options)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, *image_shape)), jnp.float32)
    variables = randomized(model, image)
    statistics = variables.get("batch_stats", {})

    @jax.jit
    def loss_and_gradient(params, key):
        def loss(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": statistics},
                image,
                train=True,
                mutable=["batch_stats", "auxiliary_logits"],
                rngs={"dropout": key},
            )
            outputs = [logits, *jax.tree.leaves(updated.get("auxiliary_logits", {}))]
            return sum(jnp.sum(out * jnp.arange(1.0, 6.0)) for out in outputs), (logits, updated)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (logits, updated) = loss_and_gradient(variables["params"], jax.random.key(3))
    for path, leaf in trees.named_leaves(gradient).items():
        assert jnp.any(leaf != 0), path
        assert jnp.all(jnp.isfinite(leaf)), path
    _, (other, _) = loss_and_gradient(variables["params"], jax.random.key(4))
    assert not np.allclose(logits, other)

    for path, value in trees.named_leaves(updated.get("batch_stats", {})).items():
        assert not np.array_equal(value, trees.named_leaves(statistics)[path]), path


@pytest.mark.parametrize(
    ("name", "heads", "names"),
    [
        ("googlenet", "auxiliary_heads", {"aux1_logits", "aux2_logits"}),
        ("inception_v3", "auxiliary_head", {"aux_logits"}),
    ],
)
def test_auxiliary_logits_are_sown_in_training_only(name, heads, names):
    model = models.create(name, num_classes=7, **{heads: True})
    image = jnp.zeros((2, *models.input_shape(name)))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    assert set(variables) == {"params", "batch_stats"}

    def apply(variables, train):
        return model.apply(
            variables,
            image,
            train=train,
            mutable=["auxiliary_logits", "batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )

    logits, state = jax.eval_shape(lambda v: apply(v, True), variables)
    assert logits.shape == (2, 7)
    assert {n: value[0].shape for n, value in state["auxiliary_logits"].items()} == dict.fromkeys(
        names, (2, 7)
    )
    _, state = jax.eval_shape(lambda v: apply(v, False), variables)
    assert "auxiliary_logits" not in state


def test_googlenet_of_the_paper_has_large_kernels():
    image = jnp.zeros((1, 224, 224, 3))
    for large_kernel in (3, 5):
        model = models.create("googlenet", num_classes=7, large_kernel=large_kernel)
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        kernel = params["inception3a"]["branch3_2"]["conv"]["kernel"]
        assert kernel.shape == (large_kernel, large_kernel, 16, 32)


def test_squeezenet_head_is_a_mean_over_positions():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    model = models.create("squeezenet1_1", num_classes=5, stem="cifar")
    variables = randomized(model, image)
    headless = models.create("squeezenet1_1", num_classes=None, stem="cifar")
    features = jax.jit(headless.apply)(variables, image)
    head = variables["params"]["head"]
    expected = np.maximum(features @ head["kernel"] + head["bias"], 0).mean((1, 2))
    np.testing.assert_allclose(jax.jit(model.apply)(variables, image), expected, atol=1e-6)


def test_vgg_with_and_without_the_fused_pool_agree():
    """`norm="none"` fuses convolution and pool; plain Flax layers on its parameters agree."""
    import flax.linen as nn

    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)), jnp.float32)
    model = models.create("vgg11", num_classes=5, stem="cifar", dense_widths=())
    variables = randomized(model, image)

    @jax.jit
    def reference(params, x):
        for stage, depth in enumerate((1, 1, 2, 2, 2), 1):
            for index in range(1, depth + 1):
                layer = params[f"stage{stage}"][f"conv{index}"]
                width = layer["kernel"].shape[-1]
                x = nn.relu(nn.Conv(width, (3, 3)).apply({"params": layer}, x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return x.reshape(1, 512) @ params["head"]["kernel"] + params["head"]["bias"]

    expected = reference(variables["params"], image)
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, image), expected, atol=1e-4 * float(jnp.abs(expected).max())
    )
