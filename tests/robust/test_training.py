"""Adversarial training: objectives by hand, gradients of the parameters alone, ways to run it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import losses, robust
from cnnjax.data.batches import evaluation_batches
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated
from cnnjax.errors import UserError
from cnnjax.models.simple import MLP
from cnnjax.tasks.classification import classification
from cnnjax.train import evaluate
from cnnjax.train import step as steps
from cnnjax.train.compile import compile_train
from cnnjax.train.evaluate import compile_eval
from cnnjax.train.state import create_state
from tests.tiny import BatchNormNet, batch_of, random_arrays

SHAPE = (6, 6, 1)
ARRAYS = random_arrays(16, SHAPE, num_classes=3)
BALL = {"normalize": lambda image: 2 * image - 1, "epsilon": 0.1, "step_size": 0.05}


def setup(method, model=None, batch_norm=False, **options):
    """Returns (state, make_step) of a small network under a method of adversarial training."""
    model = model or MLP(num_classes=3, dense_widths=(8,))
    optimizer = optax.sgd(0.5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)
    state = create_state(variables, optimizer, jax.random.key(1))
    shared = {"schedule": optax.constant_schedule(0.5)}

    def make_step(axis_name=None):
        if method == "free":
            return robust.make_free_step(
                model,
                optimizer,
                classification(3),
                axis_name=axis_name,
                **(BALL | {"replays": 3} | options),
                **shared,
            )
        task = robust.adversarial(classification(3), method, num_steps=4, **(BALL | options))
        return steps.make_step(
            model,
            optimizer,
            task,
            axis_name=axis_name,
            **shared,
        )

    return state, make_step


def logits_of(state, image):
    model = MLP(num_classes=3, dense_widths=(8,))
    return model.apply({"params": state.params}, 2 * image - 1)


@pytest.mark.slow
def test_fgsm_rs_by_hand():
    """The update is that of the loss at clip(x + clip(u + a sign g(x + u)))."""
    state, make_step = setup("fgsm_rs")
    batch = batch_of(ARRAYS, 0, 8)
    new_state, metrics = jax.jit(make_step())(state, batch)

    image, label = batch["image"] / 255.0, batch["label"]
    key = steps.stream_key(state.key, "objective", 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    start = jax.vmap(lambda key: jax.random.uniform(key, SHAPE, minval=-0.1, maxval=0.1))(keys)

    def mean_loss(params, image):
        logits = logits_of(dataclasses.replace(state, params=params), image)
        return losses.softmax_cross_entropy(logits, label).mean()

    gradient = jax.grad(mean_loss, argnums=1)(state.params, image + start)
    change = jnp.clip(start + 0.05 * jnp.sign(gradient), -0.1, 0.1)
    attacked = jnp.clip(image + change, 0, 1)
    by_params = jax.grad(mean_loss)(state.params, attacked)
    wanted = jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, state.params, by_params)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=2e-6), new_state.params, wanted
    )
    total, count = metrics["loss"]
    assert float(total / count) == pytest.approx(float(mean_loss(state.params, attacked)), 1e-5)


@pytest.mark.parametrize("method", ["fgsm_rs", "pgd", "trades", "free"])
def test_a_radius_may_be_a_schedule_of_the_update(method):
    """At update n it is the training under the number of that update; free's n are replays."""
    replays = 3 if method == "free" else 1
    grows = {
        "epsilon": lambda update: 0.1 * (update // replays),
        "step_size": lambda update: 0.05 * (update // replays),
    }
    batch = batch_of(ARRAYS, 0, 8)
    state, make_step = setup(method, **grows)
    step = jax.jit(make_step())
    state, first = step(state, batch)
    state, _ = step(state, batch)
    by_schedule, last = step(state, batch)
    ball = {"epsilon": 0.2, "step_size": 0.1}
    by_number, wanted = jax.jit(setup(method, **ball)[1]())(state, batch)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6),
        (by_schedule.params, last),
        (by_number.params, wanted),
    )
    # Of radius 0 at first: the plain loss, with which training under an attack does not begin.
    plain_state, make_plain = setup("none")
    _, plain = jax.jit(make_plain())(plain_state, batch)
    _, attacked = jax.jit(setup(method, **ball)[1]())(plain_state, batch)
    if method != "free":
        assert float(first["loss"][0]) == pytest.approx(float(plain["loss"][0]), 1e-5)
    assert float(attacked["loss"][0]) > float(first["loss"][0])


def test_trades_without_its_second_term_is_plain_training_and_with_it_penalises_change():
    batch = batch_of(ARRAYS, 0, 8)
    plain_state, make_plain = setup("none")
    plain, _ = jax.jit(make_plain())(plain_state, batch)
    state, make_step = setup("trades", beta=0.0)
    without, metrics = jax.jit(make_step())(state, batch)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=1e-6),
        without.params,
        plain.params,
    )
    _, with_term = jax.jit(setup("trades", beta=6.0)[1]())(state, batch)
    assert float(with_term["loss"][0]) > float(metrics["loss"][0])
    # Accuracy is that of the images as they are.
    assert with_term["accuracy"] == metrics["accuracy"]


