"""Make a trained run smaller: prune weights, channels or blocks, factor layers, quantize, train.

    cnnjax compress --run RUN --prune "magnitude(sparsity=0.9)" --epochs 5 --out runs/sparse
    cnnjax compress --run RUN --prune "channels(macs=0.5)" --epochs 5 --out runs/narrow
    cnnjax compress --run RUN --low-rank energy=0.95 --epochs 2 --out runs/factored
    cnnjax compress --run RUN --quantize "int8(calibration=percentile)" --out runs/int8
    cnnjax compress --run RUN --quantize "int4(activations=8, qat=true, epochs=2)" --out runs/int4
    cnnjax compress --run RUN --sensitivity --out runs/scan

What it leaves is a run: predict, evaluate, explain, fine-tuning and export take it. With --epochs
it is trained again with the settings of the run, at a third of its learning rate; single weights
are then removed little by little. model.json and summary.md say what was done. See
docs/compress.md.
"""

import dataclasses
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.run import files, load, record

RATE = 1 / 3
LOW_RANK = ("energy", "layers")


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune or factor a run's network, train it again, and leave a smaller run."""

    run: str = ""
    """The run directory of a classifier."""

    out: str = ""
    """Directory of the new run; it must not exist."""

    prune: str = ""
    """What is removed, in order: channels(macs=0.5, norm=l2, scope=global, layers=.*),
    blocks(count=1), then magnitude(sparsity=0.9, scope=global, layers=.*kernel, end=0.6),
    movement(...) or random(...) of single weights. norm is l2, l1, batchnorm, taylor or random;
    scope is global, layer or (of magnitude) sensitivity."""

    low_rank: str = ""
    """Factor layers, such as energy=0.95 or 'energy=0.9, layers=stage4/.*': the fraction of each
    kernel's sum of squares that stays."""

    quantize: str = ""
    """Weights and activations of few bits, after what else is done: int8, int4, integer(6, 8),
    mixed(max_size=0.15), float16 or bfloat16, with options: see docs/quantize.md."""

    epochs: int = 0
    """Train again for N epochs, of each round; 0 does not."""

    learning_rate: float = 0.0
    """The peak of the schedule; 0: a third of the run's."""

    batch_size: int = 0
    """Examples per step; 0: as the run."""

    rounds: int = 1
    """Prune and train in N rounds, each of which removes the same fraction of what is there."""

    rewind: str = ""
    """Before each round's training, take the remaining weights back to those of this step of the
    run; init: to its initial ones (a lottery ticket)."""

    sensitivity: bool = False
    """Prune each layer alone, score it on validation images, and draw the figure."""

    dense: bool = False
    """Store all values; by default layers that are mostly zero are stored sparse."""

    seed: int = 0
    """Of the training, and of what is random."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were."""

    data_dir: str = ""
    """Where tfds datasets are; by default as the run."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    devices: int = 0
    """Devices to train on, as of experiments."""

    resume: str = ""
    """Go on with the compression that was stopped in this directory, with its own settings."""

    stop_after_epochs: int = 0
    """Stop after N epochs, to be resumed later; 0 does not."""


def main(config: Config) -> int:
    """Compresses a run; returns the exit code."""
    from cnnjax.compress import named
    from cnnjax.studies import compressing, quantizing

    if config.quantize or quantizing.is_begun(config.resume):
        return quantizing.run(config, main)
    if config.resume:
        settings = _resumed(config)
        if settings is None:
            return 0
    else:
        _check(config)
        settings = compressing.Config(
            source=config.run,
            run_dir=config.out,
            prune=config.prune,
            low_rank=config.low_rank,
            rounds=config.rounds,
            rewind=config.rewind,
            dense=config.dense,
            seed=config.seed,
            base=config.base,
            dataset=config.dataset,
            data_dir=config.data_dir,
            devices=config.devices,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            stop_after_epochs=config.stop_after_epochs,
        )
    steps = named.read(settings.prune)
    low_rank = _low_rank(settings.low_rank)
    for step in steps:
        named.of_round(step, 1, settings.rounds)
    if not settings.epochs and any(_is_movement(step) for step in steps):
        raise UserError("movement(...) scores weights by how training moves them: give --epochs.")
    cnnjax.devices.backend.start(settings.devices or (0 if settings.epochs else 1))
    source = load.load_classifier(settings.source, base=settings.base or None)
    compressing.check_source(source, settings.source)
    compressing.check_patterns(source, steps)
    if not config.resume:
        settings = _filled_in(settings, source, config)
    dataset = _images(settings, needed=_needs_images(settings, steps) or config.sensitivity)
    return _compress(config, settings, source, dataset, steps, low_rank)


def _check(config: Config) -> None:
    """Raises a UserError for flags that are missing or contradict each other."""
    if not config.run:
        raise UserError("no run given: name a trained classifier with --run RUN.")
    if not config.out:
        raise UserError("no directory for the new run given: name it with --out OUT.")
    if Path(config.out).exists() and (
        not Path(config.out).is_dir() or any(Path(config.out).iterdir())
    ):
        raise UserError(
            f"--out {config.out} is there already, and nothing is written over: choose another, or "
            f"go on with --resume {config.out}."
        )
    if not (config.prune or config.low_rank or config.sensitivity):
        raise UserError(
            "nothing to do: give --prune, such as 'magnitude(sparsity=0.9)', --low-rank, such as "
            "energy=0.95, --quantize, such as int8, or --sensitivity."
        )
    for name, least in (("epochs", 0), ("rounds", 1), ("batch_size", 0), ("learning_rate", 0)):
        if getattr(config, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(config, name)}: give at least {least}.")
    if (config.rounds > 1 or config.rewind) and not config.epochs:
        raise UserError("--rounds and --rewind train again: give --epochs.")
    if config.rewind and not config.prune:
        raise UserError("--rewind is for pruned weights: give --prune 'magnitude(sparsity=0.9)'.")


def _low_rank(text: str) -> dict[str, Any]:
    if not text:
        return {}
    known = spec.arguments([text], "--low-rank")
    for name in known:
        if name not in LOW_RANK:
            raise cnnjax.errors.unknown_name("argument of --low-rank", name, LOW_RANK)
    energy = known.get("energy")
    if not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise UserError(
            f"--low-rank {text!r}: give energy=FRACTION, above 0 and at most 1, of what stays."
        )
    return known


def _is_movement(step: Any) -> bool:
    return getattr(getattr(step, "pruning", None), "criterion", "") == "movement"


def _filled_in(settings: Any, source: load.TrainedModel, config: Config) -> Any:
    """Returns the settings with those of the run where none were given."""
    from cnnjax.studies import compressing

    own = compressing.settings_of(source, config.run)
    given = {
        "dataset": config.dataset,
        "data_dir": config.data_dir,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
    }
    kept = ("source", "run_dir", "prune", "low_rank", "rounds", "rewind", "dense", "base")
    kept += ("seed", "devices", "epochs", "stop_after_epochs")
    values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    values |= {name: getattr(settings, name) for name in kept}
    # The images that are held out stay those of the run.
    values["data_seed"] = own.seed if own.data_seed < 0 else own.data_seed
    values["learning_rate"] = own.learning_rate * RATE
    for name in ("resume", "plan", "mesh", "sharding", "smoke", "patience", "swa_from_epoch"):
        values[name] = getattr(compressing.Config, name)
    values["warmup_epochs"] = min(own.warmup_epochs, config.epochs / 5)
    values |= {name: value for name, value in given.items() if value}
    return compressing.Config(**values)


def _needs_images(settings: Any, steps: list[Any]) -> bool:
    taylor = any(getattr(step, "norm", "") == "taylor" for step in steps)
    scanned = any(getattr(step, "by_sensitivity", False) for step in steps)
    return bool(settings.epochs) or taylor or scanned


def _images(settings: Any, *, needed: bool) -> Any:
    """Returns the run's data; None where they are not known and not needed."""
    from cnnjax.run import again, classifier

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


