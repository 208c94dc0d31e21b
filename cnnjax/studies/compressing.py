"""A run made smaller: what is taken out, trained again, and written as a run like any other."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

import cnnjax
from cnnjax import checkpoint, compress, finetune
from cnnjax.checkpoint import directories
from cnnjax.compress import blocks, channels, couplings, gradual, masks, named, sensitivity
from cnnjax.compress.low_rank import Factored
from cnnjax.data.streamed import split_batches, split_size
from cnnjax.errors import UserError
from cnnjax.models.reshaped import ARGUMENT, changes_of
from cnnjax.run import again, classifier, load, record, scoring, trainer
from cnnjax.run import state as states
from cnnjax.run.recipe import Recipe
from cnnjax.train.predict import predicted_outputs
from cnnjax.trees import mask_by_path, named_leaves

PyTree = Any
ROUNDS = "rounds"
SPLITS = ("validation", "test")
TAYLOR_BATCHES, TAYLOR_BATCH = 16, 64


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """The settings of a compressed run: those of its training, and what was done before."""

    experiment: ClassVar[str] = "cnnjax compress"

    source: str = ""
    """The run that is compressed."""

    base: str = ""
    """Where the base of a fine-tuned source is."""

    prune: str = ""
    """What is pruned."""

    low_rank: str = ""
    """What is factored."""

    rounds: int = 1
    """Rounds of pruning and training."""

    rewind: str = ""
    """Where the weights go back to before they are trained again."""

    dense: bool = False
    """Whether zeros are stored."""


@dataclasses.dataclass(frozen=True)
class Smaller:
    """A network on its way.

    Attributes:
      model, variables: as it is now.
      factored: what became of the layers, where they were to be factored.
      weights: how single weights are pruned; None: not at all.
      rewound: what the weights go back to; None: they stay.
    """

    model: Any
    variables: PyTree
    factored: tuple[Factored, ...] = ()
    weights: gradual.Pruning | None = None
    rewound: PyTree | None = None


def settings_of(source: load.TrainedModel, directory: str) -> classifier.Config:
    """Returns the settings with which a run's images are read and its network trained."""
    card = source.card
    saved = record.read_config(Path(directory))
    if saved["experiment"] == "cnnjax.convert":
        found = classifier.Config(image_size=card["image_shape"][0], dataset="")
    else:
        found = again.settings_of_run(directory)
        found = dataclasses.replace(found, dataset=saved["settings"].get("dataset", ""))
    return dataclasses.replace(
        found, preprocess=card.get("preprocess", ""), fit=card.get("fit", "pad"), model_arguments=()
    )


def check_source(source: load.TrainedModel, directory: str) -> None:
    """Raises a UserError for a network that cannot be compressed as it is."""
    if "frozen" in source.variables:
        raise UserError(
            f"{directory} is a model with adapters, which are no layers of the network: compress "
            f"its base, {source.card['finetune']['base']}, and fine-tune that."
        )
    if "quantize" in source.card:
        raise UserError(
            f"{directory} is quantized: compress what it was made from, "
            f"{source.card['quantize']['source']}, and give --quantize too."
        )


def check_patterns(source: load.TrainedModel, steps: list[named.Step]) -> None:
    """Raises a UserError for a pattern that matches nothing; the nearest names are told."""
    leaves = named_leaves(source.variables["params"])
    for step in steps:
        if isinstance(step, named.Weights):
            masks.prunable(source.variables["params"], step.pruning.layers)
        if isinstance(step, named.Channels):
            layers = {path.rpartition("/")[0]: 0 for path in leaves if path.endswith("/kernel")}
            mask_by_path(layers, [step.layers])


def make_recipe(
    config: classifier.Config, dataset: Any, model: Any, card: dict[str, Any], **others: Any
) -> Recipe:
    """Returns the recipe of a network on the images of a run."""
    # A schedule spans at least one epoch, though none be trained.
    config = dataclasses.replace(config, epochs=max(1, config.epochs))
    return classifier.make_recipe(config, dataset, model, card, **others)


def scores_of(recipe: Recipe, variables: PyTree, splits: tuple[str, ...]) -> dict[str, Any]:
    """Returns the scores of a network on the splits that have examples."""
    found = _scoring(recipe)
    return {
        split: found.of(variables, split) for split in splits if split_size(recipe.dataset, split)
    }


def _scoring(recipe: Recipe) -> scoring.Scoring:
    mesh = cnnjax.devices.sharding.make_mesh(1)
    return scoring.make_scoring(recipe, mesh, lambda state: state.variables())


def _judged_split(recipe: Recipe) -> str:
    """`validation`, or `train` where no images are held out."""
    return "validation" if split_size(recipe.dataset, "validation") else "train"


