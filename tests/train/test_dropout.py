"""Draws that belong to examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.models.blocks import StochasticDepth
from cnnjax.train import dropout

KEY = jax.random.key(0)
NUMBERS = jnp.arange(2000, dtype=jnp.int32)


class Net(nn.Module):
    """Two layers that drop, one within a rematerialized function."""

    broadcast: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        if self.broadcast:
            return StochasticDepth(0.3, name="drop")(x, train=train)
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.remat(lambda layer, x: layer(x))(nn.Dropout(0.3, deterministic=not train), x)


@jax.jit
def draw(numbers, x, key=KEY):
    with dropout.by_example(numbers):
        return Net().apply({}, x, train=True, rngs={"dropout": key})


def test_an_examples_draw_depends_on_its_number_alone():
    x = jnp.ones((2000, 3, 4))
    whole = draw(NUMBERS, x)
    np.testing.assert_array_equal(draw(NUMBERS[7::5], x[7::5]), whole[7::5])
    assert np.mean(np.asarray(draw(NUMBERS, x, jax.random.key(1))) != np.asarray(whole)) > 0.3
    assert np.mean(np.asarray(whole[1:]) != np.asarray(whole[:-1])) > 0.3


def test_kept_values_are_scaled_so_that_the_mean_stays():
    whole = np.asarray(draw(NUMBERS, jnp.ones((2000, 3, 4))))
    np.testing.assert_allclose(np.unique(whole), [0, 1 / 0.49], rtol=1e-6)
    # The kept share 0.49 of 24,000 draws, to five standard deviations.
    assert abs((whole > 0).mean() - 0.49) < 5 * np.sqrt(0.49 * 0.51 / whole.size)


def test_stochastic_depth_drops_whole_examples_by_number():
    x = jnp.ones((2000, 3, 4))

    @jax.jit
    def depth(numbers, x):
        with dropout.by_example(numbers):
            return Net(broadcast=True).apply({}, x, train=True, rngs={"dropout": KEY})

    whole = np.asarray(depth(NUMBERS, x))
    assert np.all(whole == whole[:, :1, :1])
    assert (whole[:, 0, 0] == 0).mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / 2000))
    np.testing.assert_array_equal(depth(NUMBERS[3::4], x[3::4]), whole[3::4])


def test_evaluation_and_inputs_without_a_row_an_example_are_left_to_flax():
    x = jnp.ones((5, 4))
    with dropout.by_example(NUMBERS[:3]):
        np.testing.assert_array_equal(Net().apply({}, x, train=False), x)
        dropped = Net().apply({}, x, train=True, rngs={"dropout": KEY})
    assert dropped.shape == x.shape
    assert set(np.unique(dropped)) <= {0.0, np.float32(1 / 0.7 / 0.7), np.float32(1 / 0.7) ** 2}
