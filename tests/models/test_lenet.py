"""LeNet-5 against hand computations, and the network of 1998 against its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import models, ops, trees
from cnnjax.errors import UserError
from cnnjax.models import lenet

# Table I as printed: for each map of S2 (row), the maps of C3 (columns) marked X.
TABLE_I = (
    (0, 4, 5, 6, 9, 10, 11, 12, 14, 15),
    (0, 1, 5, 6, 7, 10, 11, 12, 13, 15),
    (0, 1, 2, 6, 7, 8, 11, 13, 14, 15),
    (1, 2, 3, 6, 7, 8, 9, 12, 14, 15),
    (2, 3, 4, 7, 8, 9, 10, 12, 13, 15),
    (3, 4, 5, 8, 9, 10, 11, 13, 14, 15),
)


def randomized(model, image, seed=0):
    """Variables of `model` with every parameter, biases too, drawn at random."""
    params = jax.eval_shape(model.init, jax.random.key(seed), image)["params"]
    generator = np.random.default_rng(seed)
    return {
        "params": jax.tree.map(
            lambda leaf: jnp.asarray(generator.normal(0, 0.2, leaf.shape), jnp.float32), params
        )
    }


def sizes(variables):
    return {path: leaf.size for path, leaf in trees.named_leaves(variables["params"]).items()}


def numpy_conv(image, kernel, bias):
    height, width = (image.shape[axis] - kernel.shape[axis - 1] + 1 for axis in (1, 2))
    result = np.zeros((image.shape[0], height, width, kernel.shape[3]))
    for row in range(height):
        for column in range(width):
            patch = image[:, row : row + kernel.shape[0], column : column + kernel.shape[1]]
            result[:, row, column] = np.tensordot(patch, kernel, 3) + bias
    return result


def numpy_pool(image, reduce):
    batch, height, width, channels = image.shape
    return reduce(image.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


@pytest.mark.parametrize(
    ("activation", "function", "pool", "reduce"),
    [
        ("relu", lambda x: np.maximum(x, 0), "max", np.max),
        ("relu", lambda x: np.maximum(x, 0), "average", np.mean),
        ("tanh", np.tanh, "average", np.mean),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), "max", np.max),
        (jnp.square, np.square, "max", np.max),
    ],
)
def test_logits_equal_a_numpy_computation(activation, function, pool, reduce):
    image = np.random.default_rng(1).normal(size=(2, 28, 28, 1))
    model = lenet.LeNet5(activation=activation, pool=pool)
    variables = randomized(model, jnp.asarray(image, jnp.float32))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    x = image
    for name in ("conv1", "conv2"):
        x = numpy_pool(function(numpy_conv(x, **params[name])), reduce)
    x = x.reshape(2, 256)
    for name in ("dense1", "dense2"):
        x = function(x @ params[name]["kernel"] + params[name]["bias"])
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]

    logits = jax.jit(model.apply)(variables, jnp.asarray(image, jnp.float32))
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_parameters_by_layer():
    variables = jax.eval_shape(lenet.LeNet5().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert sizes(variables) == {
        "conv1/kernel": 5 * 5 * 6,
        "conv1/bias": 6,
        "conv2/kernel": 5 * 5 * 6 * 16,
        "conv2/bias": 16,
        "dense1/kernel": 4 * 4 * 16 * 120,
        "dense1/bias": 120,
        "dense2/kernel": 120 * 84,
        "dense2/bias": 84,
        "head/kernel": 84 * 10,
        "head/bias": 10,
    }
    assert sum(sizes(variables).values()) == 44_426


def test_parameters_at_32_pixels():
    # The published count of LeNet-5 with a fully connected C3.
    variables = jax.eval_shape(lenet.LeNet5().init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    assert sum(sizes(variables).values()) == 61_706


def test_initial_signal_keeps_its_variance():
    image = jax.random.normal(jax.random.key(0), (64, 28, 28, 1))
    model = lenet.LeNet5()
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(1), image)
    assert 0.3 < float(jnp.std(logits)) < 3.0


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    image = jnp.ones((2, 28, 28, 1))
    model = lenet.LeNet5(dtype=jnp.bfloat16)
    variables = randomized(model, image)
    initial = jax.eval_shape(model.init, jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, image)
    assert logits.dtype == jnp.bfloat16
    exact = jax.jit(lenet.LeNet5().apply)(variables, image)
    np.testing.assert_allclose(
        logits.astype(jnp.float32), exact, atol=0.03 * float(jnp.abs(exact).max())
    )


@pytest.mark.parametrize("shape", [(1, 15, 28, 1), (28, 28, 1)])
def test_unfit_images_are_refused(shape):
    with pytest.raises(UserError, match="LeNet5 takes images"):
        lenet.LeNet5().init(jax.random.key(0), jnp.zeros(shape))


def test_1998_parameters_by_layer():
    image = jnp.zeros((1, 32, 32, 1))
    variables = jax.eval_shape(lenet.LeNet5_1998().init, jax.random.key(0), image)
    # The counts that section II.B gives for C1, S2, C3, S4, C5 and F6.
    layers = {}
    for path, size in sizes(variables).items():
        layers[path.split("/")[0]] = layers.get(path.split("/")[0], 0) + size
    assert layers == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48_120, "f6": 10_164}
    assert sum(layers.values()) == 60_000


def test_1998_connections_are_those_of_table_i():
    image = jax.random.normal(jax.random.key(0), (1, 14, 14, 6))
    layer = lenet.ConnectedConv()
    variables = layer.init(jax.random.key(1), image)
    before = layer.apply(variables, image)
    for source, targets in enumerate(TABLE_I):
        after = layer.apply(variables, image.at[..., source].add(1.0))
        changed = np.flatnonzero(np.any(np.asarray(after != before), axis=(0, 1, 2)))
        assert tuple(changed) == targets


def test_1998_c3_uses_each_filter_for_its_connection():
    image = jax.random.normal(jax.random.key(0), (2, 14, 14, 6))
    layer = lenet.ConnectedConv()
    variables = randomized(layer, image)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    expected = np.zeros((2, 10, 10, 16)) + bias
    connection = 0
    for target in range(16):
        for source in [s for s, targets in enumerate(TABLE_I) if target in targets]:
            plane = np.asarray(image[..., source : source + 1])
            filters = kernel[:, :, connection, None, None]
            expected[..., target] += numpy_conv(plane, filters, 0.0)[..., 0]
            connection += 1
    np.testing.assert_allclose(layer.apply(variables, image), expected, atol=1e-5)


def test_1998_subsampling_by_hand():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    params = {"coefficient": jnp.array([0.5]), "bias": jnp.array([-1.0])}
    result = lenet.Subsample().apply({"params": params}, image)
    sums = np.array([[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]])
    np.testing.assert_allclose(result[0, :, :, 0], 0.5 * sums - 1.0)


def test_1998_squashing_keeps_one():
    np.testing.assert_allclose(
        lenet.scaled_tanh(jnp.array([-1.0, 0.0, 1.0])), [-1.0, 0.0, 1.0], atol=1e-4
    )


def test_1998_codes_are_bitmaps_seven_by_twelve():
    codes = lenet.digit_codes()
    assert codes.shape == (10, 84)
    assert set(np.unique(codes)) == {-1.0, 1.0}
    differing = [np.sum(codes[i] != codes[j]) for i in range(10) for j in range(i)]
    assert min(differing) >= 8
    # The first row of the bar of a seven is all ink; a one has none on its left edge.
    assert np.all(codes[7].reshape(12, 7)[0] == 1)
    assert np.all(codes[1].reshape(12, 7)[:, 0] == -1)


def test_1998_output_is_minus_the_squared_distance():
    codes = lenet.digit_codes()
    features = np.random.default_rng(0).normal(size=(3, 84)).astype(np.float32)
    logits = lenet.CodeDistance().apply({}, jnp.asarray(features))
    for example in range(3):
        for digit in range(10):
            distance = sum((features[example] - codes[digit]) ** 2)
            assert logits[example, digit] == pytest.approx(-distance, rel=1e-5)
    exact = lenet.CodeDistance().apply({}, jnp.asarray(codes))
    np.testing.assert_array_equal(jnp.argmax(exact, axis=1), np.arange(10))
    np.testing.assert_array_equal(jnp.diagonal(exact), np.zeros(10))


def test_1998_initial_parameters_stay_within_the_bound_of_appendix_a():
    image = jnp.zeros((1, 32, 32, 1))
    params = jax.jit(lenet.LeNet5_1998().init)(jax.random.key(0), image)["params"]
    fan_in = {"c1": 25, "s2": 4, "s4": 4, "c5": 400, "f6": 120}
    for layer, inputs in fan_in.items():
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(params[layer]))
        assert 0.5 * 2.4 / inputs < largest <= 2.4 / inputs
    # In C3 a map with three inputs has 75, one with six 150.
    kernel = params["c3"]["kernel"]
    assert 2.4 / 150 < float(jnp.abs(kernel[:, :, :18]).max()) <= 2.4 / 75
    assert float(jnp.abs(kernel[:, :, -6:]).max()) <= 2.4 / 150


def test_1998_learns_to_tell_its_digits_apart():
    """Gradient steps on ten random images bring each to its own code."""
    image = jax.random.normal(jax.random.key(0), (10, 32, 32, 1))
    label = jnp.arange(10)
    model = lenet.LeNet5_1998()
    variables = jax.jit(model.init)(jax.random.key(1), image)

    def loss(variables):
        logits = jax.nn.log_softmax(model.apply(variables, image, train=True))
        return -jnp.mean(logits[label, label])

    optimizer = optax.adam(0.002)

    @jax.jit
    def step(variables, opt_state):
        value, gradient = jax.value_and_grad(loss)(variables)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return value, optax.apply_updates(variables, updates), opt_state

    losses, opt_state = [], optimizer.init(variables)
    with ops.lowering("lax"):  # compiles sooner
        for _ in range(40):
            value, variables, opt_state = step(variables, opt_state)
            losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(10), rel=0.1)
    assert losses[-1] < 0.05


@pytest.mark.parametrize("num_classes", [2, 11])
def test_1998_has_ten_codes(num_classes):
    with pytest.raises(UserError, match="must be 10 or None"):
        models.create("lenet5_1998", num_classes=num_classes).init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 1))
        )


def test_1998_takes_32_pixels():
    with pytest.raises(UserError, match="32x32 pixels, got 28x28"):
        lenet.LeNet5_1998().init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
