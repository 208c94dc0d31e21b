"""The step of a generative adversarial network: two networks, two optimizers, one order of updates.

The same `(state, batch) -> (state, metrics)` as every other step, so `compile`, `fit`, checkpoints
and resuming take it as it is. `state.params`, `state.batch_stats` and `state.opt_state` are dicts
of `generator` and `discriminator`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cnnjax import metrics as metrics_lib
from cnnjax.devices.sums import sum_over_devices
from cnnjax.errors import UserError
from cnnjax.models.dcgan import Noise, uniform_noise
from cnnjax.rng import example_keys, stream_key
from cnnjax.train.averaging import exponential, mix_in
from cnnjax.train.dropout import by_example
from cnnjax.train.predict import as_float, positions
from cnnjax.train.state import TrainState
from cnnjax.train.step import Batch, Metrics, TrainStep, make_apply, with_axis

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]


def as_symmetric(image: jax.Array) -> jax.Array:
    """Maps images, uint8 or float in [0, 1], to [-1, 1], the range of tanh."""
    return 2.0 * as_float(image) - 1.0


def both_optimizers(
    generator: optax.GradientTransformation, discriminator: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns the two as one optimizer of both networks' parameters.

    Its state is the one that `make_gan_step` wants, so that `create_state` makes it; its `update`
    changes both networks at the same time, which that step does not.
    """
    optimizers = {"generator": generator, "discriminator": discriminator}

    def init(params: PyTree) -> PyTree:
        return {name: optimizers[name].init(params[name]) for name in optimizers}

    def update(
        gradient: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        results = {
            name: optimizers[name].update(
                gradient[name], state[name], None if params is None else params[name]
            )
            for name in optimizers
        }
        updates = {name: update for name, (update, _) in results.items()}
        return updates, {name: state for name, (_, state) in results.items()}

    return optax.GradientTransformation(init, update)


def make_gan_step(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    *,
    latent_size: int,
    schedule: Schedule,
    normalize: Callable[[jax.Array], jax.Array] = as_symmetric,
    noise: Noise = uniform_noise,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns the step that updates the discriminator, then the generator against the new one.

    Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv 1406.2661), algorithm 1 with k = 1,
    D the sigmoid of the discriminator's logit: the discriminator minimizes the mean of
    `-log D(x) - log(1 - D(G(z)))`, the generator that of `-log D(G(z))` (section 3: the
    non-saturating loss). Both updates use the same z, so that the generator is applied once.

    The real and the generated images are separate batches for the discriminator's batch norm, as
    in the code of Radford et al. 2016. Its running statistics take in both in turn; the generator's
    update leaves them alone.

    The noise of an example is a function of (`state.key`, `state.step`, the example's position in
    the batch): a resumed run draws the same, on any number of devices.

    Args:
      generator: `noise [batch, latent_size] -> image`, with the contract of `cnnjax.models` else.
      discriminator: `image -> logit [batch, 1]`, likewise.
      generator_optimizer, discriminator_optimizer: Optax transformations; see `both_optimizers`.
      latent_size: length of the noise vectors.
      schedule: step -> learning rate of the generator; here for the metrics only.
      normalize: images as stored -> what the discriminator gets, and the generator is to make.
      noise: `(keys [batch], latent_size) -> [batch, latent_size]`.
      ema_decay: decay of the moving average of the generator's parameters, where `state.ema` is not
        None; that of the discriminator's is those themselves.
      axis_name: the mapped axis under `pmap` or `shard_map`; None under `jit`.

    Returns:
      The step. Its metrics are `(sum, count)` pairs over unmasked examples: `generator_loss`,
      `discriminator_loss`, their sum `loss`, `real_accuracy` and `fake_accuracy` (of the
      discriminator before its update); and `learning_rate`, `gradient_norm` and `update_norm` (of
      both networks together) with count 1.

    Raises:
      UserError: when traced, a state with a loss scale.
    """
    generator, discriminator = with_axis(generator, axis_name), with_axis(discriminator, axis_name)
    optimizers = {"generator": generator_optimizer, "discriminator": discriminator_optimizer}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if state.loss_scale is not None:
            raise UserError("the step of a GAN has no loss scale: use bfloat16, not float16.")
        real, mask = normalize(batch["image"]), batch["mask"]
        examples, _ = positions(batch, axis_name)
        keys = example_keys(stream_key(state.key, "noise", state.step), examples)
        z = noise(keys, latent_size).astype(real.dtype)
        old = {name: _Network.of(state, name) for name in optimizers}

        def apply(
            model: nn.Module, params: PyTree, batch_stats: PyTree, inputs: jax.Array, draw: str
        ) -> tuple[jax.Array, PyTree]:
            key = stream_key(state.key, draw, state.step)
            with by_example(examples):
                return make_apply(model, batch_stats, key)(params, inputs, True)

        def generate(params: PyTree) -> tuple[jax.Array, PyTree]:
            return apply(generator, params, old["generator"].batch_stats, z, "generator dropout")

        def discriminate(
            params: PyTree, batch_stats: PyTree, image: jax.Array, kind: str
        ) -> tuple[jax.Array, PyTree]:
            logits, batch_stats = apply(
                discriminator, params, batch_stats, image, f"{kind} dropout"
            )
            return logits[:, 0], batch_stats

        def discriminator_loss(
            params: PyTree, fake: jax.Array
        ) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
            of_real, between = discriminate(params, old["discriminator"].batch_stats, real, "real")
            of_fake, batch_stats = discriminate(params, between, fake, "fake")
            metrics = _discriminator_metrics(of_real, of_fake, mask)
            return metrics["discriminator_loss"][0], (metrics, batch_stats)

        def generator_loss(fake: jax.Array, trained: _Network) -> tuple[jax.Array, Metrics]:
            of_fake, _ = discriminate(trained.params, trained.batch_stats, fake, "generated")
            loss = metrics_lib.mean(jax.nn.softplus(-of_fake), mask)
            return loss[0], {"generator_loss": loss}

        def updated(
            name: str, gradient: PyTree, metrics: Metrics, batch_stats: PyTree
        ) -> tuple[_Network, Metrics, tuple[PyTree, PyTree]]:
            gradient, metrics = sum_over_devices((gradient, metrics), axis_name)
            count = metrics[f"{name}_loss"][1]
            network, change = old[name].updated(optimizers[name], gradient, count, batch_stats)
            return network, metrics, change

        fake, backward, generator_stats = jax.vjp(generate, state.params["generator"], has_aux=True)
        gradient, (metrics, batch_stats) = jax.grad(discriminator_loss, has_aux=True)(
            state.params["discriminator"], fake
        )
        trained, metrics, change = updated("discriminator", gradient, metrics, batch_stats)
        image_gradient, own_metrics = jax.grad(generator_loss, has_aux=True)(fake, trained)
        (gradient,) = backward(image_gradient)
        new, own_metrics, own_change = updated("generator", gradient, own_metrics, generator_stats)

        networks = {"generator": new, "discriminator": trained}
        metrics = metrics | own_metrics | _of_both(metrics, own_metrics, change, own_change)
        learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics["learning_rate"] = learning_rate, jnp.ones((), jnp.int32)
        return _after(state, networks, ema_decay), metrics

    return step


class _Network(NamedTuple):
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @classmethod
    def of(cls, state: TrainState, name: str) -> _Network:
        return cls(state.params[name], state.batch_stats.get(name, {}), state.opt_state[name])

    def updated(
        self,
        optimizer: optax.GradientTransformation,
        gradient: PyTree,
        count: jax.Array,
        batch_stats: PyTree,
    ) -> tuple[_Network, tuple[PyTree, PyTree]]:
        """Returns the network after an update by the mean gradient, and (gradient, updates)."""
        gradient = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), gradient)
        updates, opt_state = optimizer.update(gradient, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return _Network(params, batch_stats, opt_state), (gradient, updates)


def _discriminator_metrics(of_real: jax.Array, of_fake: jax.Array, mask: jax.Array) -> Metrics:
    losses = jax.nn.softplus(-of_real) + jax.nn.softplus(of_fake)
    return {
        "discriminator_loss": metrics_lib.mean(losses, mask),
        "real_accuracy": metrics_lib.mean(of_real > 0, mask),
        "fake_accuracy": metrics_lib.mean(of_fake < 0, mask),
    }


def _of_both(
    metrics: Metrics,
    own_metrics: Metrics,
    change: tuple[PyTree, PyTree],
    own_change: tuple[PyTree, PyTree],
) -> Metrics:
    """Returns the metrics that are of both networks; a change is (gradient, updates)."""
    (loss, count), (own_loss, _) = metrics["discriminator_loss"], own_metrics["generator_loss"]
    one = jnp.ones((), jnp.int32)
    norms = (optax.tree.norm(pair) for pair in zip(change, own_change, strict=True))
    gradient_norm, update_norm = norms
    return {
        "loss": (loss + own_loss, count),
        "gradient_norm": (gradient_norm, one),
        "update_norm": (update_norm, one),
    }


def _after(state: TrainState, networks: dict[str, _Network], ema_decay: float) -> TrainState:
    """Returns the state after the step: the average is of the generator alone."""
    params = {name: network.params for name, network in networks.items()}
    batch_stats = {
        name: network.batch_stats for name, network in networks.items() if network.batch_stats
    }
    ema = state.ema
    if ema is not None:
        share = exponential(ema_decay)(state.num_updates)
        average = mix_in(ema["generator"], params["generator"], share)
        ema = {**params, "generator": average}
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state={name: network.opt_state for name, network in networks.items()},
        ema=ema,
    )
