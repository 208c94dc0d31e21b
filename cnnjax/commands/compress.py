"""Make a trained run smaller: prune weights, channels or blocks, factor layers, quantize, train.

    cnnjax compress --run RUN --prune "magnitude(sparsity=0.9)" --epochs 5 --out runs/sparse
    cnnjax compress --run RUN --prune "channels(macs=0.5)" --epochs 5 --out runs/narrow
    cnnjax compress --run RUN --low-rank energy=0.95 --epochs 2 --out runs/factored
    cnnjax compress --run RUN --quantize "int8(calibration=percentile)" --out runs/int8
    cnnjax compress --run RUN --quantize "int4(activations=8, qat=true, epochs=2)" --out runs/int4
    cnnjax compress --run RUN --sensitivity --out runs/scan

What it leaves is a run: predict, evaluate, explain, fine-tuning and export take it. With --epochs
it is trained again with the settings of the run (its learning rate too: Renda et al. 2020, arXiv
2003.02389), and single weights are then removed little by little. model.json and summary.md say
what was done. See docs/compress.md.
"""

import dataclasses
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.run import load, record

LOW_RANK = ("energy", "layers")


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune or factor a run's network, train it again, and leave a smaller run."""

    run: str = ""
    """The run directory of a classifier."""

    out: str = ""
    """Directory of the new run; it must not exist."""

    prune: str = ""
    """What is removed, in order: channels(macs=0.5, norm=l2, scope=global, layers=.*, multiple=1),
    blocks(count=1), then magnitude(sparsity=0.9, scope=global, layers=.*kernel, end=0.6),
    movement(...) or random(...) of single weights. norm is l2, l1, batchnorm, taylor or random;
    scope is global, layer or (of magnitude) sensitivity; a layer that loses channels keeps a
    multiple of so many, such as 8."""

    low_rank: str = ""
    """Factor layers, such as energy=0.95 or 'energy=0.9, layers=stage4/.*': the fraction of each
    kernel's sum of squares that stays."""

    quantize: str = ""
    """Weights and activations of few bits, after what else is done: int8, int4, integer(6, 8),
    mixed(max_size=0.15), float16 or bfloat16, with options: see docs/quantize.md."""

    epochs: int = 0
    """Train again for N epochs, of each round; 0 does not."""

    learning_rate: float = 0.0
    """The peak of the schedule; 0: the run's."""

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
    from cnnjax.studies import compress_rounds, compressing, quantizing

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
    needed = _needs_images(settings, steps) or config.sensitivity
    dataset = compress_rounds.open_images(settings, needed=needed)
    return compress_rounds.compress(
        settings, source, dataset, steps, low_rank, scan=config.sensitivity
    )


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
    kept = (
        *("source", "run_dir", "prune", "low_rank", "rounds", "rewind", "dense", "base"),
        *("seed", "devices", "epochs", "stop_after_epochs"),
    )
    values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    values |= {name: getattr(settings, name) for name in kept}
    # The images that are held out stay those of the run.
    values["data_seed"] = own.seed if own.data_seed < 0 else own.data_seed
    values["learning_rate"] = own.learning_rate
    for name in ("resume", "plan", "mesh", "sharding", "smoke", "patience", "swa_from_epoch"):
        values[name] = getattr(compressing.Config, name)
    values["warmup_epochs"] = min(own.warmup_epochs, config.epochs / 5)
    values |= {name: value for name, value in given.items() if value}
    return compressing.Config(**values)


def _needs_images(settings: Any, steps: list[Any]) -> bool:
    taylor = any(getattr(step, "norm", "") == "taylor" for step in steps)
    scanned = any(getattr(step, "by_sensitivity", False) for step in steps)
    return bool(settings.epochs) or taylor or scanned


def _resumed(config: Config) -> Any:
    """Returns the settings of the compression to go on with; None where it is finished."""
    from cnnjax.studies import compress_rounds, compressing

    out = Path(config.resume)
    if config.run or config.prune or config.low_rank or config.out:
        raise UserError("--resume goes on with a compression's own settings: give it alone.")
    begun = [out, *sorted((out / compressing.ROUNDS).glob("*"))]
    known = next((each for each in begun if (each / "config.json").exists()), out)
    saved = record.saved_config(compressing.Config, compressing.Config.experiment, known)
    if (out / "summary.json").exists() and "compression" in compress_rounds.card_of(out):
        print(f"{out} is finished (see {out / 'summary.md'}); nothing to do.")
        return None
    return dataclasses.replace(
        saved, run_dir=str(out), stop_after_epochs=config.stop_after_epochs, resume=""
    )
