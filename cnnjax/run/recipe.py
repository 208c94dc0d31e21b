"""What an experiment chooses (model, loss, optimizer, step), and the initial training state."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax

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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an experiment decides.

    Attributes:
      dataset: training, validation and test examples, in memory or on disk.
      task: what the network is to find; also what is measured and reported.
      model: a Linen module with the contract of `cnnjax.models`.
      optimizer: an Optax transformation.
      make_step: axis name -> training step, such as `make_step` of `cnnjax.train.step` with all
        else bound.
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
    """

    dataset: AnyDataset
    task: Task
    model: nn.Module
    optimizer: optax.GradientTransformation
    make_step: Callable[[str | None], TrainStep]
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
    normalize: Callable[[jax.Array], jax.Array] = as_float,
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
      dataset, task, model, metadata, normalize: see `Recipe`.
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
    schedule = schedule or learning_rate_schedule(config, config.epochs, steps * updates_per_step)
    optimizer = optim.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm if is_on(config.clip_norm) else None,
        max_norm=config.max_norm if is_on(config.max_norm) else None,
    )
    optimizer = wrap_optimizer(optimizer, steps)
    averages = stochastic_average(config, config.epochs, steps // config.epochs)
    return Recipe(
        dataset=dataset,
        task=task,
        model=model,
        optimizer=optimizer,
        make_step=lambda axis_name: step_factory(
            model,
            optimizer,
            task,
            schedule=schedule,
            normalize=normalize,
            augment=augment,
            penalty=weight_penalty(config),
            pull=pull,
            ema_decay=config.ema_decay,
            averaging=averages,
            sam_radius=config.sam,
            accumulate=config.accumulate,
            axis_name=axis_name,
        ),
        normalize=normalize,
        metadata=metadata,
        ema=is_on(config.ema_decay) or averages is not None,
        recalibrate_batches=config.recalibrate,
        precision=of_platform(config.precision),
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