def reshape(
    source: load.TrainedModel,
    steps: list[named.Step],
    low_rank: dict[str, Any],
    recipe_of: Callable[[Any], Recipe] | None,
    *,
    seed: int,
    scan: sensitivity.Scan | None = None,
) -> Smaller:
    """Takes out of a network what is to go before it is trained again.

    Args:
      source: the network.
      steps: what is pruned, in order.
      low_rank: arguments of `compress.decompose`; {} does not factor.
      recipe_of: model -> recipe with the images; None where they are not known.
      seed: of what is random.
      scan: what each layer bears, for steps that go by it.
    """
    now = Smaller(source.model, source.variables)
    height, width, depth = source.card["image_shape"]
    shape = (height, width, depth)
    for step in steps:
        if isinstance(step, named.Channels):
            now = _without_channels(now, step, shape, recipe_of, seed)
        elif isinstance(step, named.Blocks):
            now = _without_blocks(now, step, source, recipe_of)
        else:
            pruning = dataclasses.replace(step.pruning, seed=seed)
            if step.by_sensitivity:
                pruning = _by_sensitivity(pruning, now.variables["params"], scan or {})
            now = dataclasses.replace(now, weights=pruning)
    if low_rank:
        model, variables, report = compress.decompose(now.model, now.variables, shape, **low_rank)
        now = dataclasses.replace(now, model=model, variables=variables, factored=tuple(report))
    return now


def _without_channels(
    now: Smaller,
    step: named.Channels,
    shape: tuple[int, int, int],
    recipe_of: Callable[[Any], Recipe] | None,
    seed: int,
) -> Smaller:
    coupled = compress.trace(now.model, shape)
    if step.norm in ("l1", "l2"):
        scores = channels.norm_scores(coupled, now.variables, int(step.norm[1]))
    elif step.norm == "batchnorm":
        scores = channels.scale_scores(coupled, now.variables)
    elif step.norm == "taylor":
        scores = channels.taylor_scores(coupled, now.variables, _gradients(now, recipe_of))
    else:
        scores = channels.random_scores(coupled, jax.random.key(seed))
    wanted = {
        one: score
        for one, score in scores.items()
        if all(
            re.fullmatch(step.layers, couplings.layer_of(path))
            for (path, _), _ in coupled.producers(one)
        )
    }
    budget = channels.Budget(now.model, shape, coupled)
    removed = channels.choose(
        coupled, budget, wanted, macs=step.macs, scope=step.scope, multiple=step.multiple
    )
    smaller = channels.remove(now.model, now.variables, shape, coupled, removed)
    return dataclasses.replace(now, model=smaller.model, variables=smaller.variables)


def _without_blocks(
    now: Smaller,
    step: named.Blocks,
    source: load.TrainedModel,
    recipe_of: Callable[[Any], Recipe] | None,
) -> Smaller:
    height, width, depth = source.card["image_shape"]
    image = jax.random.normal(jax.random.key(0), (8, height, width, depth))
    if recipe_of is not None:
        recipe = recipe_of(now.model)
        image = recipe.normalize(next(_batches(recipe))["image"])
    changes = blocks.removable(now.model, now.variables, image)
    shape = (height, width, depth)
    paths = blocks.choose(now.model, changes, shape, count=step.count, macs=step.macs)
    smaller = blocks.remove(now.model, now.variables, shape, paths)
    return dataclasses.replace(now, model=smaller.model, variables=smaller.variables)


def _batches(recipe: Recipe) -> Any:
    """Yields batches of validation images, or of training images where there are none."""
    return split_batches(recipe.dataset, _judged_split(recipe), TAYLOR_BATCH)


def _gradients(now: Smaller, recipe_of: Callable[[Any], Recipe] | None) -> list[PyTree]:
    """Returns the gradients of the loss on a few batches."""
    if recipe_of is None:
        raise UserError("norm=taylor needs images of the run: name them with --dataset.")
    recipe = recipe_of(now.model)

    def loss(params: PyTree, batch: Any) -> jax.Array:
        outputs = predicted_outputs(
            now.model,
            recipe.task,
            {**now.variables, "params": params},
            batch,
            normalize=recipe.normalize,
        )
        values, weights = recipe.task.loss(outputs, batch)
        total, count = cnnjax.metrics.mean(values, weights)
        return total / count

    gradient = jax.jit(jax.grad(loss))
    batches = itertools.islice(_batches(recipe), TAYLOR_BATCHES)
    return [jax.device_get(gradient(now.variables["params"], batch)) for batch in batches]


def _by_sensitivity(
    pruning: gradual.Pruning, params: PyTree, scan: sensitivity.Scan
) -> gradual.Pruning:
    sizes = {path: leaf.size for path, leaf in masks.prunable(params, pruning.layers).items()}
    if scan.keys() != sizes.keys():
        raise UserError(
            "scope=sensitivity takes what was scanned, and channels or blocks change that: give "
            "it alone."
        )
    rates = sensitivity.rates(scan, sizes, pruning.sparsity)
    found = tuple((re.escape(path), rate) for path, rate in rates.items())
    return dataclasses.replace(pruning, rates=found)


