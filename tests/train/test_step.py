"""What one step computes, against autodiff and NumPy by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import losses, models
from cnnjax.tasks.classification import classification
from cnnjax.train.predict import make_eval_step, make_predict
from tests.tiny import BatchNormNet, batch_of, random_arrays, setup

ARRAYS = random_arrays(64)


def assert_trees_close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


def test_one_sgd_step_is_the_formula():
    model = models.create("lenet5", num_classes=10)
    state, make_step = setup(model, learning_rate=0.1)
    batch = batch_of(ARRAYS, 0, 16)

    def objective(params):
        logits = model.apply({"params": params}, batch["image"] / 255.0, train=True)
        return losses.softmax_cross_entropy(logits, batch["label"]).mean()

    loss, gradient = jax.jit(jax.value_and_grad(objective))(state.params)
    new_state, metrics = jax.jit(make_step())(state, batch)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    assert_trees_close(new_state.params, expected, rtol=1e-5, atol=1e-7)
    assert int(new_state.step) == 1
    assert metrics["loss"][0] / metrics["loss"][1] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["gradient_norm"][0] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert metrics["update_norm"][0] == pytest.approx(
        0.1 * float(optax.tree.norm(gradient)), rel=1e-5
    )
    assert metrics["learning_rate"] == (pytest.approx(0.1), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "masked"), [(1, False), (4, True)])
def test_sharpness_aware_minimization_is_the_formula(accumulate, masked):
    """Foret et al. 2021, algorithm 1: the gradient at `w + rho g / |g|` updates `w`."""
    model = models.create("lenet5", num_classes=10)
    options = {"sam_radius": 0.5, "accumulate": accumulate, "optimizer": optax.sgd(0.1)}
    state, make_step = setup(model, learning_rate=0.1, **options)
    batch = batch_of(ARRAYS, 0, 16)
    if masked:
        batch |= {"mask": jnp.arange(16) < 11}

    def objective(params):
        logits = model.apply({"params": params}, batch["image"] / 255.0, train=True)
        value = losses.softmax_cross_entropy(logits, batch["label"])
        return jnp.sum(value * batch["mask"]) / jnp.sum(batch["mask"])

    gradient = jax.jit(jax.grad(objective))
    first = gradient(state.params)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(first)))
    uphill = jax.tree.map(lambda p, g: p + 0.5 * g / norm, state.params, first)
    second = gradient(uphill)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, second)
    new_state, metrics = jax.jit(make_step())(state, batch)
    assert_trees_close(new_state.params, expected, rtol=1e-4, atol=1e-6)
    # The loss is that of the parameters themselves, the norm that of the gradient used.
    loss = metrics["loss"][0] / metrics["loss"][1]
    assert loss == pytest.approx(float(objective(state.params)), rel=1e-5)
    assert metrics["gradient_norm"][0] == pytest.approx(float(optax.tree.norm(second)), rel=1e-4)


def test_masked_examples_count_for_nothing():
    state, make_step = setup(models.create("lenet5", num_classes=10))
    batch = batch_of(ARRAYS, 0, 16)
    padded = batch_of(ARRAYS, 0, 24) | {"mask": jnp.arange(24) < 16}
    step = jax.jit(make_step())
    (state_a, metrics_a), (state_b, metrics_b) = step(state, batch), step(state, padded)
    assert_trees_close(state_a.params, state_b.params, rtol=1e-5, atol=1e-6)
    assert metrics_b["loss"][1] == metrics_a["loss"][1] == 16
    assert metrics_b["accuracy"] == metrics_a["accuracy"]


def test_penalty_is_added_once():
    def penalty(params):
        return 0.5 * losses.l2_penalty(params)

    model = models.create("lenet5", num_classes=10)
    state, plain = setup(model, learning_rate=0.1)
    _, penalized = setup(model, learning_rate=0.1, penalty=penalty)
    batch = batch_of(ARRAYS, 0, 16)
    with_penalty, _ = jax.jit(penalized())(state, batch)
    without, _ = jax.jit(plain())(state, batch)
    difference = jax.tree.map(lambda a, b: a - b, with_penalty.params, without.params)
    kernel = state.params["dense1"]["kernel"]
    np.testing.assert_allclose(difference["dense1"]["kernel"], -0.1 * kernel, atol=1e-6)
    np.testing.assert_allclose(difference["dense1"]["bias"], 0, atol=1e-6)


def test_moving_average_follows_its_formula():
    state, make_step = setup(models.create("lenet5", num_classes=10), ema_decay=0.9)
    step = jax.jit(make_step())
    average = state.params["head"]["kernel"]
    for index in range(3):
        state, _ = step(state, batch_of(ARRAYS, 16 * index, 16))
        decay = min(0.9, (1 + index) / (10 + index))
        average = decay * average + (1 - decay) * state.params["head"]["kernel"]
    np.testing.assert_allclose(state.ema["head"]["kernel"], average, rtol=1e-5, atol=1e-7)


def test_batch_statistics_are_the_batchs_moments():
    state, make_step = setup(BatchNormNet())
    batch = batch_of(ARRAYS, 0, 16)
    new_state, _ = jax.jit(make_step())(state, batch)
    _, extra = BatchNormNet().apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        batch["image"] / 255.0,
        train=False,
        capture_intermediates=lambda module, _: module.name == "conv1",
        mutable=["intermediates"],
    )
    out = np.asarray(extra["intermediates"]["conv1"]["__call__"][0])
    statistics = new_state.batch_stats["conv1_norm"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * out.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        statistics["var"], 0.9 + 0.1 * out.var((0, 1, 2)), rtol=1e-4, atol=1e-6
    )


def test_dropout_and_augmentation_replay_from_key_and_step():
    model = models.create("cnn_32_64_dense128_dropout", num_classes=10)
    draws = []

    def augment(key, batch, first_index):
        draws.append(key)
        return {**batch, "image": batch["image"] + jax.random.normal(key, batch["image"].shape)}

    state, make_step = setup(model, augment=augment)
    step, batch = jax.jit(make_step()), batch_of(ARRAYS, 0, 16)
    again = [step(state, batch)[1]["loss"][0] for _ in range(2)]
    later = step(state.replace(step=state.step + 1), batch)[1]["loss"][0]
    assert again[0] == again[1] != later


def test_eval_step_counts_by_hand():
    class ConstantModel:
        def apply(self, variables, image, *, train):
            assert not train
            return jnp.tile(jnp.array([[0.0, 2.0, 1.0]]), (image.shape[0], 1))

    eval_step = make_eval_step(ConstantModel(), classification(3))
    batch = {
        "image": jnp.zeros((4, 2, 2, 1), jnp.uint8),
        "label": jnp.array([0, 1, 1, 1]),
        "mask": jnp.array([True, True, True, False]),
    }
    metrics = eval_step({}, batch)
    log_sum = np.log(1 + np.e**2 + np.e)
    assert metrics["loss"][0] == pytest.approx(3 * log_sum - 0 - 2 - 2, rel=1e-6)
    assert (int(metrics["accuracy"][0]), int(metrics["accuracy"][1])) == (2, 3)
    np.testing.assert_array_equal(metrics["confusion"], [[0, 1, 0], [0, 2, 0], [0, 0, 0]])


def test_one_logit_predicts_two_probabilities():
    class OneLogit:
        def apply(self, variables, image, *, train):
            return jnp.full((image.shape[0], 1), jnp.log(3.0))

    predict = make_predict(OneLogit(), classification(10))
    probabilities = predict({}, {"image": jnp.zeros((2, 4, 4, 1))})
    np.testing.assert_allclose(probabilities, [[0.25, 0.75]] * 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["lenet5", "batch_norm"])
def test_a_step_never_retraces_and_keeps_its_types(name):
    model = BatchNormNet() if name == "batch_norm" else models.create(name, num_classes=10)
    state, make_step = setup(model, ema_decay=0.99, optimizer=optax.adamw(1e-3))
    traces = []
    inner = make_step()

    def counted(state, batch):
        traces.append(None)
        return inner(state, batch)

    step = jax.jit(counted, donate_argnums=0)
    types = jax.tree.map(jax.typeof, state)
    for index in range(3):
        state, _ = step(state, batch_of(ARRAYS, 16 * index, 16))
    assert len(traces) == 1
    assert jax.tree.map(jax.typeof, state) == types


def test_steps_compose_with_eval_shape_vmap_and_grad():
    state, make_step = setup(models.create("lenet5", num_classes=10))
    step, batch = make_step(), batch_of(ARRAYS, 0, 8)
    shapes, _ = jax.eval_shape(step, state, batch)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state)

    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch)
    states, _ = jax.jit(jax.vmap(step, in_axes=(None, 0)))(state, members)
    alone, _ = jax.jit(step)(state, batch)
    first = jax.tree.map(lambda leaf: leaf[0], states.params)
    assert_trees_close(first, alone.params, rtol=1e-4, atol=1e-6)

    def loss_after_a_step(params):
        return step(state.replace(params=params), batch)[1]["loss"][0]

    gradient = jax.jit(jax.grad(loss_after_a_step))(state.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
