"""Patches cost memory: the forms that make them must stay near the compiler's own convolution."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from cnnjax import models, ops


def temporary_bytes(lowering, batch_size):
    """The compiler's scratch memory for ResNet-50's gradient at 224x224, all activations in it."""
    model = models.create("resnet50", num_classes=1000)
    image = jax.ShapeDtypeStruct((batch_size, 224, 224, 3), jnp.float32)
    label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)

    def loss(params, image, label):
        logits, _ = model.apply(
            {**variables_of_zeros, "params": params}, image, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    variables_of_zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), {"batch_stats": variables["batch_stats"]}
    )
    options = {"xla_backend_optimization_level": 0}
    with ops.lowering(lowering):
        lowered = jax.jit(jax.grad(loss)).lower(variables["params"], image, label)
    return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_resnet50_at_224_takes_little_more_memory_than_with_lax():
    plain, ours = (temporary_bytes(lowering, batch_size=16) for lowering in ("lax", "auto"))
    assert ours < 1.25 * plain