def test_free_makes_as_many_updates_as_replays_from_one_batch():
    """By hand: each replay's update at the image as the replays before have left it."""
    state, make_step = setup("free")
    batch = batch_of(ARRAYS, 0, 8)
    new_state, metrics = jax.jit(make_step())(state, batch)
    image, label = batch["image"] / 255.0, batch["label"]
    key = steps.stream_key(state.key, "objective", 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
    x = image + robust.attacks.uniform_change(keys, image, 0.1, "linf")
    params = state.params

    def mean_loss(params, image):
        logits = logits_of(dataclasses.replace(state, params=params), image)
        return losses.softmax_cross_entropy(logits, label).mean()

    seen = []
    for _ in range(3):
        loss, slopes = jax.value_and_grad(mean_loss, argnums=(0, 1))(params, x)
        seen.append(float(loss))
        params = jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, params, slopes[0])
        x = jnp.clip(jnp.clip(x + 0.05 * jnp.sign(slopes[1]), image - 0.1, image + 0.1), 0, 1)
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, atol=5e-6), new_state.params, params
    )
    assert int(new_state.step) == 1
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(np.mean(seen), 1e-5)
    assert int(metrics["learning_rate"][1]) == 3


@pytest.mark.parametrize("method", ["fgsm_rs", "trades", "free"])
def test_padding_changes_nothing(method):
    state, make_step = setup(method)
    step = jax.jit(make_step())
    padded = batch_of(ARRAYS, 0, 8) | {"mask": jnp.arange(8) < 5}
    other = padded | {
        "image": padded["image"].at[5:].set(7),
        "label": padded["label"].at[5:].set(0),
    }
    first, metrics = step(state, padded)
    second, _ = step(state, other)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert int(metrics["loss"][1]) == (15 if method == "free" else 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "way"),
    [("pgd", "scan"), ("free", "scan"), ("fgsm_rs", "jit"), ("trades", "pmap")],
)
def test_eight_devices_make_the_step_of_one(method, way):
    results = []
    for devices, how in ((1, "jit"), (8, way)):
        state, make_step = setup(method, BatchNormNet(num_classes=3))
        mesh = make_mesh(devices)
        data = ResidentPipeline(
            ARRAYS,
            16,
            seed=0,
            sharding=batch_sharding(mesh),
            replicated=replicated(mesh),
        )
        train = compile_train(make_step, state, data, method=how, mesh=mesh)
        state, metrics = next(iter(train(state, 0, [2])))
        results.append((jax.device_get(state.params), jax.device_get(state.batch_stats), metrics))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=2e-4), *results)


def test_robust_accuracy_is_the_same_on_any_number_of_devices():
    model = MLP(num_classes=3, dense_widths=(8,))
    variables = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    results = []
    for devices in (1, 8):
        mesh = make_mesh(devices)

        def make_step(axis_name):
            return robust.make_robust_eval_step(
                model,
                classification(3),
                robust.parse_attack("pgd:0.02:3:2"),
                normalize=BALL["normalize"],
                axis_name=axis_name,
            )

        batches = evaluation_batches(ARRAYS, 16, sharding=batch_sharding(mesh))
        results.append(evaluate.evaluate(compile_eval(make_step, mesh), variables, batches))
    assert results[0]["robust_accuracy"] <= results[0]["accuracy"]
    for name in ("accuracy", "robust_accuracy"):
        assert results[0][name] == results[1][name]


@pytest.mark.slow
def test_training_against_pgd_makes_a_network_robust_and_plain_training_does_not():
    """One strong feature, and many weak ones, all right but smaller than epsilon."""
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 512).astype(np.int32)
    sign = 2.0 * label - 1
    image = np.full((512, 1, 65, 1), 0.5, np.float32)
    image[:, 0, 0, 0] += 0.4 * sign * (generator.uniform(size=512) < 0.95)
    image[:, 0, 1:, 0] += 0.05 * sign[:, None]
    batch = {"image": jnp.asarray(image), "label": jnp.asarray(label), "mask": jnp.ones(512, bool)}
    model = MLP(num_classes=2, dense_widths=())
    robustness = {}
    for method in ("none", "fgsm_rs", "pgd", "trades", "free"):
        state, make_step = setup(method, model, **({"epsilon": 0.1, "step_size": 0.1}))
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1, 65, 1)))
        state = create_state(variables, optax.sgd(0.5), jax.random.key(1))
        step = jax.jit(make_step())
        for _ in range(200):
            state, _ = step(state, batch)
        accuracies = robust.robust_accuracies(
            lambda variables, x: model.apply(variables, 2 * x - 1),
            state.variables(),
            lambda: [batch],
            [robust.parse_attack("pgd:0.1:10")],
        )
        robustness[method] = accuracies["pgd:0.1:10:1"]
    assert robustness["none"] < 0.1
    assert min(value for method, value in robustness.items() if method != "none") > 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "fgsm"}, "unknown method of adversarial training 'fgsm': did you mean fgsm_rs"),
        ({"method": "pgd", "epsilon": 0}, "epsilon 0 must be positive"),
        ({"method": "trades", "beta": -1}, "beta -1 must be 0 or more"),
        ({"method": "free", "replays": 0}, "replays 0 must be a whole number"),
    ],
)
def test_bad_settings_are_one_clear_error(arguments, words):
    with pytest.raises(UserError, match=words):
        setup(**arguments)[1]()
