"""Learning rates and beginnings by group, and the pull to the pretrained values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import finetune, optim, trees
from cnnjax.errors import UserError
from cnnjax.tasks.classification import classification
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step
from tests.finetune.small import SHAPE, initialized, small, tuned
from tests.models.quick import quick_jit
from tests.tiny import batch_of, random_arrays

GROUPS = finetune.layer_groups(small(), SHAPE)


def updates_of(optimizer, params, num_updates=1):
    """The updates for a gradient of ones, one after another."""
    gradient = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    history = []
    for _ in range(num_updates):
        updates, state = optimizer.update(gradient, state, params)
        history.append({path: float(leaf.flat[0]) for path, leaf in named(updates).items()})
    return history


def named(tree):
    return {path: np.asarray(leaf) for path, leaf in trees.named_leaves(tree).items()}


@pytest.mark.parametrize("text", ["full", "lora:2", "adapter:2"])
def test_rates_fall_by_the_distance_from_the_head(text):
    """Factors and adapters learn at the rate of their stage."""
    params = initialized(tuned(text))["params"]
    optimizer = finetune.layer_wise_decay(optax.sgd(1.0), GROUPS, 0.5)
    (updates,) = updates_of(optimizer, params)
    expected = {"1": -0.25, "2": -0.5}
    for path, update in updates.items():
        digits = [part[-1] for part in path.split("/") if part[-1] in expected]
        assert update == (expected[digits[0]] if digits else -1.0), path


def test_decoupled_weight_decay_falls_with_the_rate():
    params = {"conv1": {"kernel": jnp.full((1, 1), 3.0)}, "head": {"kernel": jnp.full((1, 1), 3.0)}}
    optimizer = optim.make_optimizer("sgd", 1.0, weight_decay=0.1)
    (updates,) = updates_of(finetune.layer_wise_decay(optimizer, GROUPS, 0.5), params)
    np.testing.assert_allclose(updates["head/kernel"], -1.3, rtol=1e-6)
    np.testing.assert_allclose(updates["conv1/kernel"], -1.3 / 4, rtol=1e-6)


def test_groups_begin_one_after_another_from_the_top():
    params = initialized(small())["params"]
    optimizer = finetune.gradual_unfreezing(optax.sgd(1.0), GROUPS, 2)
    history = updates_of(optimizer, params, 6)
    for path, begins in (("head/bias", 0), ("conv2/kernel", 2), ("norm1/bias", 4)):
        assert [updates[path] for updates in history] == [0.0] * begins + [-1.0] * (6 - begins)


def test_only_groups_that_are_trained_count():
    """Of the head and the first stage, the stage begins when the first turn is over."""
    params = initialized(tuned("head", also_train=["conv1/.*"]))["params"]
    history = updates_of(finetune.gradual_unfreezing(optax.sgd(1.0), GROUPS, 2), params, 4)
    assert [updates["conv1/kernel"] for updates in history] == [0.0, 0.0, -1.0, -1.0]


def test_what_waits_keeps_its_bits_and_warms_up_its_averages():
    params = {"conv1": {"kernel": jnp.array([[-0.0]])}, "head": {"kernel": jnp.ones((1, 1))}}
    optimizer = optim.make_optimizer("adamw", 0.1, weight_decay=0.5)
    waiting = finetune.gradual_unfreezing(optimizer, GROUPS, 3)
    state, plain_state = waiting.init(params), optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    for _ in range(3):
        updates, state = waiting.update(gradient, state, params)
        _, plain_state = optimizer.update(gradient, plain_state, params)
        moved = optax.apply_updates(params, updates)
        assert np.signbit(moved["conv1"]["kernel"]).all()
        assert not np.array_equal(moved["head"]["kernel"], params["head"]["kernel"])
    updates, _ = waiting.update(gradient, state, params)
    plain, _ = optimizer.update(gradient, plain_state, params)
    jax.tree.map(np.testing.assert_array_equal, updates, plain)


def test_the_pull_by_hand():
    start = {"conv1": {"kernel": jnp.array([1.0, 2.0])}}
    params = {"conv1": {"kernel": jnp.array([1.5, 1.0])}, "head": {"bias": jnp.array([3.0])}}
    pull = finetune.l2_sp(0.2, 0.1)
    expected = 0.1 * (0.25 + 1.0) + 0.05 * 9.0
    np.testing.assert_allclose(pull(params, {"pretrained": start}), expected, rtol=1e-6)
    gradient = jax.grad(pull)(params, {"pretrained": start})
    np.testing.assert_allclose(gradient["conv1"]["kernel"], [0.2 * 0.5, -0.2], rtol=1e-6)
    np.testing.assert_allclose(gradient["head"]["bias"], [0.1 * 3.0], rtol=1e-6)


@pytest.mark.slow
def test_a_strong_pull_holds_what_comes_from_the_base():
    """And it leaves the loss that is reported as it is."""
    model = tuned("full")
    variables = initialized(model)
    kept = [path for path in named(variables["params"]) if not path.startswith("head/")]
    variables = finetune.remember_start(variables, kept)
    moved = {}
    for strength in (0.0, 10.0):
        step = quick_jit(
            make_step(
                model,
                optax.sgd(0.05),
                classification(10),
                schedule=lambda step: 0.05,
                pull=finetune.l2_sp(strength, 0.0),
            )
        )
        state = create_state(variables, optax.sgd(0.05), jax.random.key(1))
        batch = batch_of(random_arrays(16), 0, 16)
        state, first = step(state, batch)
        for _ in range(9):
            state, _ = step(state, batch)
        start, end = named(variables["params"]), named(state.params)
        distance = {path: float(np.linalg.norm(end[path] - start[path])) for path in start}
        moved[strength] = distance, first["loss"]
    assert moved[10.0][0]["conv2/kernel"] < 0.5 * moved[0.0][0]["conv2/kernel"]
    assert moved[10.0][0]["head/kernel"] > 0.5 * moved[0.0][0]["head/kernel"]
    np.testing.assert_array_equal(moved[0.0][1], moved[10.0][1])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: finetune.layer_wise_decay(optax.sgd(1), GROUPS, 0.0), "layer-wise decay is 0.0"),
        (lambda: finetune.layer_wise_decay(optax.sgd(1), GROUPS, 1.5), "layer-wise decay is 1.5"),
        (lambda: finetune.gradual_unfreezing(optax.sgd(1), GROUPS, 0), "every 0 steps"),
        (lambda: finetune.l2_sp(-1.0, 0.0), "L2-SP's strength is -1.0"),
        (lambda: finetune.l2_sp(1.0, np.nan), "L2-SP's new_strength is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(function, message):
    with pytest.raises(UserError, match=message):
        function()


def test_a_pull_on_nothing_is_refused():
    variables = initialized(tuned("head"))
    with pytest.raises(UserError, match="none that is trained comes from the base"):
        finetune.remember_start(variables, ["conv1/kernel"])
