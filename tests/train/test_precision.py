"""What is computed in 16 bits and what is not, and the dynamic loss scale of float16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import checkpoint, losses, models
from cnnjax.data import mnist
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated
from cnnjax.errors import UserError
from cnnjax.tasks.classification import classification
from cnnjax.train import loop, precision
from cnnjax.train import step as steps
from cnnjax.train.compile import compile_train
from cnnjax.train.precision import LossScale
from cnnjax.train.state import create_state
from tests.tiny import batch_of, random_arrays, setup

ARRAYS = random_arrays(128)
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


def batch_norm_net(**options):
    return models.create("cnn_32_64", num_classes=10, widths=(4, 8), norm="batch", **options)


def dense_net(**options):
    """Quick to compile."""
    return models.create("mlp", num_classes=10, dense_widths=(8,), **options)


def float16_setup(scale=2.0**16, net=batch_norm_net, **options):
    """A small network in float16 with a state that has everything a skipped step must not touch."""
    state, make_step = setup(
        net(dtype=jnp.float16), ema_decay=0.9, optimizer=optax.adam(1e-3), **options
    )
    start = precision.initial_loss_scale("float16")
    assert start.scale == 65536
    return state.replace(loss_scale=start.replace(scale=jnp.float32(scale))), make_step


@given(
    st.lists(st.sampled_from([1, 1, 1, 0]), max_size=40),
    st.integers(0, 24),
    st.integers(precision.GROWTH_INTERVAL_STEPS - 5, precision.GROWTH_INTERVAL_STEPS - 1),
)
@settings(max_examples=30)
def test_the_scale_halves_at_once_and_doubles_after_an_interval(outcomes, exponent, good_steps):
    state = LossScale(jnp.float32(2.0**exponent), jnp.int32(good_steps), jnp.int32(0))
    scale, good, skipped = 2.0**exponent, good_steps, 0
    for finite in outcomes:
        state = precision.adjusted(state, jnp.bool_(finite))
        if finite:
            good += 1
            if good == precision.GROWTH_INTERVAL_STEPS:
                scale, good = min(2 * scale, 2.0**24), 0
        else:
            skipped += scale > 1
            scale, good = max(scale / 2, 1.0), 0
        assert (float(state.scale), int(state.good_steps), int(state.skipped_steps)) == (
            scale,
            good,
            skipped,
        )


@pytest.mark.slow
def test_a_step_that_overflows_is_skipped_whole():
    state, make_step = float16_setup(scale=2.0**24)
    step, batch = jax.jit(make_step()), batch_of(ARRAYS, 0, 16)
    state = state.replace(step=jnp.int32(5))
    new_state, metrics = step(state, batch)
    kept = ("params", "batch_stats", "opt_state", "ema")
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(new_state, name))
    assert (int(new_state.step), int(new_state.num_updates)) == (6, 5)
    assert new_state.loss_scale.scale == 2.0**23
    assert metrics["skipped"] == (1, 1)
    assert metrics["loss_scale"] == (2.0**24, 1)
    assert metrics["gradient_norm"] == metrics["update_norm"] == (0, 0)
    assert metrics["loss"][1] == 16
    assert np.isfinite(metrics["loss"][0])
    stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], metrics)
    loop.check_finite(5, stacked)

    while float(metrics["skipped"][0]):
        new_state, metrics = step(new_state, batch)
    assert 1 < float(new_state.loss_scale.scale) < 2.0**23
    for name in kept:
        before, after = (jax.tree.leaves(getattr(s, name)) for s in (state, new_state))
        assert any(
            np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(before, after, strict=True)
        )
    assert int(optax.tree.get(new_state.opt_state, "count")) == int(new_state.num_updates) - 5 == 1


def test_learning_rate_is_that_of_the_update_made():
    """Of step 7 where 3 steps were skipped, as the optimizer counts: that of update 4."""
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    state, _ = float16_setup(scale=1.0, net=dense_net)
    state = state.replace(
        step=jnp.int32(7), loss_scale=state.loss_scale.replace(skipped_steps=jnp.int32(3))
    )
    step = steps.make_step(
        dense_net(dtype=jnp.float16),
        optax.adam(1e-3),
        classification(10),
        schedule=schedule,
    )
    _, metrics = jax.jit(step)(state, batch_of(ARRAYS, 0, 16))
    assert metrics["learning_rate"] == (pytest.approx(0.4), 1)


class Exploding(nn.Module):
    """Its logits are too large for float16 from the start."""

    dtype: object = jnp.float16

    @nn.compact
    def __call__(self, image, *, train):
        x = image.reshape(image.shape[0], -1)
        return 1e6 * nn.Dense(10, dtype=self.dtype, name="head")(x)


def test_what_no_scale_helps_is_divergence():
    state, make_step = setup(Exploding())
    state = state.replace(loss_scale=precision.initial_loss_scale("float16"))
    step, batch = jax.jit(make_step()), batch_of(ARRAYS, 0, 16)
    for index in range(17):
        previous = state
        state, metrics = step(state, batch)
        stacked = jax.tree.map(lambda leaf: np.asarray(leaf)[None], metrics)
        if index < 16:
            loop.check_finite(index, stacked)
            assert metrics["loss"] == (0, 0)
    assert previous.loss_scale.scale == precision.MINIMUM_SCALE
    with pytest.raises(loop.Diverged, match=r"diverged at step 17 .*loss nan"):
        loop.check_finite(16, stacked)


def test_the_scale_leaves_the_gradient_as_it_is():
    """That of a float32 network, in which nothing overflows or vanishes."""
    batch = batch_of(ARRAYS, 0, 16)
    state, make_step = setup(dense_net())
    step = jax.jit(make_step())
    plain, metrics = step(state, batch)
    scale = LossScale(jnp.float32(2.0**10), jnp.int32(0), jnp.int32(0))
    scaled, scaled_metrics = step(state.replace(loss_scale=scale), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        plain.params,
        scaled.params,
    )
    assert scaled_metrics["gradient_norm"][0] == pytest.approx(float(metrics["gradient_norm"][0]))
    assert scaled_metrics["loss"][0] == pytest.approx(float(metrics["loss"][0]))


def test_without_the_scale_small_gradients_vanish():
    """What the scale is for: a gradient below float16's smallest number, 6e-8."""

    def gradient(scale):
        def loss(weight):
            return (
                (weight.astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32) * 1e-4 * scale
            )

        return jax.grad(loss)(jnp.float32(1.0)) / scale

    assert gradient(1.0) == 0.0
    assert gradient(2.0**16) == pytest.approx(1e-8, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "devices"), [pytest.param("pmap", 4, marks=pytest.mark.slow), ("scan", 2)]
)
def test_float16_is_the_same_on_many_devices(method, devices):
    """Three steps that overflow by far, then three that do not by far, in two parts each."""

    def run(method, devices):
        mesh = make_mesh(devices)
        whole = replicated(mesh)
        sharding = batch_sharding(mesh)
        data = ResidentPipeline(ARRAYS, 32, seed=0, sharding=sharding, replicated=whole)
        state, make_step = float16_setup(scale=2.0**24, accumulate=2)
        state = jax.device_put(state, whole)
        train = compile_train(make_step, state, data, method=method, mesh=mesh)
        start = jax.device_get(state.params)
        state, metrics = next(train(state, 0, [3]))
        assert metrics["skipped"][0].tolist() == [1, 1, 1]
        assert state.loss_scale.scale == 2.0**21
        jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(state.params))
        scale = jax.device_put(state.loss_scale.replace(scale=jnp.float32(2.0**8)), whole)
        state, metrics = next(train(state.replace(loss_scale=scale), 3, [3]))
        assert metrics["skipped"][0].tolist() == [0, 0, 0]
        return jax.device_get(state)

    one, many = run("jit", 1), run(method, devices)
    assert one.loss_scale == many.loss_scale
    # Sums of 11-bit numbers in another order; Adam's steps are of size 1e-3 each.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one.batch_stats, many.batch_stats
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-3), one.params, many.params)


