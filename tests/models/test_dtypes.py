"""Every model computes in the dtype that it is given, from image to logits."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from cnnjax import models
from cnnjax.ops import ConvPool
from tests.models.test_remat import MODELS as WITH_BLOCKS

NAMES = ("lenet5", "lenet5_1998", "cnn_32_64_dense64", "mlp", "alexnet", "alexnet_2012")
SMALL = {name: models.create(name, num_classes=10) for name in NAMES} | {
    "batch_norm": models.create("cnn_32_64", num_classes=3, norm="batch")
}
SHAPES = {"batch_norm": (28, 28, 1)} | {name: models.input_shape(name) for name in NAMES}
MODELS = {name: (model, (size, size, 3)) for name, (model, size) in WITH_BLOCKS.items()} | {
    name: (model, SHAPES[name]) for name, model in SMALL.items()
}
LAYERS = (nn.Conv, nn.Dense, nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, ConvPool)


def test_every_model_has_the_field():
    assert all("dtype" in models.model_fields(name) for name in models.MODELS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MODELS)
def test_layers_compute_in_it_and_what_adds_up_is_float32(name, dtype):
    model, shape = MODELS[name]
    model = models.with_fields(model, dtype=dtype)
    outputs = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if isinstance(context.module, LAYERS):
            outputs["/".join(context.module.path)] = (args[0].dtype, output.dtype)
        return output

    image = jnp.zeros((2, *shape))
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(record):
        logits, variables = jax.eval_shape(
            functools.partial(model.init_with_output, train=True), keys, image
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype in (dtype, jnp.float32)
    # The image is float32; from the first layer on, nothing goes back to it.
    (_, first), *later = outputs.values()
    assert {first, *(dtype for pair in later for dtype in pair)} == {jnp.dtype(dtype)}
