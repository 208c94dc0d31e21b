"""The rounds of a compression: each prunes, trains again, and leaves a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax.compress import named, sensitivity
from cnnjax.errors import UserError
from cnnjax.run import again, classifier, files, load, record, report
from cnnjax.studies import compressed, compressing


def open_images(settings: Any, *, needed: bool) -> Any:
    """Returns the run's data; None where they are not known and not needed."""
    try:
        if not settings.dataset:
            raise UserError(f"{settings.source} does not say what it was trained on.")
        saved = record.read_config(Path(settings.source))["settings"].get("dataset")
        if saved == settings.dataset or (saved and "data_checksum" in saved):
            return again.data_of_run(
                Path(settings.source), dataset=settings.dataset, data_dir=settings.data_dir
            )
        return classifier.read_data(settings)
    except UserError as error:
        if needed:
            raise UserError(f"{error} Name the images with --dataset.") from None
        print(f"note         no scores: {error}")
        return None


def compress(
    settings: Any,
    source: load.TrainedModel,
    dataset: Any,
    steps: list[Any],
    low_rank: dict[str, Any],
    *,
    scan: bool = False,
) -> int:
    """Makes the rounds of a compression; returns the exit code.

    Args:
      settings: with `run_dir`, the directory of the new run; rounds that are finished there stay,
        and one that was stopped goes on.
      source: the network that is compressed.
      dataset: its images; None where they are not known.
      steps: what is pruned.
      low_rank: arguments of `compress.decompose`; {} does not factor.
      scan: whether each layer is pruned alone, scored and drawn.

    Raises:
      UserError: images of another shape, or what cannot be removed.
    """
    if dataset is not None and list(dataset.image_shape) != list(source.card["image_shape"]):
        raise UserError(
            f"{dataset.name} has images of {tuple(dataset.image_shape)}, but {settings.source} "
            f"takes {tuple(source.card['image_shape'])}: name its own with --dataset."
        )
    out = Path(settings.run_dir)
    recipe: Any = None
    if dataset is not None:
        recipe = compressing.make_recipe(settings, dataset, source.model, source.card)
    start = None
    if settings.rewind:
        start = compressing.rewound(settings.source, source, recipe, settings.rewind)
    found = None
    if scan or any(getattr(step, "by_sensitivity", False) for step in steps):
        found = _scan(source, recipe, steps, out)
    if not (steps or low_rank):
        return 0
    before = {} if recipe is None else _scored(recipe, source.variables, "before")
    now = source
    for number in range(1, settings.rounds + 1):
        last = number == settings.rounds
        directory = out if last else out / compressing.ROUNDS / str(number)
        if (directory / "summary.json").exists() and "compression" in now.card | card_of(directory):
            now = load.load_classifier(directory)
            continue
        own = [named.of_round(step, number, settings.rounds) for step in steps]
        resumed = str(directory) if (directory / "config.json").exists() else ""
        of_round = dataclasses.replace(settings, run_dir=str(directory), resume=resumed)
        code = _round(
            of_round,
            (source, now),
            dataset,
            own,
            low_rank if number == 1 else {},
            start,
            found,
            before,
        )
        if code or not (directory / "summary.json").exists():
            return code
        now = load.load_classifier(directory)
    return 0


def card_of(directory: Path) -> dict[str, Any]:
    """Returns the content of a run's `model.json`."""
    return files.read_json(directory / "model.json", f"{directory} is damaged")


