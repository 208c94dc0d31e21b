"""What an experiment chooses (model, loss, optimizer, step), and the initial training state."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.tree_util import Partial

from cnnjax import losses, optim, schedules
from cnnjax.data.pipelines import count_steps
from cnnjax.data.streamed import AnyDataset, split_size
from cnnjax.errors import UserError
from cnnjax.run.groups import Optimization, Regularization, Training
from cnnjax.run.settings import Run
from cnnjax.tasks.task import Task
from cnnjax.traced import is_on
from cnnjax.train import averaging
from cnnjax.train.precision import of_platform
from cnnjax.train.predict import EvalStep, as_float
from cnnjax.train.state import TrainState
from cnnjax.train.step import TrainStep, make_step

PyTree = Any
# Settings that are arguments of the compiled step: another number needs no other program.
NUMBERS = (
    "learning_rate",
    "weight_decay",
    "momentum",
    "clip_norm",
    "max_norm",
    "l1",
    "l2",
    "ema_decay",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an experiment decides.

    Attributes:
      dataset: training, validation and test examples, in memory or on disk.
      task: what the network is to find; also what is measured and reported.
      model: a Linen module with the contract of `cnnjax.models`.
      optimizer: an Optax transformation.
      make_step: `(axis_name, **numbers)` -> training step, such as `make_step` of
        `cnnjax.train.step` with all else bound.
      normalize: stored images -> what the model expects.
      metadata: returns what `model.json` records: what it takes to build the model again (`model`,
        `arguments`; see `run.load.load_trained`) and to feed it. Called when all is checked.
      ema: whether the state keeps an average of the parameters.
      recalibrate_batches: training batches on which BatchNorm's statistics are recomputed for
        validation and test, see `cnnjax.train.batch_stats`; 0 takes the running ones.
      precision: what the model computes in; float16 gives the state a loss scale.
      variables: what training starts from, on the host: `params`, `batch_stats` and `frozen` of
        the model; None initializes the model.
      base_checksum: digest of the weights that `variables` come from, without which no checkpoint
        of the run is read; "" where it starts from none.
      teacher_checksum: likewise of the weights of a teacher (see `cnnjax.distill`).
      make_eval_step: `(axis_name, split=...)` -> evaluation step, where there is more to measure on
        `validation` or `test` than the task's metrics.
      init: `key -> variables`, where the model is not initialized by its first input alone.
      make_state: `(variables, key) -> TrainState`, for a step that keeps another state than
        `create_state` makes, such as that of two optimizers.
      after_validation: `(directory, state) -> None`, called on the first process after each
        validation, such as to draw samples.
      numbers: returns what `make_step` may be given by name, so that it is no constant of the
        compiled program. Called when all is checked.
    """

    dataset: AnyDataset
    task: Task
    model: nn.Module
    optimizer: optax.GradientTransformation
    make_step: Callable[..., TrainStep]
    normalize: Callable[[jax.Array], jax.Array]
    metadata: Callable[[], dict[str, Any]]
    ema: bool = False
    recalibrate_batches: int = 0
    precision: str = "float32"
    variables: PyTree | None = None
    base_checksum: str = ""
    teacher_checksum: str = ""
    make_eval_step: Callable[..., EvalStep] | None = None
    init: Callable[[jax.Array], PyTree] | None = None
    make_state: Callable[[PyTree, jax.Array], TrainState] | None = None
    after_validation: Callable[[Path, TrainState], None] | None = None
    numbers: Callable[[], dict[str, Any]] = dict

    def step_maker(self) -> Partial:
        """Returns `make_step` for `cnnjax.train.compile`: other numbers, the same program."""
        return Partial(self.make_step, **self.numbers())

    def checksums(self) -> dict[str, str]:
        """Returns what a checkpoint must agree with to be resumed."""
        return {
            "data_checksum": self.dataset.checksum,
            "base_checksum": self.base_checksum,
            "teacher_checksum": self.teacher_checksum,
        }


