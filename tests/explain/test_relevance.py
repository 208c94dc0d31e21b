"""Layer-wise relevance: conservation, rules by hand, parity with captum, networks without rules."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import explain, models
from cnnjax.errors import UserError
from tests.explain.test_explain_methods import (
    IMAGE,
    LINEAR,
    LINEAR_VARIABLES,
    MODEL,
    TARGET,
    VARIABLES,
)

KEY = jax.random.key(2)
RULES = ("composite", "epsilon", "gamma", "z_plus", "alpha_beta")


class Dense(nn.Module):
    """Two dense layers with biases, whose relevance is computed by hand."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Dense(5, name="dense1")(image.reshape(len(image), -1))
        return nn.Dense(3, name="head")(nn.relu(x))


def drawn(model, image, *, key=KEY):
    """Variables whose biases and statistics are random too."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(7), image))
    keys = jax.random.split(key, len(leaves))
    drawn = [
        leaf if leaf.ndim > 1 else leaf + 0.3 * jax.random.uniform(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def test_of_a_linear_model_it_is_weight_times_input():
    kernel = LINEAR_VARIABLES["params"]["head"]["kernel"].T[jnp.array([2, 0])]
    result = explain.lrp(
        *(LINEAR, LINEAR_VARIABLES, IMAGE, TARGET), first="same", rule="epsilon", channels="keep"
    )
    np.testing.assert_allclose(result, IMAGE * kernel.reshape(IMAGE.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES[1:])
def test_rules_by_hand(rule):
    """Montavon et al. 2019, table 10.1, written as matrices of contributions."""
    model, image = Dense(), jax.random.uniform(KEY, (2, 3, 2, 1))
    variables = drawn(model, image)
    first, head = (variables["params"][name] for name in ("dense1", "head"))
    options = {"gamma": 0.4, "alpha": 1.5}
    x = np.asarray(image, np.float64).reshape(2, -1)
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
    logits = hidden @ head["kernel"] + head["bias"]

    def back(x, layer, relevance):
        kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
        terms = x[:, :, None] * kernel

        def of(terms, bias):
            sums = terms.sum(1) + bias
            # Without terms of a sign there is nothing to divide.
            return (terms / np.where(sums == 0, 1, sums)[:, None] * relevance[:, None]).sum(-1)

        up = of(terms.clip(0), bias.clip(0))
        if rule == "epsilon":
            return of(terms, bias)
        if rule == "gamma":
            return of(terms + 0.4 * terms.clip(0), bias + 0.4 * bias.clip(0))
        if rule == "z_plus":
            return up
        down = of(terms.clip(max=0), bias.clip(max=0))
        return 1.5 * up - 0.5 * down

    relevance = logits * np.eye(3)[1]
    expected = back(x, first, back(hidden, head, relevance)).reshape(image.shape)[..., 0]
    result = explain.lrp(
        *(model, variables, image, explain.class_score(1)),
        **(options | {"rule": rule, "first": "same", "epsilon": 1e-9}),
    )
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("rule", ["composite", "alpha_beta"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lenet5", {}),
        ("lenet5", {"activation": "tanh", "pool": "average"}),
        ("cnn_32_64", {"widths": (4, 8), "norm": "batch"}),
    ],
)
def test_without_biases_nothing_is_lost(name, options, rule):
    model = models.create(name, num_classes=3, **options)
    image = jax.random.normal(KEY, (2, 18, 18, 1))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    map_ = jax.jit(
        lambda variables, image: explain.lrp(model, variables, image, TARGET, rule=rule)
    )(variables, image)
    np.testing.assert_allclose(
        jnp.sum(map_, (1, 2)), TARGET(model.apply(variables, image)), rtol=1e-3, atol=1e-4
    )


def test_batch_norm_is_folded_into_the_layer_before():
    """A convolution with batch norm has the relevance of the convolution that computes the same."""
    image = jax.random.uniform(KEY, (2, 16, 16, 1))
    fields = {"num_classes": 3, "widths": (4,)}
    normed = models.create("cnn_32_64", norm="batch", **fields)
    variables = drawn(normed, image)
    params, stats = variables["params"], variables["batch_stats"]["norm1"]
    factor = params["norm1"]["scale"] / jnp.sqrt(stats["var"] + 1e-5)
    conv = {
        "kernel": params["conv1"]["kernel"] * factor,
        "bias": params["norm1"]["bias"] - stats["mean"] * factor,
    }
    plain = models.create("cnn_32_64", **fields)
    folded = {"params": {"conv1": conv, "head": params["head"]}}
    for rule in ("composite", "alpha_beta"):
        ours = explain.lrp(normed, variables, image, TARGET, rule=rule)
        theirs = explain.lrp(plain, folded, image, TARGET, rule=rule)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


class Residual(nn.Module):
    """A sum of two paths, a concatenation, a mean."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="conv1")(image))
        x = nn.relu(x + nn.Conv(4, (3, 3), use_bias=False, name="conv2")(x))
        x = jnp.concatenate([x, nn.max_pool(x, (3, 3), padding="SAME")], -1)
        return nn.Dense(3, use_bias=False, name="head")(jnp.mean(x, (1, 2)))


