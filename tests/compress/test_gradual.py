"""Masks while training: the schedule, zeros that stay, weights that come back, resumption."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import checkpoint
from cnnjax.compress import gradual, masks, named, sensitivity
from cnnjax.compress.gradual import Pruning
from cnnjax.errors import UserError
from cnnjax.tasks.classification import classification
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step
from tests.tiny import BatchNormNet, random_arrays


def trained(pruning, *, steps, state=None, ema=0.9, total=12):
    """Returns the states after each step of a small network."""
    model = BatchNormNet()
    optimizer = gradual.prune_while_training(optax.adam(1e-2), pruning, total)
    if state is None:
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
        state = create_state(variables, optimizer, jax.random.key(1), ema=True)
    step = gradual.masked_step(
        make_step(model, optimizer, classification(10), schedule=lambda s: 1e-2, ema_decay=ema)
    )
    step, data, states = jax.jit(step), random_arrays(8), []
    batch = {"image": data.image, "label": data.label, "mask": np.ones(8, bool)}
    for _ in range(steps):
        state, metrics = step(state, batch)
        states.append((state, metrics))
    return states


def sparsity(tree):
    found = masks.sparsity_by_layer(tree)
    kept, whole = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    return 1 - kept / whole


def test_the_cubic_schedule_by_hand():
    values = [float(gradual.cubic(jnp.int32(s), 0.1, 0.9, 10, 20)) for s in (0, 10, 15, 20, 99)]
    np.testing.assert_allclose(values, [0.1, 0.1, 0.9 - 0.8 / 8, 0.9, 0.9], rtol=1e-6)


def test_the_highest_scores_stay():
    values = {"a": jnp.array([1.0, 5.0, 3.0]), "b": jnp.array([2.0, 4.0, 6.0, 0.5])}
    kept = masks.keep_highest(values, 3 / 7)
    assert kept["a"].tolist() == [False, True, True]
    assert kept["b"].tolist() == [False, True, True, False]
    by_layer = masks.keep_highest(values, 0.5, scope="layer")
    assert by_layer["a"].tolist() == [False, True, True]
    assert by_layer["b"].tolist() == [False, True, True, False]
    assert all(mask.all() for mask in masks.keep_highest(values, 0.0).values())
    assert [int(m.sum()) for m in masks.keep_highest({"a": jnp.arange(10.0)}, 0.9).values()] == [1]


def test_masked_weights_are_zero_and_stay_so_while_the_sparsity_rises():
    pruning = Pruning("magnitude", 0.8, end=0.5, every_steps=2)
    states = trained(pruning, steps=8)
    found = [sparsity(state.params) for state, _ in states]
    assert found == sorted(found) and found[0] < 0.1
    np.testing.assert_allclose(found[-1], 0.8, atol=0.01)
    gone = None
    for state, metrics in states:
        now = {p: np.asarray(m) for p, m in state.opt_state.masks.items()}
        for path, mask in now.items():
            layer = path.split("/")[0]
            for tree in (state.params, state.ema):
                assert not np.asarray(tree[layer]["kernel"])[~mask].any()
            if gone is not None:
                assert not (mask & ~gone[path]).any()
        gone = now
        total, _ = metrics["sparsity"]
        np.testing.assert_allclose(total, sparsity(state.params), atol=1e-3)


def test_movement_brings_weights_back_at_their_values():
    pruning = Pruning("movement", 0.5, end=1.0, every_steps=1)
    states = trained(pruning, steps=8)
    np.testing.assert_allclose(sparsity(states[-1][0].params), 0.5 * (1 - (1 / 3) ** 3), atol=0.02)
    came_back = 0
    for (before, _), (after, _) in itertools.pairwise(states):
        for path, mask in after.opt_state.masks.items():
            layer = path.split("/")[0]
            back = np.asarray(mask & ~before.opt_state.masks[path])
            came_back += back.sum()
            waited = np.asarray(before.opt_state.dense[path])[back]
            np.testing.assert_array_equal(np.asarray(after.params[layer]["kernel"])[back], waited)
    assert came_back > 0


def test_movement_scores_by_hand():
    pruning = Pruning("movement", 0.5, end=1.0, every_steps=10)
    optimizer = gradual.prune_while_training(optax.sgd(0.5), pruning, 10)
    params = {"kernel": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    updates, state = optimizer.update({"kernel": jnp.array([0.1, 0.1])}, state, params)
    # Gradient times weight, negated: the first is moved to zero, the second away from it.
    np.testing.assert_allclose(state.scores["kernel"], [-0.1, 0.2])
    np.testing.assert_allclose(updates["kernel"], [-0.05, -0.05])


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
def test_a_resumed_run_has_the_same_bits(criterion, tmp_path):
    pruning = Pruning(criterion, 0.8, end=0.6, every_steps=2)
    whole = trained(pruning, steps=8)[-1][0]
    half = trained(pruning, steps=3)[-1][0]
    checkpoint.save(tmp_path, half, {})
    restored, _ = checkpoint.restore(tmp_path, half)
    resumed = trained(pruning, steps=5, state=restored)[-1][0]
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def test_given_masks_never_change():
    params = {"kernel": jnp.array([1.0, 2.0, 3.0])}
    kept = {"kernel": jnp.array([True, False, True])}
    optimizer = gradual.prune_while_training(
        optax.sgd(1.0), Pruning("magnitude", 0.9, every_steps=1), 5, masks=kept
    )
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update({"kernel": jnp.ones(3)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [-4.0, 0.0, -2.0])


def test_rates_of_a_scan_reach_the_sparsity_that_is_asked():
    scan = {"a": (0.99, 0.99, 0.98, 0.90, 0.8, 0.5, 0.3), "b": (0.99, 0.9, 0.7, 0.5, 0.4, 0.2, 0.1)}
    sizes = {"a": 1000, "b": 1000}
    rates = sensitivity.rates(scan, sizes, 0.4)
    assert rates["a"] > rates["b"]
    np.testing.assert_allclose((rates["a"] + rates["b"]) / 2, 0.4, atol=1e-3)
    # Beyond what was tried both rise, and keep something.
    high = sensitivity.rates(scan, sizes, 0.98)
    np.testing.assert_allclose((high["a"] + high["b"]) / 2, 0.98, atol=1e-6)
    assert max(high.values()) < 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("magnitude(sparsity=1.0)", "give 0 or more, and less than 1"),
        ("magnitude(sparsity=-0.1)", "give 0 or more, and less than 1"),
        ("magnitude", "missing a required argument: 'sparsity'"),
        ("magnitud(sparsity=0.5)", "did you mean magnitude"),
        ("magnitude(sparsity=0.5, scope=all)", "global or layer or sensitivity"),
        ("channels(macs=1.5)", "above 0 and below 1"),
        ("channels(macs=0.5, norm=l3)", "l2 or l1"),
        ("blocks(count=1, macs=0.5)", "give one of a count"),
        ("magnitude(sparsity=0.5), channels(macs=0.5)", "single weights go last"),
        ("movement(sparsity=0.5, start=0.9, end=0.2)", "0 <= start <= end <= 1"),
    ],
)
def test_prunings_are_refused_in_words(text, words):
    with pytest.raises(UserError, match=words):
        named.read(text)


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(UserError, match="did you mean conv1/kernel"):
        masks.prunable({"conv1": {"kernel": jnp.ones(3)}}, "conv1/kernl")


def test_rounds_remove_the_same_fraction_each():
    (step,) = named.read("magnitude(sparsity=0.75)")
    found = [named.of_round(step, number, 2).pruning.sparsity for number in (1, 2)]
    np.testing.assert_allclose(found, [0.5, 0.75])
    assert dataclasses.replace(step) == named.of_round(step, 1, 1)