def test_the_scale_is_saved_and_restored_exactly(tmp_path):
    state, make_step = float16_setup(scale=2.0**24, net=dense_net)
    step = jax.jit(make_step())
    for index in range(3):
        state, _ = step(state, batch_of(ARRAYS, 16 * index, 16))
    checkpoint.save(tmp_path, state, {})
    start, _ = float16_setup(net=dense_net)
    restored, _ = checkpoint.restore(tmp_path, start)
    batch = batch_of(ARRAYS, 48, 16)
    (straight, _), (resumed, _) = step(state, batch), step(restored, batch)
    straight, resumed = (s.replace(key=None) for s in (straight, resumed))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    with pytest.raises(UserError, match="loss_scale/scale"):
        checkpoint.restore(tmp_path, start.replace(loss_scale=None))


@pytest.mark.parametrize("name", DTYPES)
def test_everything_that_adds_up_is_float32(name):
    model = batch_norm_net(dtype=DTYPES[name])
    state, _ = setup(model)
    gradient_types = []

    def spy():
        def update(gradient, opt_state, params=None):
            gradient_types.extend(leaf.dtype for leaf in jax.tree.leaves(gradient))
            return jax.tree.map(jnp.zeros_like, gradient), opt_state

        return optax.GradientTransformation(lambda params: (), update)

    def loss_fn(logits, labels):
        assert logits.dtype == jnp.float32
        return losses.softmax_cross_entropy(logits, labels)

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    state = create_state(variables, spy(), jax.random.key(0), precision=name)
    step = steps.make_step(
        model,
        spy(),
        classification(10, loss=loss_fn),
        schedule=lambda step: 0.1,
        accumulate=2,
    )
    new_state, metrics = jax.eval_shape(step, state, batch_of(ARRAYS, 0, 16))
    assert set(gradient_types) == {jnp.dtype("float32")}
    for tree in (new_state.params, new_state.batch_stats):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    assert {total.dtype for total, _ in metrics.values()} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    logits = jax.eval_shape(
        lambda image: model.apply(variables, image, train=False), jnp.zeros((2, 28, 28, 1))
    )
    assert logits.dtype == DTYPES[name]


