"""The layers that are Flax's in all but how they are compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import ops


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_dense_is_flax_dense(dtype, shape):
    inputs = jax.random.normal(jax.random.key(0), shape)
    options = {"dtype": dtype, "bias_init": nn.initializers.normal()}
    ours, theirs = ops.Dense(7, **options), nn.Dense(7, **options)
    variables = theirs.init(jax.random.key(1), inputs)
    mine = ours.init(jax.random.key(1), inputs)
    jax.tree.map(np.testing.assert_array_equal, mine, variables)

    def loss(layer, variables, inputs):
        output = layer.apply(variables, inputs)
        assert output.dtype == (dtype or jnp.float32)
        return jnp.sum(jnp.square(output.astype(jnp.float32))), output

    tolerance = 1e-5 if dtype is None else 0.03
    gradient = jax.value_and_grad(loss, (1, 2), has_aux=True)
    for mine, other in zip(
        jax.tree.leaves(gradient(ours, variables, inputs)),
        jax.tree.leaves(gradient(theirs, variables, inputs)),
        strict=True,
    ):
        largest = jnp.abs(other).max()
        np.testing.assert_allclose(mine, other, atol=tolerance * largest, rtol=tolerance)


def test_bias_of_a_bfloat16_dense_is_summed_in_float32():
    """A bfloat16 sum stays at 256, where adding 1 is rounded away."""
    inputs = jnp.zeros((4096, 2))
    layer = ops.Dense(3, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), inputs)
    gradient = jax.grad(lambda v: jnp.sum(layer.apply(v, inputs).astype(jnp.float32)))(variables)
    np.testing.assert_array_equal(gradient["params"]["bias"], np.full(3, 4096, np.float32))
