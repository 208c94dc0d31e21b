"""A network is compiled in the form that suits the platform it is lowered for, wherever that is."""

import functools

import jax
import jax.numpy as jnp
import pytest

from cnnjax import ops
from tests.models.test_dtypes import MODELS

CALL = "stablehlo.custom_call @__onednn"
# Transposed convolutions whose windows do not overlap are products on every platform.
PRODUCTS = {"unet": 3}
QUICK = ("lenet5", "resnet", "mobilenet_v2", "regnet", "mlp")


def lower_gradient(name, platform):
    """The loss and all its gradients, as XLA gets them for a platform."""
    model, shape = MODELS[name]
    image = jax.ShapeDtypeStruct((16, *shape), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(functools.partial(model.init, train=False), keys, image)

    def loss(params, image):
        logits, _ = model.apply(
            {**variables_of(variables), "params": params},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        return jnp.sum(logits)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    traced = gradient.trace(variables["params"], image)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def variables_of(variables):
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    return {name: values for name, values in zeros.items() if name != "params"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=()
            if name in QUICK
            else pytest.mark.exhaustive
            if name == "inception_v3"
            else pytest.mark.slow,
        )
        for name in MODELS
    ],
)
def test_each_platform_gets_its_form(name):
    with ops.lowering("lax"):
        expected = lower_gradient(name, "cuda").count("stablehlo.convolution")
    expected -= PRODUCTS.get(name, 0)
    for platform in ("cuda", "tpu"):
        program = lower_gradient(name, platform)
        assert program.count("stablehlo.convolution") == expected
        assert CALL not in program
    assert "stablehlo.convolution" not in lower_gradient(name, "cpu")
    # The multilayer perceptron has none.
    assert (expected > 0) == (name != "mlp")
