"""Adversarial training: a task changed so that it is trained under attack; free training's step.

The changed task takes images in [0, 1] (`normalize=as_float` in the step), makes adversarial ones
of them within an L-infinity ball with the parameters of this very step, and normalizes inside.
No gradient flows through the making. The model is attacked as it predicts (`train=False`): without
dropout, with the running statistics.

Radii and step sizes are numbers or schedules, update -> number: a radius that grows from 0 leads a
network that would never leave chance under the full one to where it can learn against it.

The loss and accuracy among the step's metrics are those of the adversarial images, but for TRADES
and `none`, whose accuracy is that of the images as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from cnnjax import metrics as metrics_lib
from cnnjax.devices.sums import sum_over_devices
from cnnjax.errors import UserError, unknown_name
from cnnjax.evaluation.ensemble import class_logits
from cnnjax.rng import draw, example_keys, stream_key
from cnnjax.robust import attacks
from cnnjax.tasks.task import Batch, Forward, Metrics, PyTree, Task, example_weights
from cnnjax.train.dropout import by_example
from cnnjax.train.predict import Normalize, as_float, positions
from cnnjax.train.state import TrainState
from cnnjax.train.step import TrainStep, finish_step, make_apply, make_step, with_axis

Length = float | Callable[[jax.Array | int], jax.Array]
METHODS = ("none", "fgsm_rs", "pgd", "trades", "free")


def adversarial(
    task: Task,
    method: str,
    *,
    normalize: Normalize,
    epsilon: Length,
    step_size: Length,
    num_steps: int = 10,
    beta: float = 6.0,
) -> Task:
    """Returns the task, trained under attack: by `none`, `fgsm_rs`, `pgd` or `trades`.

    Args:
      task: classification.
      method: `none` trains on the images as they are.
      normalize: images in [0, 1] -> what the model expects.
      epsilon: the radius of the L-infinity ball.
      step_size: of each step of the attack.
      num_steps: of `pgd` and `trades`.
      beta: of `trades`.

    Raises:
      UserError: an unknown name, or a number out of its range.
    """
    known = [name for name in METHODS if name != "free"]
    if method not in known:
        raise unknown_name("method of adversarial training", method, known)
    check_numbers(epsilon=epsilon, step_size=step_size, attack_steps=num_steps, beta=beta)
    ball: dict[str, Any] = {"normalize": normalize, "epsilon": epsilon, "step_size": step_size}
    if method == "none":
        return dataclasses.replace(task, apply=_clean(normalize))
    if method == "fgsm_rs":
        return fgsm_rs_task(task, **ball)
    if method == "pgd":
        return pgd_task(task, num_steps=num_steps, **ball)
    return trades_task(task, num_steps=num_steps, beta=beta, **ball)


def fgsm_rs_task(task: Task, *, normalize: Normalize, epsilon: Length, step_size: Length) -> Task:
    """One signed gradient step from a random start within the ball: the price of two steps.

    Wong, Rice and Kolter 2020, "Fast is better than free: Revisiting adversarial training",
    algorithm 3. A `step_size` of 1.25 `epsilon` is theirs; much more, and robustness to PGD may
    collapse within an epoch ("catastrophic overfitting"), which validation under PGD shows.
    """

    def start(keys: jax.Array, image: jax.Array, epsilon: attacks.Number) -> jax.Array:
        # Not clipped to [0, 1] before the step, as in the paper's code: of a black pixel the change
        # is then spread over the ball. Clipped, it is 0 or epsilon, and robustness may collapse.
        return image + attacks.uniform_change(keys, image, epsilon, "linf")

    return _under_attack(task, normalize, start, epsilon, step_size, num_steps=1)


def pgd_task(
    task: Task, *, normalize: Normalize, epsilon: Length, step_size: Length, num_steps: int
) -> Task:
    """The last image of `num_steps` projected steps from a random start.

    Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section 2.1;
    for MNIST they take 40 steps of 0.01 with `epsilon` 0.3. Costs `num_steps` + 1 plain steps.
    """

    def start(keys: jax.Array, image: jax.Array, epsilon: attacks.Number) -> jax.Array:
        return attacks.uniform_start(keys, image, epsilon, "linf")

    return _under_attack(task, normalize, start, epsilon, step_size, num_steps)


def trades_task(
    task: Task,
    *,
    normalize: Normalize,
    epsilon: Length,
    step_size: Length,
    num_steps: int,
    beta: float,
) -> Task:
    """The loss of the image plus `beta` times how far the prediction can be moved within the ball.

        loss(f(x), y) + beta max KL(f(x) || f(x'))   over x' in the ball

    Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and Accuracy",
    equation (5) and algorithm 1: the search starts at the image plus normal noise of deviation
    0.001, because at the image itself the divergence has no gradient. With BatchNorm both images
    are normalized by statistics of their own; the running ones are updated by the originals.
    """
    clean = _clean(normalize)

    def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[Any, PyTree]:
        if not train:
            return clean(forward, batch, train=False)
        image, radius = batch["image"], _at(epsilon, forward.update)
        logits_fn = _frozen(forward, normalize)
        natural = jax.lax.stop_gradient(logits_fn(image))

        def divergence(x: jax.Array) -> jax.Array:
            return jnp.sum(_kl(natural, logits_fn(x)))

        noise = jax.vmap(lambda key: draw(jax.random.normal, key, image.shape[1:], image.dtype))
        start = attacks.project(
            image + 1e-3 * noise(example_keys(_key(forward), batch["example"])),
            image,
            radius,
            "linf",
        )
        length = _at(step_size, forward.update)
        found = _climb(divergence, start, image, radius, length, num_steps)
        logits, batch_stats = forward(normalize(image), train=True)
        moved, _ = forward(normalize(jax.lax.stop_gradient(found)), train=True)
        return {"logits": logits, "moved": moved}, batch_stats

    def loss(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        values, weights = task.loss(outputs["logits"], batch)
        return values + beta * _kl(outputs["logits"], outputs["moved"]), weights

    def metrics(outputs: Any, batch: Batch) -> Metrics:
        return task.metrics(outputs["logits"] if isinstance(outputs, dict) else outputs, batch)

    return dataclasses.replace(task, apply=apply, loss=loss, metrics=metrics)


def make_free_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    normalize: Normalize,
    epsilon: Length,
    step_size: Length,
    replays: int,
    augment: Callable[[jax.Array, Batch, jax.Array], Batch] | None = None,
    penalty: Callable[[PyTree], jax.Array] | None = None,
    ema_decay: float = 0.0,
    axis_name: str | None = None,
) -> TrainStep:
    """Returns the step of free adversarial training: each batch is used for `replays` updates.

    Shafahi et al. 2019, "Adversarial Training for Free!", algorithm 1: one backward pass gives the
    gradient of the parameters, for an update, and of the image, for a step of the perturbation,
    which the next replay starts from. So `replays` updates cost as many plain steps; train for
    `replays` times fewer epochs. Where theirs starts from the perturbation of the batch before,
    this one draws it uniformly: it is the start's not being zero that counts (Wong, Rice and Kolter
    2020, section 4.1), and a run then needs no state besides the usual one.

    Args:
      model, optimizer, task, augment, penalty, ema_decay, axis_name: as for
        `cnnjax.train.step.make_step`; the task is classification.
      schedule: update -> learning rate; there are `replays` updates a step.
      normalize: images in [0, 1] -> what the model expects.
      epsilon: the radius of the L-infinity ball.
      step_size: of the perturbation; `epsilon` in the paper.
      replays: the paper's `m`.

    Returns:
      The step. Its loss and accuracy are means over the replays.

    Raises:
      UserError: a number out of its range or, when traced, a state with a loss scale.
    """
    check_numbers(epsilon=epsilon, step_size=step_size, replays=replays)
    model = with_axis(model, axis_name)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if state.loss_scale is not None:
            raise UserError(
                "free adversarial training has no loss scale: use bfloat16, not float16."
            )
        num_devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        batch = {**batch, "image": as_float(batch["image"])}
        examples, _ = positions(batch, axis_name)
        if augment is not None:
            batch = augment(stream_key(state.key, "augment", state.step), batch, examples[0])
        image = batch["image"]
        mask = example_weights(batch, examples)
        num_examples = sum_over_devices(jnp.sum(mask, dtype=jnp.int32), axis_name)
        keys = example_keys(stream_key(state.key, "objective", state.step), examples)
        first_update = state.step * replays

        def replay(
            carry: tuple[TrainState, jax.Array], number: jax.Array
        ) -> tuple[tuple[TrainState, jax.Array], Metrics]:
            state, x = carry
            update = first_update + number
            key = stream_key(state.key, "dropout", update)
            apply = make_apply(model, state.batch_stats, key, frozen=state.frozen)

            def total(params: PyTree, x: jax.Array) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
                with by_example(examples):
                    logits, batch_stats = apply(params, normalize(x), True)
                loss = metrics_lib.mean(*task.loss(logits, batch))
                term = loss[0] / num_examples
                if penalty is not None:
                    term = term + penalty(params) / num_devices
                pairs = metrics_lib.pairs(task.metrics(logits, batch))
                return term, ({**pairs, "loss": loss}, batch_stats)

            (gradient, ascent), (metrics, batch_stats) = jax.grad(total, (0, 1), has_aux=True)(
                state.params, x
            )
            gradient, metrics = sum_over_devices((gradient, metrics), axis_name)
            new_state, metrics = finish_step(
                state, optimizer, gradient, batch_stats, metrics, schedule(update), ema_decay
            )
            # All replays are one step, which is one batch.
            new_state = dataclasses.replace(new_state, step=state.step)
            moved = attacks.ascend(
                x, image, ascent, _at(step_size, update), _at(epsilon, update), "linf"
            )
            return (new_state, moved), metrics

        start = image + attacks.uniform_change(keys, image, _at(epsilon, first_update), "linf")
        (state, _), metrics = jax.lax.scan(replay, (state, start), jnp.arange(replays))
        metrics = jax.tree.map(lambda values: jnp.sum(values, axis=0), metrics)
        return dataclasses.replace(state, step=state.step + 1), metrics

    return step


def adversarial_factory(method: str, **numbers: Any) -> Callable[..., TrainStep]:
    """Returns what takes the arguments of `cnnjax.train.step.make_step` and trains under attack.

    Args:
      method: and `numbers`: as `adversarial` takes them.
    """

    def factory(
        model: nn.Module,
        optimizer: optax.GradientTransformation,
        task: Task,
        *,
        normalize: Normalize,
        **options: Any,
    ) -> TrainStep:
        attacked = adversarial(task, method, normalize=normalize, **numbers)
        # The task normalizes what it has attacked.
        return make_step(model, optimizer, attacked, normalize=as_float, **options)

    return factory


def free_factory(*, epsilon: Length, step_size: Length, replays: int) -> Callable[..., TrainStep]:
    """Likewise for the step of `make_free_step`, whose arguments these are.

    What that step has not, it drops: accumulation, SAM, averages of weights, a pull.

    Raises:
      UserError: `replays` below 1.
    """
    check_numbers(replays=replays)

    def factory(
        model: nn.Module, optimizer: optax.GradientTransformation, task: Task, **options: Any
    ) -> TrainStep:
        for name in ("accumulate", "sam_radius", "averaging", "pull"):
            options.pop(name)
        return make_free_step(
            model,
            optimizer,
            task,
            epsilon=epsilon,
            step_size=step_size,
            replays=replays,
            **options,
        )

    return factory


def check_numbers(**numbers: Length) -> None:
    """Raises a UserError unless radii and step sizes are positive and counts whole from 1 on.

    What a schedule returns is not checked.
    """
    for name, number in numbers.items():
        if callable(number):
            continue
        if name in ("attack_steps", "replays"):
            if number < 1 or number != int(number):
                raise UserError(f"{name} {number} must be a whole number from 1 on.")
        elif name == "beta":
            if not 0 <= number < float("inf"):
                raise UserError(f"beta {number} must be 0 or more.")
        elif not 0 < number < float("inf"):
            raise UserError(f"{name} {number} must be positive (white is 1).")


def _clean(normalize: Normalize) -> Callable[..., tuple[Any, PyTree]]:
    """Returns the `apply` of a task for images in [0, 1]."""

    def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[Any, PyTree]:
        return forward(normalize(batch["image"]), train=train)

    return apply


def _under_attack(
    task: Task,
    normalize: Normalize,
    start: Callable[[jax.Array, jax.Array, attacks.Number], jax.Array],
    epsilon: Length,
    step_size: Length,
    num_steps: int,
) -> Task:
    """The task on the image that `num_steps` steps reach from `start(keys, image, epsilon)`."""
    clean = _clean(normalize)

    def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[Any, PyTree]:
        if not train:
            return clean(forward, batch, train=False)
        image, radius = batch["image"], _at(epsilon, forward.update)
        logits_fn = _frozen(forward, normalize)

        def value(x: jax.Array) -> jax.Array:
            losses, _ = task.loss(logits_fn(x), batch)
            return jnp.sum(losses)

        first = start(example_keys(_key(forward), batch["example"]), image, radius)
        length = _at(step_size, forward.update)
        found = _climb(value, first, image, radius, length, num_steps)
        return clean(forward, {**batch, "image": jax.lax.stop_gradient(found)}, train=True)

    return dataclasses.replace(task, apply=apply)


def _key(forward: Forward) -> jax.Array:
    assert forward.key is not None
    return forward.key


def _frozen(forward: Forward, normalize: Normalize) -> attacks.LogitsFunction:
    """The model as it predicts, of which the parameters are not differentiated."""
    params = jax.lax.stop_gradient(forward.params)
    return lambda image: forward(normalize(image), train=False, params=params)[0]


def _climb(
    value: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    image: jax.Array,
    epsilon: attacks.Number,
    step_size: attacks.Number,
    num_steps: int,
) -> jax.Array:
    def step(_: int, x: jax.Array) -> jax.Array:
        return attacks.ascend(x, image, jax.grad(value)(x), step_size, epsilon, "linf")

    return jax.lax.fori_loop(0, num_steps, step, start)


def _at(length: Length, update: jax.Array | int) -> attacks.Number:
    return length(update) if callable(length) else length


def _kl(logits: jax.Array, moved: jax.Array) -> jax.Array:
    """KL(p || q) `[batch]` of the predictions of two sets of logits, of one logit or several."""
    log_p, log_q = (jax.nn.log_softmax(class_logits(x)) for x in (logits, moved))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
