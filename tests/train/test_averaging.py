"""Averages of parameters, and BatchNorm's statistics for them, against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.errors import UserError
from cnnjax.models.norms import norm_layer
from cnnjax.train import averaging, batch_stats
from cnnjax.train.predict import as_float
from tests.tiny import BatchNormNet, batch_of, random_arrays, setup

ARRAYS = random_arrays(96)


def followed(share, values):
    average = jnp.asarray(values[0])
    history = []
    for num_updates, value in enumerate(values[1:]):
        average = averaging.mix_in(average, jnp.asarray(value), share(jnp.int32(num_updates)))
        history.append(float(average))
    return history


def test_stochastic_weight_averaging_is_the_mean_of_every_nth():
    values = [0.0, 3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    history = followed(averaging.stochastic(3, 2), values)
    # After updates 3, 5 and 7 the parameters are values[3], values[5], values[7].
    assert history[:3] == [3.0, 1.0, 4.0]
    np.testing.assert_allclose(history[3:], [4.0, 4.5, 4.5, 11 / 3, 11 / 3], rtol=1e-6)


def test_exponential_average_by_hand():
    history = followed(averaging.exponential(0.5), [8.0, 0.0, 4.0, 4.0])
    # The decays are min(0.5, (1 + n) / (10 + n)): 0.1, 2 / 11, 0.25.
    first = 0.1 * 8.0
    second = 2 / 11 * first + 9 / 11 * 4.0
    np.testing.assert_allclose(history, [first, second, 0.25 * second + 0.75 * 4.0], rtol=1e-6)


def test_a_step_keeps_the_stochastic_average():
    share = averaging.stochastic(2, 2)
    state, make_step = setup(
        BatchNormNet(), ema_decay=0.0, averaging=share, optimizer=optax.sgd(0.1)
    )
    step, taken = jax.jit(make_step()), []
    for index in range(5):
        state, _ = step(state, batch_of(ARRAYS, 16 * index, 16))
        if index + 1 in (2, 4):
            taken.append(jax.device_get(state.params))
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *taken)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, expected
    )


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_wrong_intervals(arguments):
    with pytest.raises(UserError, match="give 1 or more"):
        averaging.stochastic(*arguments)


def batches(size=32):
    return [batch_of(ARRAYS, start, size) for start in range(0, 96, size)]


def first_convolution(variables, image):
    _, extra = BatchNormNet().apply(
        variables,
        as_float(image),
        train=False,
        capture_intermediates=lambda module, _: module.name == "conv1",
        mutable=["intermediates"],
    )
    return np.asarray(extra["intermediates"]["conv1"]["__call__"][0], np.float64)


def test_recalibrated_statistics_are_those_of_all_images():
    state, _ = setup(BatchNormNet())
    variables = state.variables()
    statistics = jax.jit(batch_stats.make_statistics(BatchNormNet(), normalize=as_float))
    found = batch_stats.recalibrate(statistics, variables, batches())
    # The first layer's are those of all examples at once, however they are cut into batches.
    out = first_convolution(variables, jnp.asarray(ARRAYS.image))
    np.testing.assert_allclose(found["conv1_norm"]["mean"], out.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found["conv1_norm"]["var"], out.var((0, 1, 2)), rtol=1e-4)
    # Of one batch, those by which training normalizes it: evaluation then equals training.
    one = batch_stats.recalibrate(statistics, variables, batches()[:1])
    image = as_float(batches()[0]["image"])
    trained, _ = BatchNormNet().apply(variables, image, train=True, mutable=["batch_stats"])
    evaluated = BatchNormNet().apply({**variables, "batch_stats": one}, image, train=False)
    np.testing.assert_allclose(evaluated, trained, atol=1e-4)
    types = jax.tree.map(jax.typeof, variables["batch_stats"])
    assert jax.tree.map(jax.typeof, found) == types


def test_recalibration_of_frozen_and_grouped_norms():
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            x = norm_layer("batch", train=False)(name="frozen_norm")(image)
            return BatchNormNet(norm_group_size=8, name="net")(x, train=train)

    state, _ = setup(Wrapped())
    variables = state.variables()
    statistics = jax.jit(batch_stats.make_statistics(Wrapped(), normalize=as_float))
    found = batch_stats.recalibrate(statistics, variables, batches())
    jax.tree.map(
        np.testing.assert_array_equal,
        found["frozen_norm"],
        jax.device_get(variables["batch_stats"]["frozen_norm"]),
    )
    assert (np.asarray(found["net"]["conv1_norm"]["mean"]) != 0).all()