def test_sums_and_concatenations_divide_relevance():
    model, variables = Residual(), Residual().init(KEY, IMAGE)
    map_ = explain.lrp(model, variables, IMAGE, TARGET)
    np.testing.assert_allclose(
        jnp.sum(map_, (1, 2)), TARGET(model.apply(variables, IMAGE)), rtol=1e-3, atol=1e-4
    )


class Gated(nn.Module):
    """A product of two activations."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(image)
        return nn.Dense(3, name="head")(jnp.mean(Gate(name="gate")(x), (1, 2)))


class Gate(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * nn.relu(x)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "epsilom"}, "did you mean epsilon"),
        ({"first": "bax"}, "box"),
        ({"epsilon": 0.0}, "must be positive"),
        ({"alpha": 0.5}, "1 or more"),
        ({"low": 1.0, "high": 0.0}, "must be below"),
        ({"channels": "all"}, "keep"),
    ],
)
def test_wrong_options_are_one_clear_error(options, text):
    with pytest.raises(UserError, match=text):
        explain.lrp(MODEL, VARIABLES, IMAGE, TARGET, **options)


def test_a_layer_without_a_rule_is_named():
    model = Gated()
    with pytest.raises(UserError, match="no rule for gate: it multiplies two activations"):
        explain.lrp(model, model.init(KEY, IMAGE), IMAGE, TARGET)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cifar_resnet20", ""),
        ("vgg11_bn", ""),
        ("squeezenet1_1", ""),
        ("densenet121", ""),
        ("mobilenet_v2", ""),
        ("mobilenet_v3_small", "stage1/block1/se"),
        ("convnext_tiny", "norm"),
        ("deit_tiny", "norm"),
    ],
)
def test_networks_of_the_zoo_have_rules_or_say_which_layer_has_none(name, text):
    model = models.create(name, num_classes=10)
    size = 224 if name.startswith("deit") else 64
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def check(variables, image):
        explain.relevance.check_network(model, variables, image)
        return image

    if not text:
        jax.eval_shape(check, variables, image)
        return
    with pytest.raises(UserError, match=f"no rule for .*{text}"):
        jax.eval_shape(check, variables, image)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("captum") is None, reason="needs captum, and torch with it"
)
@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z_plus"])
def test_maps_are_captums(rule):
    import torch
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule

    model = models.create("cnn_32_64", num_classes=10, widths=(8, 12), dense_widths=(20,))
    image = jax.random.uniform(KEY, (4, 20, 20, 3))
    variables = drawn(model, image)
    if rule == "gamma":
        # captum leaves biases as they are; negative ones have no positive part to favor.
        variables = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else -leaf, variables)
    below = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(8, 12, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
    )
    above = torch.nn.Sequential(
        *(torch.nn.Linear(3 * 3 * 12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))
    )

    class Network(torch.nn.Module):
        """captum has no rule for torch's Flatten."""

        def __init__(self):
            super().__init__()
            self.below, self.above = below, above

        def forward(self, x):
            return self.above(self.below(x).flatten(1))

    weighted = [part for part in [*below, *above] if hasattr(part, "weight")]
    made = {"epsilon": EpsilonRule, "gamma": GammaRule, "z_plus": Alpha1_Beta0_Rule}[rule]
    for part, name in zip(weighted, ("conv1", "conv2", "dense1", "head"), strict=True):
        kernel = np.asarray(variables["params"][name]["kernel"])
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif name == "dense1":
            kernel = kernel.reshape(3, 3, 12, 20).transpose(3, 2, 0, 1).reshape(20, -1)
        else:
            kernel = kernel.T
        part.weight.data = torch.from_numpy(kernel.copy())
        part.bias.data = torch.from_numpy(np.array(variables["params"][name]["bias"]))
        part.rule = made()
    pixels = torch.from_numpy(np.asarray(image).transpose(0, 3, 1, 2).copy())
    label = jnp.array([1, 5, 0, 9])
    theirs = LRP(Network()).attribute(pixels, torch.from_numpy(np.array(label)).long())
    ours = explain.lrp(
        *(model, variables, image, explain.class_score(label)),
        **{"rule": rule, "first": "same", "epsilon": 1e-9, "channels": "keep"},
    )
    expected = theirs.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())
