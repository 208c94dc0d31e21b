"""Norms folded and ranges equalized: a network that computes the same."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import compress, models, ops
from cnnjax.compress.quantization import traced
from cnnjax.models.norms import norm_layer
from cnnjax.trees import from_named_leaves, named_leaves
from tests.tiny import BatchNormNet


def trained_like(variables, seed=0):
    """Returns variables whose norms have statistics, scales and biases as after training."""
    rng = np.random.default_rng(seed)
    draws = {
        "var": lambda shape: rng.uniform(0.5, 2, shape),
        "mean": lambda shape: rng.normal(0, 0.3, shape),
        "scale": lambda shape: rng.uniform(0.5, 1.5, shape),
        "bias": lambda shape: rng.normal(0, 0.2, shape),
    }
    leaves = {}
    for path, leaf in named_leaves(variables).items():
        draw = draws.get(path.rpartition("/")[2])
        leaves[path] = jnp.asarray(draw(leaf.shape), leaf.dtype) if draw else leaf
    return from_named_leaves(leaves)


def drawn(model, shape):
    image = jax.random.normal(jax.random.key(1), (2, *shape))
    init = jax.jit(functools.partial(model.init, train=False))
    return trained_like(init(jax.random.key(0), image)), image


def outputs(model, variables, image):
    return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, image)


class Mixed(nn.Module):
    """Norms of every kind of place: behind a layer, behind a sum, seen by others, before."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train=False):
        norm = norm_layer("batch", train=train)
        x = norm(name="norm_of_image")(image)
        a = ops.Conv(4, (3, 3), name="behind_layer")(x)
        a = norm(name="folds")(a)
        b = ops.Conv(4, (3, 3), use_bias=False, name="seen_twice")(x)
        c = norm(name="stays")(b)
        x = norm(name="behind_sum")(nn.relu(a) + c + b)
        x = ops.ConvTranspose(3, (2, 2), use_bias=False, name="enlarges")(x)
        x = nn.relu(norm(name="folds_too")(x)).mean((1, 2))
        x = norm(name="of_dense")(nn.Dense(6, name="dense")(x))
        return nn.Dense(self.num_classes, name="head")(x)


def test_only_norms_behind_one_layer_alone_are_folded():
    model = Mixed()
    variables, image = drawn(model, (8, 8, 2))
    folded, small = compress.fold_batch_norm(model, variables, (8, 8, 2))
    assert dict(folded.folded) == {
        "behind_layer": "folds",
        "enlarges": "folds_too",
        "dense": "of_dense",
    }
    before, after = outputs(model, variables, image), outputs(folded, small, image)
    np.testing.assert_allclose(before, after, atol=1e-5)
    again, same = compress.fold_batch_norm(folded, small, (8, 8, 2))
    assert again == folded and named_leaves(same).keys() == named_leaves(small).keys()


def test_a_folded_model_initializes_what_it_applies():
    model = BatchNormNet()
    variables, image = drawn(model, (28, 28, 1))
    folded, small = compress.fold_batch_norm(model, variables, (28, 28, 1))
    drawn_ = jax.eval_shape(lambda: folded.init(jax.random.key(0), image))
    shapes = {path: leaf.shape for path, leaf in named_leaves(drawn_).items()}
    assert shapes == {path: leaf.shape for path, leaf in named_leaves(small).items()}
    assert not small["batch_stats"]


FAMILIES = {
    "lenet5": (0, 0),
    "cifar_resnet20": (19, 0),
    "vgg11_bn": (8, 0),
    "mobilenet_v2": (52, 0),
    "densenet121": (59, 62),
    "efficientnet_b0": (49, 0),
    "resnet18_v2": (8, 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lenet5", "cifar_resnet20", "mobilenet_v2", "resnet18_v2"])
def test_families_compute_the_same_without_their_norms(name):
    check_family(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["vgg11_bn", "densenet121", "efficientnet_b0"])
def test_larger_families_compute_the_same_without_their_norms(name):
    check_family(name)


def check_family(name):
    height, _, channels = models.input_shape(name)
    shape = (min(height, 64), min(height, 64), channels)
    model = models.create(name, num_classes=10)
    variables, image = drawn(model, shape)
    folded, small = compress.fold_batch_norm(model, variables, shape)
    kept = sum(path.endswith("/var") for path in named_leaves(small["batch_stats"]))
    assert (len(folded.folded), kept) == FAMILIES[name]
    before, after = outputs(model, variables, image), outputs(folded, small, image)
    np.testing.assert_allclose(before, after, atol=1e-5 * max(1, np.abs(before).max()))


def ranges(params, first, second):
    here = np.abs(params[first]["kernel"]).max((0, 1, 2))
    kernel = np.abs(params[second]["kernel"])
    channels = len(here)
    return here, kernel.reshape(-1, channels, kernel.shape[-1]).max((0, 2))


def test_equalized_channels_have_equal_ranges_and_outputs_stay():
    model = models.create("lenet5", num_classes=10)
    variables, image = drawn(model, (28, 28, 1))
    scales = np.exp(np.linspace(-3, 3, 16))
    variables["params"]["conv2"]["kernel"] *= scales
    equal, pairs = compress.equalize(model, variables, (28, 28, 1))
    assert pairs == [
        ("conv1", "conv2"),
        ("conv2", "dense1"),
        ("dense1", "dense2"),
        ("dense2", "head"),
    ]
    before = outputs(model, variables, image)
    np.testing.assert_allclose(before, outputs(model, equal, image), rtol=1e-4, atol=1e-5)
    here, there = ranges(equal["params"], "conv2", "dense1")
    np.testing.assert_allclose(here, there, rtol=0.05)
    was, _ = ranges(variables["params"], "conv2", "dense1")
    assert was.max() / was.min() > 20 > here.max() / here.min()


@pytest.mark.parametrize("activation", ["tanh", "relu6", "gelu"])
def test_other_activations_are_left_alone(activation):
    model = models.create("lenet5", num_classes=10, activation=activation)
    variables, _ = drawn(model, (28, 28, 1))
    _, pairs = compress.equalize(model, variables, (28, 28, 1))
    assert pairs == []


class Depthwise(nn.Module):
    """A depthwise and a grouped convolution between others."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.leaky_relu(ops.Conv(8, (3, 3), name="first")(image))
        x = nn.relu(ops.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(ops.Conv(12, (3, 3), feature_group_count=2, name="grouped")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


@pytest.mark.slow
def test_groups_are_equalized_channel_by_channel():
    model = Depthwise()
    variables, image = drawn(model, (8, 8, 1))
    variables["params"]["first"]["kernel"] *= np.exp(np.linspace(-2, 2, 8))
    equal, pairs = compress.equalize(model, variables, (8, 8, 1))
    assert [first for first, _ in pairs] == ["first", "depthwise", "grouped"]
    before = outputs(model, variables, image)
    np.testing.assert_allclose(before, outputs(model, equal, image), rtol=1e-4, atol=1e-5)


def test_the_program_tells_calls_and_shapes():
    model = BatchNormNet()
    variables, _ = drawn(model, (28, 28, 1))
    layers = traced.trace(model, variables, (28, 28, 1)).layers
    assert [*layers] == ["conv1", "conv1_norm", "conv2", "conv2_norm", "head"]
    assert layers["conv2"].output_shape == (2, 7, 7, 8) and layers["head"].calls == 1
    assert [layer.has_kernel for layer in layers.values()] == [True, False, True, False, True]