def _round(
    settings: Any,
    networks: tuple[load.TrainedModel, load.TrainedModel],
    dataset: Any,
    steps: list[Any],
    low_rank: dict[str, Any],
    start: Any,
    scan: Any,
    before: dict[str, Any],
) -> int:
    """Makes one round; returns the exit code."""
    source, current = networks
    directory = Path(settings.run_dir)

    def recipe_of(model: Any) -> Any:
        return compressing.make_recipe(settings, dataset, model, current.card)

    smaller = compressing.reshape(
        current,
        steps,
        low_rank,
        recipe_of if dataset is not None else None,
        seed=settings.seed,
        scan=scan,
    )
    if start is not None:
        if smaller.model != source.model or smaller.weights is None:
            raise UserError("--rewind is for single weights alone: give magnitude(...) only.")
        smaller = dataclasses.replace(smaller, rewound=start)
    card = compressing.new_card(current, smaller.model)
    if settings.epochs:
        print(f"compressed   {settings.prune} {settings.low_rank}".rstrip())
        code = compressing.train(settings, dataset, smaller, card, compressing.checksum_of(current))
        if code or not (directory / "summary.json").exists():
            return code
        variables, step = load.load_variables(directory)
    else:
        variables, step = compressing.pruned_at_once(smaller), source.step
        _begin_run(settings, card)
    compressing.seal(directory, step, variables, sparse=not settings.dense)
    after = {}
    if dataset is not None:
        after = compressing.scores_of(recipe_of(smaller.model), variables, compressing.SPLITS)
    height, width, depth = source.card["image_shape"]
    found = compressed.facts(
        (source.model, source.variables),
        (smaller.model, variables),
        (height, width, depth),
        done={
            "source": str(Path(settings.source).absolute()),
            **{name: getattr(settings, name) for name in ("prune", "low_rank", "rounds", "rewind")},
            "epochs": settings.epochs,
        },
        sizes=(
            compressing.bytes_of(Path(settings.source), source.step),
            compressing.bytes_of(directory, step),
        ),
        scores=(before, after),
        now=smaller,
    )
    if not settings.epochs:
        facts = {"experiment": settings.experiment, "model": card["model"], "seed": settings.seed}
        compressed.write_summary(
            directory, found, {**facts, "dataset": settings.dataset, "step": step}
        )
    compressed.write(directory, found, list(source.card.get("compression", [])))
    print(compressed.text(found))
    if smaller.factored:
        print(cnnjax.compress.low_rank.table(list(smaller.factored)))
    print(f"see          {directory / 'summary.md'}")
    return 0


def _begin_run(settings: Any, card: dict[str, Any]) -> None:
    """Writes the records of a run that is not trained."""
    directory = Path(settings.run_dir)
    files.make_directory(directory, flag="--out")
    saved = record.read_config(Path(settings.source))
    checksum = {name: saved[name] for name in ("data_checksum",) if name in saved}
    record.write_config(settings, settings.experiment, **checksum)
    files.write_json(directory / "model.json", card)


def _scored(recipe: Any, variables: Any, what: str) -> dict[str, Any]:
    scores = compressing.scores_of(recipe, variables, compressing.SPLITS)
    numbers = "  ".join(f"{split} {found['accuracy']:.2%}" for split, found in scores.items())
    print(f"{what:12} accuracy {numbers}")
    return scores


def _scan(source: load.TrainedModel, recipe: Any, steps: list[Any], out: Path) -> Any:
    """Scans the layers, prints and draws what they bear, and returns it."""
    layers = next((step.pruning.layers for step in steps if hasattr(step, "pruning")), ".*kernel")
    found = compressing.scan_layers(recipe, source.variables, layers)
    sparsities = (0.0, *sensitivity.SPARSITIES)
    width = max(map(len, found))
    print(f"{'sparsity':{width}}  " + "  ".join(f"{sparsity:6.0%}" for sparsity in sparsities))
    for path, row in found.items():
        print(f"{path:{width}}  " + "  ".join(f"{value:6.2%}" for value in row))
    files.make_directory(out, flag="--out")
    files.write_json(
        out / "sensitivity.json", {"sparsities": list(sparsities), "layers": dict(found)}
    )
    draw = {"sensitivity": lambda path: cnnjax.plots.sensitivity(found, sparsities, path)}
    for drawn in report.draw_figures(out / "figures", draw):
        print(f"see          {drawn}")
    return found
