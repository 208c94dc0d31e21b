"""The state that a run starts from: new, a function of its seed, or that of a checkpoint."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cnnjax import checkpoint
from cnnjax.checkpoint import directories
from cnnjax.data.streamed import AnyDataset, example_forms
from cnnjax.devices import backend, processes
from cnnjax.devices.sharding import Rules, placed_form, splits_parameters, state_shardings
from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.run import record
from cnnjax.run.recipe import Recipe
from cnnjax.run.settings import Settings
from cnnjax.train.state import TrainState, create_state, training_key

PyTree = Any


def start_or_resume(
    directory: Path, config: Settings, checksums: dict[str, str], state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the run's newest good state and its notes, or the given state and no notes.

    Args:
      directory: of the run.
      config: the settings.
      checksums: `data_checksum`, `base_checksum` and `teacher_checksum`: of the dataset, of the
        weights that the run fine-tunes, and of those of its teacher ("" where it has none).
      state: of step 0; its frozen arrays stay as they are.

    Raises:
      UserError: the disk is too small, all checkpoints are damaged, or they were saved with other
        data, another base or other settings.
    """
    checkpoints = directory / "checkpoints"
    # One more than is kept: a step is written before an old one is deleted.
    kept = (config.keep_last or 2) + config.keep_best
    checkpoint.check_space(checkpoints, (kept + 1) * checkpoint.state_bytes(state))
    if config.resume:
        # Before the checkpoint, of which other data would only say that its shapes do not fit.
        _check_same(checksums | _recorded_checksum(directory), checksums, directory)
    # A damaged step counts: to start again instead, and delete it, is for the user to decide.
    found = bool(config.resume) and bool(directories.listed(checkpoints))
    if not processes.from_first("resume", found):
        _clean(checkpoints)
        if config.resume:
            processes.say(f"resumed      {directory} at step 0: it had saved no checkpoint yet")
        return state, {}
    state, notes = checkpoint.restore(checkpoints, state, warn=_warn)
    _check_same(notes, checksums, directory)
    record.check_settings(notes["settings"], config)
    _clean(checkpoints, after=int(state.step))
    processes.say(f"resumed      {directory} at step {int(state.step)}")
    return state, notes


def _recorded_checksum(directory: Path) -> dict[str, Any]:
    """Returns the checksum of the data that the run was started with, if it is known."""
    if not (directory / "config.json").exists():
        return {}
    checksum = record.read_config(directory).get("data_checksum")
    return {"data_checksum": checksum} if checksum else {}


def _check_same(notes: dict[str, Any], checksums: dict[str, str], directory: Path) -> None:
    for name, what, remedy in (
        ("data_checksum", "data are", "dataset and --data-dir"),
        ("base_checksum", "base's weights are", "--base"),
        ("teacher_checksum", "teacher's weights are", "--teacher"),
    ):
        saved, given = notes.get(name, ""), checksums.get(name, "")
        if saved != given:
            raise UserError(
                f"the {what} not those of {directory} (checksum {given[:12]}, the run's "
                f"{saved[:12]}): resume with the same {remedy}."
            )


def _clean(checkpoints: Path, after: int | None = None) -> None:
    processes.exchange("before cleaning", None)
    if processes.is_first():
        checkpoint.clean(checkpoints, after=after)


def _warn(text: str) -> None:
    if processes.is_first():
        print(f"warning: {text}", file=sys.stderr)


def initial_state(recipe: Recipe, seed: int, variables: PyTree | None = None) -> TrainState:
    """Returns the state of step 0: a function of the seed, and of `variables` where it has any.

    Where it has none it draws them, which takes long unless it is compiled: see `new_state`.
    """
    if variables is None:
        init_key = stream_key(jax.random.key(seed), "init", 0)
        variables = (recipe.init or functools.partial(_init, recipe))(init_key)
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


def state_form(recipe: Recipe, seed: int, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s that lie on the mesh as training keeps them."""
    form = jax.eval_shape(functools.partial(initial_state, recipe, seed), recipe.variables)
    return jax.tree.map(placed_form, form, state_shardings(form, mesh, rules))


def new_state(recipe: Recipe, seed: int, mesh: Mesh, rules: Rules = ()) -> TrainState:
    """Returns the state of step 0; where the mesh divides it, each device makes its part."""
    variables = recipe.variables
    if not splits_parameters(mesh):
        init = backend.jit_once(functools.partial(initial_state, recipe, seed))
        # Copies, because the step takes the memory of its input.
        return init(jax.tree.map(jnp.array, variables))
    places = jax.tree.map(lambda leaf: leaf.sharding, state_form(recipe, seed, mesh, rules))
    if variables is not None:
        variables = {
            name: processes.put(tree, getattr(places, name)) for name, tree in variables.items()
        }
    init = backend.jit_once(functools.partial(initial_state, recipe, seed), out_shardings=places)
    return init(variables)
