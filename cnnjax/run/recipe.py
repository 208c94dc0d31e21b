"""What an experiment chooses (model, loss, optimizer, step), and the initial training state."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cnnjax.data.dataset import Dataset
from cnnjax.data.streamed import StreamedDataset
from cnnjax.devices import processes
from cnnjax.devices.sharding import Rules, placed_form, splits_parameters, state_shardings
from cnnjax.rng import stream_key
from cnnjax.train import compile as parallel
from cnnjax.train.state import TrainState, create_state
from cnnjax.train.step import EvalStep, LossFunction, TrainStep, make_eval_step

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an experiment decides.

    Attributes:
      dataset: training, validation and test images, in memory or on disk.
      model: a Linen module with the contract of `cnnjax.models`.
      optimizer: an Optax transformation.
      make_step: axis name -> training step of that model and optimizer.
      loss_fn: the loss for validation and test.
      normalize: stored images -> what the model expects.
      card: what `run.load.load_trained` needs to build the model again: `model`, `arguments`.
      ema: whether the state keeps an average of the parameters.
      recalibrate_batches: training batches on which BatchNorm's statistics are recomputed for
        validation and test, see `cnnjax.train.batch_stats`; 0 takes the running ones.
      precision: what the model computes in; float16 gives the state a loss scale.
      variables: what training starts from, on the host: `params`, `batch_stats` and `frozen` of
        the model; None initializes the model.
      base_checksum: digest of the weights that `variables` come from, without which no checkpoint
        of the run is read; "" where it starts from none.
      make_eval_step: `(axis_name, split=...)` -> evaluation step, where there is more to measure on
        `validation` or `test` than `train.step.make_eval_step` does.
    """

    dataset: Dataset | StreamedDataset
    model: nn.Module
    optimizer: optax.GradientTransformation
    make_step: Callable[[str | None], TrainStep]
    loss_fn: LossFunction
    normalize: Callable[[jax.Array], jax.Array]
    card: dict[str, Any]
    ema: bool = False
    recalibrate_batches: int = 0
    precision: str = "float32"
    variables: PyTree | None = None
    base_checksum: str = ""
    make_eval_step: Callable[..., EvalStep] | None = None


def initial_state(recipe: Recipe, seed: int, variables: PyTree | None = None) -> TrainState:
    """Returns the state of step 0: a function of the seed, and of `variables` where it has any."""
    image = jnp.zeros((1, *recipe.dataset.image_shape), jnp.uint8)
    key = jax.random.key(seed)
    init = functools.partial(recipe.model.init, train=False)
    if variables is None:
        init_key = stream_key(key, "init", 0)
        variables = jax.jit(lambda key: init(key, recipe.normalize(image)))(init_key)
    kept: dict[str, Any] = {"ema": recipe.ema, "precision": recipe.precision}
    return create_state(variables, recipe.optimizer, training_key(seed), **kept)


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
        return {split: parallel.compile_eval(make, mesh) for split, make in makers.items()}

    def make(axis_name: str | None) -> EvalStep:
        return make_eval_step(
            recipe.model,
            recipe.loss_fn,
            num_classes=recipe.dataset.num_classes,
            normalize=recipe.normalize,
            axis_name=axis_name,
        )

    return dict.fromkeys(splits, parallel.compile_eval(make, mesh))