def _compress(
    config: Config,
    settings: Any,
    source: load.TrainedModel,
    dataset: Any,
    steps: list[Any],
    low_rank: dict[str, Any],
) -> int:
    """Makes the rounds of a compression; returns the exit code."""
    from cnnjax.compress import named
    from cnnjax.studies import compressing

    if dataset is not None and list(dataset.image_shape) != list(source.card["image_shape"]):
        raise UserError(
            f"{dataset.name} has images of {tuple(dataset.image_shape)}, but {settings.source} "
            f"takes {tuple(source.card['image_shape'])}: name its own with --dataset."
        )
    out = Path(settings.run_dir)
    recipe = None
    if dataset is not None:
        recipe = compressing.make_recipe(settings, dataset, source.model, source.card)
    start = None
    if settings.rewind:
        start = compressing.rewound(settings.source, source, recipe, settings.rewind)
    scan = None
    if config.sensitivity or any(getattr(step, "by_sensitivity", False) for step in steps):
        scan = _scan(source, recipe, steps, out)
    if not (steps or low_rank):
        return 0
    before = {} if recipe is None else _scored(recipe, source.variables, "before")
    now = source
    for number in range(1, settings.rounds + 1):
        last = number == settings.rounds
        directory = out if last else out / compressing.ROUNDS / str(number)
        if (directory / "summary.json").exists() and "compression" in now.card | _card(directory):
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
            scan,
            before,
        )
        if code or not (directory / "summary.json").exists():
            return code
        now = load.load_classifier(directory)
    return 0


def _card(directory: Path) -> dict[str, Any]:
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
    from cnnjax.studies import compressed, compressing

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
    after = (
        {}
        if dataset is None
        else compressing.scores_of(recipe_of(smaller.model), variables, ("validation", "test"))
    )
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
    from cnnjax.studies import compressing

    scores = compressing.scores_of(recipe, variables, ("validation", "test"))
    numbers = "  ".join(f"{split} {found['accuracy']:.2%}" for split, found in scores.items())
    print(f"{what:12} accuracy {numbers}")
    return scores


def _scan(source: load.TrainedModel, recipe: Any, steps: list[Any], out: Path) -> Any:
    """Scans the layers, prints and draws what they bear, and returns it."""
    from cnnjax.compress import sensitivity
    from cnnjax.run import report
    from cnnjax.studies import compressing

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
    for path in report.draw_figures(out / "figures", draw):
        print(f"see          {path}")
    return found


def _resumed(config: Config) -> Any:
    """Returns the settings of the compression to go on with; None where it is finished."""
    from cnnjax.studies import compressing

    out = Path(config.resume)
    if config.run or config.prune or config.low_rank or config.out:
        raise UserError("--resume goes on with a compression's own settings: give it alone.")
    begun = [out, *sorted((out / compressing.ROUNDS).glob("*"))]
    known = next((each for each in begun if (each / "config.json").exists()), out)
    saved = record.saved_config(compressing.Config, compressing.Config.experiment, known)
    if (out / "summary.json").exists() and "compression" in _card(out):
        print(f"{out} is finished (see {out / 'summary.md'}); nothing to do.")
        return None
    return dataclasses.replace(
        saved, run_dir=str(out), stop_after_epochs=config.stop_after_epochs, resume=""
    )