def make_recipe(
    config: Training,
    dataset: AnyDataset,
    task: Task,
    model: nn.Module,
    *,
    metadata: Callable[[], dict[str, Any]],
    normalize: Callable[..., jax.Array] = as_float,
    moments: Callable[[], dict[str, Any]] = dict,
    augment: Callable[..., Any] | None = None,
    pull: Callable[[PyTree, PyTree], jax.Array] | None = None,
    wrap_optimizer: Callable[[Any, int], Any] = lambda optimizer, total_steps: optimizer,
    step_factory: Callable[..., TrainStep] = make_step,
    updates_per_step: int = 1,
    schedule: schedules.Schedule | None = None,
    **others: Any,
) -> Recipe:
    """Returns the recipe that the settings describe.

    Args:
      config: how long to train, with which optimizer, against what.
      dataset, task, model, metadata: see `Recipe`.
      normalize: `(images, **moments)` -> what the model expects of stored images.
      moments: returns what `normalize` takes by name, such as mean and deviation of the pixels.
      augment, pull: see `cnnjax.train.step.make_step`.
      wrap_optimizer: `(optimizer, total_steps) -> optimizer`.
      step_factory: what takes the arguments of `make_step` in its place.
      updates_per_step: how often a step of that factory updates the parameters.
      schedule: update -> learning rate, in place of the one that the settings describe.
      **others: further fields of the recipe.

    Raises:
      UserError: numbers out of range, or that contradict each other.
    """
    if config.sam < 0:
        raise UserError(f"--sam {config.sam}: give a radius of 0 or more.")
    steps = total_steps(config, dataset)

    def schedule_and_optimizer(
        config: Training,
    ) -> tuple[schedules.Schedule, optax.GradientTransformation]:
        rates = schedule or learning_rate_schedule(config, config.epochs, steps * updates_per_step)
        optimizer = optim.make_optimizer(
            config.optimizer,
            rates,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm if is_on(config.clip_norm) else None,
            max_norm=config.max_norm if is_on(config.max_norm) else None,
        )
        return rates, wrap_optimizer(optimizer, steps)

    def make_step(axis_name: str | None, **numbers: Any) -> TrainStep:
        varied = {name: numbers[name] for name in NUMBERS if name in numbers}
        own = dataclasses.replace(config, **varied)
        rates, optimizer = schedule_and_optimizer(own)
        of_images = {name: numbers[name] for name in numbers if name not in varied} or moments()
        return step_factory(
            model,
            optimizer,
            task,
            schedule=rates,
            normalize=functools.partial(normalize, **of_images),
            augment=augment,
            penalty=weight_penalty(own),
            pull=pull,
            ema_decay=own.ema_decay,
            averaging=averages,
            sam_radius=own.sam,
            accumulate=own.accumulate,
            axis_name=axis_name,
        )

    def numbers() -> dict[str, Any]:
        # A 0 leaves its term out of the program.
        own = {name: getattr(config, name) for name in NUMBERS if is_on(getattr(config, name))}
        return own | {name: np.asarray(value, np.float32) for name, value in moments().items()}

    averages = stochastic_average(config, config.epochs, steps // config.epochs)
    return Recipe(
        dataset=dataset,
        task=task,
        model=model,
        optimizer=schedule_and_optimizer(config)[1],
        make_step=make_step,
        normalize=lambda images: normalize(images, **moments()),
        metadata=metadata,
        ema=is_on(config.ema_decay) or averages is not None,
        recalibrate_batches=config.recalibrate,
        precision=of_platform(config.precision),
        numbers=numbers,
        **others,
    )


def total_steps(config: Run, dataset: AnyDataset) -> int:
    """Returns the number of steps of the whole run: what a schedule must span."""
    return config.epochs * count_steps(split_size(dataset, "train"), config.batch_size)


def learning_rate_schedule(
    config: Optimization, epochs: int, num_updates: int
) -> schedules.Schedule:
    """Returns update -> learning rate."""
    name, options = schedules.read_schedule(config.schedule, config.schedule_arguments)
    if config.cycles != 1 and "cycles" in options:
        raise UserError(
            f"--cycles {config.cycles} and {config.schedule} both say cycles: give one."
        )
    return schedules.make_schedule(
        name,
        config.learning_rate,
        total_steps=num_updates,
        warmup_steps=round(num_updates * config.warmup_epochs / epochs),
        **({"cycles": config.cycles} if config.cycles != 1 else {}),
        **options,
    )


def stochastic_average(
    config: Regularization, epochs: int, steps_per_epoch: int
) -> averaging.Averaging | None:
    """Returns the average of the ends of epochs, or None where it is not asked for."""
    first = config.swa_from_epoch
    if not first:
        return None
    if is_on(config.ema_decay):
        raise UserError("--swa-from-epoch and --ema-decay are two averages: give one.")
    if not 1 <= first <= epochs:
        raise UserError(
            f"--swa-from-epoch {first}: give an epoch from 1 to {epochs}, or more --epochs."
        )
    return averaging.stochastic(first * steps_per_epoch, steps_per_epoch)


def weight_penalty(config: Regularization) -> Callable[[PyTree], jax.Array] | None:
    """Returns `params -> scalar`, or None where there is none."""
    if not (is_on(config.l1) or is_on(config.l2)):
        return None
    return lambda params: (
        config.l1 * losses.l1_penalty(params) + config.l2 * losses.l2_penalty(params)
    )