def test_unknown_precisions_are_refused():
    with pytest.raises(UserError, match="unknown precision 'bf16': did you mean bfloat16"):
        precision.compute_dtype("bf16")


def final_loss(model, name, arrays, num_steps, learning_rate):
    optimizer = optax.adam(learning_rate)
    image = jnp.zeros((1, *arrays.image.shape[1:]))
    variables = jax.jit(lambda key: model.init(key, image, train=False))(jax.random.key(0))
    state = create_state(variables, optimizer, jax.random.key(1), precision=name)
    mesh = make_mesh(1)
    data = ResidentPipeline(arrays, 64, seed=0)

    def make_step(axis_name):
        return steps.make_step(
            model, optimizer, classification(10), schedule=lambda step: learning_rate,
            axis_name=axis_name,
        )  # fmt: skip

    train = compile_train(make_step, state, data, method="scan", mesh=mesh)
    state, metrics = next(train(state, 0, [num_steps]))
    total, count = (part[-50:].sum() for part in metrics["loss"])
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("name", DTYPES)
def test_lenet_trains_to_nearly_the_loss_of_float32(name):
    """200 steps on MNIST, from a loss of 2.3."""
    arrays = mnist.read()["train"]
    reference = final_loss(models.create("lenet5", num_classes=10), "float32", arrays, 200, 2e-3)
    model = models.create("lenet5", num_classes=10, dtype=DTYPES[name])
    assert reference < 0.4
    assert final_loss(model, name, arrays, 200, 2e-3) == pytest.approx(reference, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)]
)
def test_a_small_resnet_trains_to_nearly_the_loss_of_float32(name):
    """200 steps on MNIST, BatchNorm and projections in 16 bits."""

    def net(**options):
        return models.create(
            "resnet18", num_classes=10, stage_sizes=(1, 1), features=8, stem_features=8,
            stem="cifar", **options,
        )  # fmt: skip

    arrays = mnist.read()["train"]
    reference = final_loss(net(), "float32", arrays, 200, 1e-2)
    assert reference < 1.0
    low = final_loss(net(dtype=DTYPES[name]), name, arrays, 200, 1e-2)
    assert low == pytest.approx(reference, rel=0.15)