def scan_layers(recipe: Recipe, variables: PyTree, layers: str) -> sensitivity.Scan:
    """Returns the accuracy on validation images with each layer alone pruned by magnitude."""
    found, split = _scoring(recipe), _judged_split(recipe)
    return sensitivity.scan(
        variables, lambda variables: found.of(variables, split)["accuracy"], layers=layers
    )


def rewound(directory: str, source: load.TrainedModel, recipe: Recipe, to: str) -> PyTree:
    """Returns the variables of a run as they were early in its training.

    Args:
      directory: of the run.
      source: what was read of it.
      recipe: of its network.
      to: `init`, its initial values; or a step of which it keeps a checkpoint.

    Raises:
      UserError: there is no such step, or the run did not start from initial values of its seed.
    """
    if to != "init":
        kept = checkpoint.steps(Path(directory) / "checkpoints")
        if not to.isdecimal() or int(to) not in kept:
            raise UserError(
                f"--rewind {to}: {directory} keeps the steps {', '.join(map(str, kept))}; give one "
                "of these, or init. --keep-last 0 keeps all while training."
            )
        return load.load_variables(directory, int(to))[0]
    started_elsewhere = {"finetune", "compression"} & source.card.keys()
    seed = record.read_config(Path(directory))["settings"].get("seed")
    if started_elsewhere or seed is None:
        raise UserError(
            f"--rewind init: {directory} did not start from initial values of a seed: give a step."
        )
    mesh = cnnjax.devices.sharding.make_mesh(1)
    state = states.new_state(dataclasses.replace(recipe, variables=None), seed, mesh)
    return {"params": state.params, "batch_stats": state.batch_stats}


def with_weights(now: Smaller, start: PyTree) -> tuple[PyTree, masks.Masks]:
    """Returns rewound variables and the masks that stay while they are trained.

    Frankle & Carbin 2019, "The Lottery Ticket Hypothesis" (arXiv 1803.03635), section 1; rewinding
    to a later step: Frankle et al. 2020 (arXiv 1912.05671).
    """
    assert now.weights is not None
    kept = gradual.at_once(now.weights, now.variables["params"])
    return {**start, "params": masks.apply(start["params"], kept)}, kept


def train(config: Config, dataset: Any, now: Smaller, card: dict[str, Any], checksum: str) -> int:
    """Trains a smaller network into `config.run_dir`; returns the exit code."""
    others: dict[str, Any] = {"variables": now.variables, "base_checksum": checksum}
    if now.weights is not None:
        pruning, kept = now.weights, None
        if now.rewound is not None:
            others["variables"], kept = with_weights(now, now.rewound)
        others |= {
            "wrap_optimizer": lambda optimizer, total_steps: gradual.prune_while_training(
                optimizer, pruning, total_steps, masks=kept
            ),
            "step_factory": gradual.step_factory(cnnjax.train.step.make_step),
        }
    recipe = make_recipe(config, dataset, now.model, card, **others)
    return trainer.train(config, recipe)


def pruned_at_once(now: Smaller) -> PyTree:
    """Returns the variables of a network that is not trained again."""
    if now.weights is None:
        return now.variables
    kept = gradual.at_once(now.weights, now.variables["params"])
    return {**now.variables, "params": masks.apply(now.variables["params"], kept)}


def new_card(source: load.TrainedModel, model: Any) -> dict[str, Any]:
    """Returns what `model.json` says of a network: the source's, with the layers that changed."""
    left_out = ("finetune", "part", "compression")
    card = {name: value for name, value in source.card.items() if name not in left_out}
    arguments = {k: v for k, v in card["arguments"].items() if k != ARGUMENT}
    changes = changes_of(model)
    return {**card, "arguments": {**arguments, **({ARGUMENT: changes} if changes else {})}}


def seal(directory: Path, step: int, variables: PyTree, *, sparse: bool) -> None:
    """Leaves one checkpoint of a run, with nothing but the network, sparse where that is smaller.

    What training kept besides (its optimizer, averages, other steps) goes.
    """
    host = jax.tree.map(np.asarray, variables)
    state = {
        "step": np.asarray(step, np.int32),
        "params": host["params"],
        "batch_stats": host.get("batch_stats", {}),
        "ema": None,
    }
    checkpoints = directory / "checkpoints"
    written = checkpoint.save(checkpoints, state, {"step": step}, sparse=sparse)
    for _, _, path in directories.listed(checkpoints):
        if path != written:
            directories.delete(path)
    for _, _, path in directories.listed(directory / load.RECALIBRATED):
        directories.delete(path)


def bytes_of(directory: Path, step: int) -> int:
    """Returns the size on disk of a network's parameters and statistics in a checkpoint."""
    path = directories.whole(directory / "checkpoints")[step]
    names = ("ema" if (path / "ema").exists() else "params", "batch_stats")
    files = [file for name in names for file in (path / name).rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def checksum_of(source: load.TrainedModel) -> str:
    """Returns the digest of a network's variables, without which no checkpoint is resumed."""
    return finetune.variables_checksum(source.variables)
