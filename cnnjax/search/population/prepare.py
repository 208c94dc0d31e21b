"""What a population needs of an experiment: its members' data, numbers and settings, checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax import models
from cnnjax.data.dataset import Dataset
from cnnjax.data.pipelines import count_steps
from cnnjax.devices import backend
from cnnjax.errors import UserError
from cnnjax.run import checks, classifier, record
from cnnjax.run import state as states
from cnnjax.run.recipe import Recipe
from cnnjax.run.scoring import monitored
from cnnjax.run.writer import model_card
from cnnjax.search.population import varied
from cnnjax.search.population.examples import Collected, Rows
from cnnjax.search.population.varied import Member
from cnnjax.train.predict import make_eval_step
from cnnjax.train.state import TrainState

PyTree = Any
# Settings of runs that are trained apart.
NOT_OF_MEMBERS = (
    "recalibrate",
    "save_every_steps",
    "stop_after_epochs",
    "plan",
    "mesh",
    "track",
    "profile",
)
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment's members, before the first step.

    Attributes:
      experiment: the module's name.
      config: its settings, without what varies.
      members: who they are.
      configs: the settings of each member's run.
      dataset: the first member's; the others have as many images and the same classes.
      arrays: all images and labels, each once.
      rows: of each member's splits.
      checksums: of each member's data.
      moments: mean and deviation of each member's training images.
      leaves: the settings that are arguments of the program.
      build: `values -> Recipe`, of one member's numbers, which may be traced: `settings` by name,
        `mean` and `std`.
    """

    experiment: str
    config: Any
    members: tuple[Member, ...]
    configs: tuple[Any, ...]
    dataset: Dataset
    arrays: dict[str, np.ndarray]
    rows: tuple[Rows, ...]
    checksums: tuple[str, ...]
    moments: tuple[tuple[Any, Any], ...]
    leaves: tuple[str, ...]
    build: Callable[[PyTree], Recipe]

    @functools.cached_property
    def monitor(self) -> tuple[str, bool]:
        """The score that members are compared by, and whether less of it is better."""
        return monitored(self.config, self.recipe(0))

    @property
    def steps_per_epoch(self) -> int:
        """The same for all members."""
        return count_steps(len(self.rows[0]["train"]), self.config.batch_size)

    def values(self, member: int, chosen: Any = None) -> PyTree:
        """Returns the numbers of a member, with other settings if they are given."""
        chosen = self.members[member].chosen if chosen is None else chosen
        mean, std = (np.asarray(each, np.float32) for each in self.moments[member])
        settings = {name: np.asarray(float(chosen[name])) for name in self.leaves}
        return {"settings": _as_default_float(settings), "mean": mean, "std": std}

    def recipe(self, member: int, chosen: Any = None) -> Recipe:
        """Returns a member's own recipe, of plain numbers, as its own run has it."""
        config = self.configs[member]
        if chosen is not None:
            config = varied.config_of(
                self.config, dataclasses.replace(self.members[member], chosen=chosen)
            )
        mean, std = self.moments[member]
        dataset = dataclasses.replace(self.dataset, mean=mean, std=std)
        return _recipe(config, dataset)

    def card(self, member: int) -> dict[str, Any]:
        """Returns a member's `model.json`."""
        return model_card(self.recipe(member))

    def step(self, values: PyTree, state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
        """The training step of a member of these numbers."""
        return self.build(values).make_step(None)(state, batch)

    def evaluate(self, values: PyTree, variables: PyTree, batch: PyTree) -> PyTree:
        """The evaluation step of a member of these numbers."""
        recipe = self.build(values)
        step = make_eval_step(recipe.model, recipe.task, normalize=recipe.normalize)
        return step(variables, batch)

    def initial_states(self) -> list[TrainState]:
        """Returns each member's state of step 0, that of its own run."""
        initial = backend.jit_once(self.initial)
        seeds = [np.uint32(each.seed) for each in self.members]
        return [initial(self.values(i), seed) for i, seed in enumerate(seeds)]

    def state_form(self) -> TrainState:
        """Returns the state of a member as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(self.initial, self.values(0), np.uint32(0))

    def initial(self, values: PyTree, seed: Any) -> TrainState:
        """The state of step 0 of a member of these numbers."""
        return states.initial_state(self.build(values), seed)


def prepare(module: Any, config: Any, members: Sequence[Member], directory: Path) -> Prepared:
    """Reads the members' data and checks everything, in seconds.

    Args:
      module: of the experiment.
      config: its settings; texts may have names in braces that vary.
      members: of `varied.draw_members`.
      directory: where the members' runs are to be.

    Raises:
      UserError: whatever is wrong.
    """
    _check_experiment(module, config)
    if not members:
        raise UserError("a population of 0 members: give at least 1, or other --where.")
    names = list(members[0].chosen)
    leaves = varied.leaves_of(names, config)
    configs = [
        dataclasses.replace(
            varied.config_of(config, each), run_dir=str(directory / f"{each.number:03}")
        )
        for each in members
    ]
    for own in configs:
        checks.check_specs(own)
    varied.check_switches(configs)
    collected, checksums, moments, datasets = _read(configs)
    dataset = datasets[0]
    checks.check_retention(config, dataset)
    checks.check_length(configs[0], 0, count_steps(len(dataset.train.label), config.batch_size))
    # One program: of all members alike.
    precision = model_of(configs[0], dataset)[1]["precision"]
    config, *configs = (
        dataclasses.replace(each, precision=precision) for each in (config, *configs)
    )
    prepared = Prepared(
        experiment=record.experiment_name(module.Config),
        config=config,
        members=tuple(members),
        configs=tuple(configs),
        dataset=dataset,
        arrays=collected.arrays(),
        rows=tuple(collected.rows),
        checksums=tuple(checksums),
        moments=tuple(moments),
        leaves=leaves,
        build=_builder(config, configs[0], dataset),
    )
    for member in range(len(members)):
        prepared.recipe(member)  # It refuses numbers out of range.
    _check_program(prepared)
    return prepared


def model_of(config: Any, dataset: Dataset) -> tuple[Any, dict[str, Any]]:
    """Returns the model of an experiment's settings and what it takes to build it again."""
    name, arguments = models.read_model(config.model, config.model_arguments)
    return classifier.make_model(config, name, arguments, dataset)


def _recipe(config: Any, dataset: Dataset) -> Recipe:
    return classifier.make_recipe(config, dataset, *model_of(config, dataset))


def _builder(config: Any, first: Any, dataset: Dataset) -> Callable[[PyTree], Recipe]:
    """Returns `values -> Recipe`; what is no leaf is the same in all members."""
    model, card = model_of(first, dataset)

    def build(values: PyTree) -> Recipe:
        own = varied.with_values(config, values["settings"])
        data = dataclasses.replace(dataset, mean=values["mean"], std=values["std"])
        return classifier.make_recipe(own, data, model, card)

    return build


def _check_experiment(module: Any, config: Any) -> None:
    if module.main is not classifier.main:
        raise UserError(
            f"{module.__name__} trains by a main of its own, which no program can be made of: take "
            "an experiment of classification, such as experiments.mnist_lenet; or compose "
            "cnnjax.search.population with its step."
        )
    for name in NOT_OF_MEMBERS:
        if getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: members of a population are trained without it; drop it.")
    if config.pipeline == "stream":
        raise UserError("--pipeline stream: members share data in memory; drop it.")


def _read(configs: Sequence[Any]) -> tuple[Collected, list[str], list[Any], list[Dataset]]:
    """Reads each member's data; those of the same settings of data once."""
    collected, checksums, moments, first = Collected(), [], [], None
    known: dict[tuple, tuple[Rows, str, Any]] = {}
    for number, config in enumerate(configs):
        key = (classifier.data_seed(config), config.label_noise, config.fold)
        if key not in known:
            dataset = classifier.read_data(config)
            if not isinstance(dataset, Dataset):
                raise UserError(
                    f"{config.dataset} is streamed from disk, and members share data in memory: "
                    "give --pipeline resident, if it fits there."
                )
            first = first or dataset
            _check_alike(first, dataset, number)
            rows = collected.add({split: getattr(dataset, split) for split in SPLITS})
            collected.rows.pop()
            known[key] = rows, dataset.checksum, (dataset.mean, dataset.std)
        rows, checksum, moment = known[key]
        collected.rows.append(rows)
        checksums.append(checksum)
        moments.append(moment)
    assert first is not None
    if len(known) > 1 and configs[0].balance == "weights":
        raise UserError(
            "--balance weights: members have other training images, and so other weights; give "
            "them the same by --data-seed 0, or take --balance resample."
        )
    return collected, checksums, moments, [first]


def _check_alike(first: Dataset, other: Dataset, number: int) -> None:
    if first.class_names != other.class_names:
        raise UserError(f"members 0 and {number} have other classes: give them the same.")
    for split in SPLITS:
        sizes = [getattr(each, split).image.shape for each in (first, other)]
        same = sizes[0] == sizes[1] if split == "train" else sizes[0][1:] == sizes[1][1:]
        if not same:
            raise UserError(
                f"members 0 and {number} have {split} images of different shapes, {list(sizes[0])} "
                f"and {list(sizes[1])}: the members of one program have as many of the same size."
            )


def _check_program(prepared: Prepared) -> None:
    """Raises a UserError for a setting that varies and cannot, or that does nothing."""
    if not prepared.leaves:
        return
    values = prepared.values(0)
    rest = {name: value for name, value in values.items() if name != "settings"}
    size = prepared.config.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in prepared.arrays.items()
    } | {"mask": jax.ShapeDtypeStruct((size,), bool)}

    def step(settings: PyTree, seed: jax.Array, batch: PyTree) -> PyTree:
        values = {**rest, "settings": settings}
        return prepared.step(values, prepared.initial(values, seed), batch)

    varied.check_leaves(step, values["settings"], np.uint32(0), batch)


def _as_default_float(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf, jax.dtypes.canonicalize_dtype(float)), tree)
