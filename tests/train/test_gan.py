"""The step of a GAN: by hand, an optimizer a network, any devices, the same bits on resume."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import checkpoint
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated
from cnnjax.errors import UserError
from cnnjax.models.dcgan import dcgan, normal_noise, uniform_noise
from cnnjax.rng import example_keys, stream_key
from cnnjax.train import gan
from cnnjax.train.compile import compile_train
from cnnjax.train.precision import initial_loss_scale
from cnnjax.train.state import create_state
from tests.tiny import batch_of, random_arrays

SHAPE, LATENT = (8, 8, 1), 6
ARRAYS = random_arrays(64, SHAPE)
RATES = {"generator": 0.02, "discriminator": 0.01}


def setup(*, rates=RATES, dtype=jnp.float32, ema=False, model=None, **options):
    """Returns (state, make_step) of a GAN of a few channels."""
    model = model or dcgan(SHAPE, width=4, latent_size=LATENT, **options)
    optimizers = {name: optax.adam(rate, b1=0.5) for name, rate in rates.items()}
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    # Weights of the paper's size leave a network of a few channels at chance for long.
    variables["params"] = jax.tree.map(lambda leaf: 5 * leaf, variables["params"])
    both = gan.both_optimizers(**optimizers)
    state = create_state(variables, both, jax.random.key(1), ema=ema)

    def make_step(axis_name=None):
        return gan.make_gan_step(
            model.generator,
            model.discriminator,
            optimizers["generator"],
            optimizers["discriminator"],
            latent_size=LATENT,
            schedule=optax.constant_schedule(rates["generator"]),
            normalize=lambda image: gan.as_symmetric(image).astype(dtype),
            ema_decay=0.9,
            axis_name=axis_name,
        )

    return state, make_step


def stepped(state, make_step, batch):
    return jax.jit(make_step())(state, batch)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other
    )


def by_hand(state, batch, model, rates):
    """Algorithm 1 of Goodfellow et al., written with binary cross-entropies of probabilities."""
    keys = [
        jax.random.fold_in(stream_key(state.key, "noise", state.step), i)
        for i in range(len(batch["image"]))
    ]
    z = jnp.stack([jax.random.uniform(key, (LATENT,), minval=-1.0) for key in keys])
    real = batch["image"] / 127.5 - 1.0

    def generate(params):
        variables = {"params": params, "batch_stats": state.batch_stats["generator"]}
        return model.generator.apply(variables, z, train=True, mutable=["batch_stats"])

    def probability(params, statistics, image):
        variables = {"params": params, "batch_stats": statistics}
        logits, new = model.discriminator.apply(
            variables, image, train=True, mutable=["batch_stats"]
        )
        return nn.sigmoid(logits[:, 0]), new["batch_stats"]

    def of_discriminator(params):
        fake, _ = generate(state.params["generator"])
        of_real, between = probability(params, state.batch_stats["discriminator"], real)
        of_fake, after = probability(params, between, fake)
        loss = -jnp.mean(jnp.log(of_real)) - jnp.mean(jnp.log(1 - of_fake))
        return loss, (after, jnp.mean(of_real > 0.5), jnp.mean(of_fake < 0.5))

    def of_generator(params, discriminator, statistics):
        fake, new = generate(params)
        return -jnp.mean(jnp.log(probability(discriminator, statistics, fake)[0])), new

    def adam(name, gradient):
        # The first update of Adam: its rate in the direction of the gradient's sign.
        moved = jax.tree.map(lambda g: -rates[name] * g / (jnp.abs(g) + 1e-8), gradient)
        return moved, jax.tree.map(jnp.add, state.params[name], moved)

    (d_loss, (statistics, *accuracies)), d_gradient = jax.value_and_grad(
        of_discriminator, has_aux=True
    )(state.params["discriminator"])
    d_moved, discriminator = adam("discriminator", d_gradient)
    (g_loss, new), g_gradient = jax.value_and_grad(of_generator, has_aux=True)(
        state.params["generator"], discriminator, statistics
    )
    g_moved, generator = adam("generator", g_gradient)
    metrics = {
        "discriminator_loss": d_loss,
        "generator_loss": g_loss,
        "loss": d_loss + g_loss,
        "real_accuracy": accuracies[0],
        "fake_accuracy": accuracies[1],
        "learning_rate": rates["generator"],
        "gradient_norm": optax.tree.norm((d_gradient, g_gradient)),
        "update_norm": optax.tree.norm((d_moved, g_moved)),
    }
    params = {"generator": generator, "discriminator": discriminator}
    return params, {"generator": new["batch_stats"], "discriminator": statistics}, metrics


@pytest.mark.slow
def test_a_step_is_the_two_updates_by_hand():
    state, make_step = setup()
    batch = batch_of(ARRAYS, 0, 16)
    model = dcgan(SHAPE, width=4, latent_size=LATENT)
    new_state, metrics = stepped(state, make_step, batch)
    params, statistics, expected = jax.jit(
        lambda state, batch: by_hand(state, batch, model, RATES)
    )(state, batch)
    assert_close(new_state.batch_stats, statistics, 1e-4)
    # Adam divides by the gradient's size, also where that is rounding.
    assert_close(new_state.params, params, 2e-3)
    assert set(metrics) == set(expected)
    for name, (total, count) in metrics.items():
        np.testing.assert_allclose(total / count, expected[name], rtol=1e-3, err_msg=name)
    assert int(metrics["loss"][1]) == 16 and int(new_state.step) == 1
    assert_same(*(jax.random.key_data(each.key) for each in (state, new_state)))


@pytest.mark.slow
def test_each_network_is_changed_by_its_own_optimizer_alone():
    batch = batch_of(ARRAYS, 0, 16)
    states = {}
    for frozen in ("generator", "discriminator", "none"):
        state, make_step = setup(rates=RATES | {frozen: 0.0} if frozen != "none" else RATES)
        states[frozen], _ = stepped(state, make_step, batch)
    for frozen, other in (("generator", "discriminator"), ("discriminator", "generator")):
        assert_same(states[frozen].params[frozen], state.params[frozen])
        moved = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()),
            states[frozen].params[other],
            state.params[other],
        )
        assert min(jax.tree.leaves(moved)) > 0
    # Whatever the generator does, the discriminator of this step knows nothing of it.
    for what in ("params", "batch_stats", "opt_state"):
        one, other = (
            getattr(states[name], what)["discriminator"] for name in ("none", "generator")
        )
        assert_close(one, other, 1e-6)


def test_the_average_is_of_the_generator():
    state, make_step = setup(ema=True)
    step = jax.jit(make_step(), donate_argnums=0)
    first = jax.device_get(state.params["generator"])
    batch = batch_of(ARRAYS, 0, 16)
    state, _ = step(state, batch)
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, first, state.params["generator"])
    assert_close(state.ema["generator"], expected, 1e-6)
    # Donates what it returned: two names of one buffer could not be.
    state, _ = step(state, batch)
    assert_same(state.ema["discriminator"], state.params["discriminator"])
    assert state.variables()["params"]["generator"] is state.ema["generator"]


def test_masked_examples_change_nothing():
    state, make_step = setup(norm="none")
    assert state.batch_stats == {}
    whole = batch_of(ARRAYS, 0, 12)
    masked = {
        **batch_of(ARRAYS, 0, 16),
        "mask": jnp.arange(16) < 12,
    }
    expected, metrics = stepped(state, make_step, whole)
    found, masked_metrics = stepped(state, make_step, masked)
    assert_close(found.params, expected.params, 1e-4)
    assert_close(masked_metrics, metrics, 1e-4)
    assert int(masked_metrics["loss"][1]) == 12


def trained(method, axes, lengths, *, dtype=jnp.float32, state=None, first_step=0):
    mesh = make_mesh(axes)
    data = ResidentPipeline(
        ARRAYS,
        16,
        seed=3,
        sharding=batch_sharding(mesh),
        replicated=replicated(mesh),
    )
    start, make_step = setup(dtype=dtype, ema=True)
    state = jax.device_put(state or start, replicated(mesh))
    train = compile_train(make_step, state, data, method=method, mesh=mesh)
    for state, metrics in train(state, first_step, lengths):  # noqa: B007, B020
        pass
    return jax.device_get(state.replace(key=None)), metrics, state


@pytest.mark.slow
def test_every_way_agrees_in_float64_over_10_steps():
    with jax.enable_x64(True):
        expected = trained("jit", 1, [10], dtype=jnp.float64)[:2]
        for method, axes in (("jit", 8), ("pmap", 8), ("scan", 1), ("scan", 8)):
            found = trained(method, axes, [10], dtype=jnp.float64)[:2]
            assert_close(found, expected, 1e-9)


@pytest.mark.slow
def test_eight_devices_agree_with_one_in_float32_over_3_steps():
    assert_close(trained("jit", 8, [3])[:2], trained("jit", 1, [3])[:2], 1e-3)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(tmp_path):
    expected = trained("scan", 2, [3, 2])[0]
    _, _, state = trained("scan", 2, [3])
    checkpoint.save(tmp_path, state, {})
    start, _ = setup(ema=True)
    restored, _ = checkpoint.restore(tmp_path, start)
    assert int(restored.step) == 3
    assert_same(trained("scan", 2, [2], state=restored, first_step=3)[0], expected)


def test_both_optimizers_are_each_for_its_own_network():
    one, other = optax.sgd(0.1), optax.adam(0.2)
    params = {"generator": jnp.ones(3), "discriminator": jnp.arange(2.0)}
    gradient = jax.tree.map(lambda leaf: leaf + 1, params)
    both = gan.both_optimizers(one, other)
    state = both.init(params)
    updates, state = both.update(gradient, state, params)
    for name, optimizer in (("generator", one), ("discriminator", other)):
        expected = optimizer.update(gradient[name], optimizer.init(params[name]), params[name])
        assert_same((updates[name], state[name]), expected)


def test_noise_depends_on_step_and_example():
    keys = [
        example_keys(stream_key(jax.random.key(0), "noise", step), jnp.arange(500))
        for step in (0, 1)
    ]
    uniform, other = (np.asarray(uniform_noise(each, 4)) for each in keys)
    assert len(np.unique(np.concatenate([uniform, other]), axis=0)) == 1000
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() < 1
    normal = np.asarray(normal_noise(keys[0], 4))
    np.testing.assert_allclose([normal.mean(), normal.std()], [0, 1], atol=0.05)


def test_float16_is_refused():
    state, make_step = setup()
    state = dataclasses.replace(state, loss_scale=initial_loss_scale("float16"))
    with pytest.raises(UserError, match="bfloat16"):
        jax.eval_shape(make_step(), state, batch_of(ARRAYS, 0, 16))


class WithDropout(nn.Module):
    """A discriminator of one layer that drops half of what it sees."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(image.reshape(len(image), -1))
        return nn.Dense(1, name="head")(x)


@pytest.mark.slow
def test_dropout_is_that_of_the_example_on_any_device():
    model = dcgan(SHAPE, width=4, latent_size=LATENT, norm="none")
    model = model.clone(discriminator=WithDropout())
    state, make_step = setup(model=model)
    batch = batch_of(ARRAYS, 0, 16)
    expected, _ = stepped(state, make_step, batch)
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    found, _ = jax.pmap(make_step("data"), "data", in_axes=(None, 0))(state, split)
    assert_close(jax.tree.map(lambda x: x[0], found.params), expected.params, 1e-3)
