"""What an experiment chooses (model, loss, optimizer, step), and the initial training state."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cnnjax import losses, optim, schedules
from cnnjax.data.streamed import AnyDataset, example_forms, split_size
from cnnjax.devices import processes
from cnnjax.devices.sharding import Rules, placed_form, splits_parameters, state_shardings
from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.run.groups import Optimization, Regularization, Training
from cnnjax.run.settings import Run
from cnnjax.tasks.task import Task
from cnnjax.train import averaging
from cnnjax.train.evaluate import compile_eval
from cnnjax.train.predict import EvalStep, as_float, make_eval_step
from cnnjax.train.state import TrainState, create_state
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
    make_eval_step: Callable[..., EvalStep] | None = None
    init: Callable[[jax.Array], PyTree] | None = None
    make_state: Callable[[PyTree, jax.Array], TrainState] | None = None
    after_validation: Callable[[Path, TrainState], None] | None = None


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
        clip_norm=config.clip_norm or None,
        max_norm=config.max_norm or None,
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
        ema=config.ema_decay > 0 or averages is not None,
        recalibrate_batches=config.recalibrate,
        precision=config.precision,
        **others,
    )


def total_steps(config: Run, dataset: AnyDataset) -> int:
    """Returns the number of steps of the whole run: what a schedule must span."""
    num_examples = split_size(dataset, "train")
    steps_per_epoch = num_examples // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"batch size {config.batch_size} is larger than the {num_examples} training images: "
            "use a smaller one."
        )
    return config.epochs * steps_per_epoch


def learning_rate_schedule(
    config: Optimization, epochs: int, num_updates: int
) -> schedules.Schedule:
    """Returns update -> learning rate."""
    name, options = schedules.read_schedule(config.schedule, config.schedule_arguments)
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
    if config.ema_decay:
        raise UserError("--swa-from-epoch and --ema-decay are two averages: give one.")
    if not 1 <= first <= epochs:
        raise UserError(
            f"--swa-from-epoch {first}: give an epoch from 1 to {epochs}, or more --epochs."
        )
    return averaging.stochastic(first * steps_per_epoch, steps_per_epoch)


def weight_penalty(config: Regularization) -> Callable[[PyTree], jax.Array] | None:
    """Returns `params -> scalar`, or None where there is none."""
    if not (config.l1 or config.l2):
        return None
    return lambda params: (
        config.l1 * losses.l1_penalty(params) + config.l2 * losses.l2_penalty(params)
    )


def initial_state(recipe: Recipe, seed: int, variables: PyTree | None = None) -> TrainState:
    """Returns the state of step 0: a function of the seed, and of `variables` where it has any."""
    if variables is None:
        init_key = stream_key(jax.random.key(seed), "init", 0)
        variables = jax.jit(recipe.init or functools.partial(_init, recipe))(init_key)
    if recipe.make_state is not None:
        return recipe.make_state(variables, training_key(seed))
    kept: dict[str, Any] = {"ema": recipe.ema, "precision": recipe.precision}
    return create_state(variables, recipe.optimizer, training_key(seed), **kept)


def _init(recipe: Recipe, key: jax.Array) -> PyTree:
    return recipe.model.init(key, model_input(recipe), train=False)


def first_input(dataset: AnyDataset) -> tuple[str, tuple[int, ...]]:
    """Returns the first key that the model gets, and the shape of one example of it."""
    name = next(name for name, field in dataset.fields.items() if field.is_input)
    return name, example_forms(dataset)[name][0]


def model_input(recipe: Recipe) -> jax.Array:
    """Returns one example of the first key that the model gets, of zeros, as the model gets it."""
    fields = recipe.dataset.fields
    name, _ = first_input(recipe.dataset)
    shape, dtype = example_forms(recipe.dataset)[name]
    example = jnp.zeros((1, *shape), dtype)
    return recipe.normalize(example) if fields[name].moves == "image" else example


def training_key(seed: int) -> jax.Array:
    """Returns the `TrainState.key` of a run: all randomness of its steps comes from it."""
    return stream_key(jax.random.key(seed), "train", 0)


def state_form(recipe: Recipe, seed: int, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s that lie on the mesh as training keeps them."""
    form = jax.eval_shape(functools.partial(initial_state, recipe, seed), recipe.variables)
    return jax.tree.map(placed_form, form, state_shardings(form, mesh, rules))


def new_state(recipe: Recipe, seed: int, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Returns the state of step 0; where the mesh divides it, each device makes its part."""
    variables = recipe.variables
    if not splits_parameters(mesh):
        # Copies, because the step takes the memory of its input.
        return initial_state(recipe, seed, jax.tree.map(jnp.array, variables))
    places = jax.tree.map(lambda leaf: leaf.sharding, state_form(recipe, seed, mesh, rules))
    if variables is not None:
        variables = {
            name: processes.put(tree, getattr(places, name)) for name, tree in variables.items()
        }
    init = jax.jit(functools.partial(initial_state, recipe, seed), out_shardings=places)
    return init(variables)


def compile_eval_steps(recipe: Recipe, mesh: Mesh) -> dict[str, EvalStep]:
    """Returns the compiled steps for `validation` and `test`: the same, or the recipe's own."""
    splits, make_own = ("validation", "test"), recipe.make_eval_step
    if make_own is not None:
        makers = {split: functools.partial(make_own, split=split) for split in splits}
        return {split: compile_eval(make, mesh) for split, make in makers.items()}

    def make(axis_name: str | None) -> EvalStep:
        return make_eval_step(
            recipe.model, recipe.task, normalize=recipe.normalize, axis_name=axis_name
        )

    return dict.fromkeys(splits, compile_eval(make, mesh))
