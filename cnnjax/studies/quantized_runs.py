"""A classifier's run in, a quantized run out: what `cnnjax compress --quantize` does.

Training with rounded weights is a run of its own, OUT/qat, with metrics, checkpoints and a report
like any other; where it was stopped, the same call goes on with it, bit for bit.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import checkpoint, compress
from cnnjax.compress.quantization import card as cards
from cnnjax.compress.quantization import lsq, mixed, report
from cnnjax.compress.quantization.network import Prepared, Quantization, finish
from cnnjax.data import few_labels
from cnnjax.data.dataset import Dataset
from cnnjax.devices import environment, processes
from cnnjax.errors import UserError
from cnnjax.evaluation.ensemble import class_logits
from cnnjax.finetune import variables_checksum
from cnnjax.rng import stream_key
from cnnjax.run import classifier, files, load, record, trainer

EXPERIMENT = "cnnjax compress --quantize"
BATCH = 256
# Validation images on which a bound on accuracy must hold.
FOR_BOUND = 5000
REPORT = "quantization.json"


@dataclasses.dataclass(frozen=True)
class Training(classifier.Config):
    """Settings of a training with rounded weights and activations."""

    experiment: ClassVar[str] = EXPERIMENT

    base: str = ""
    """The run that is quantized."""

    quantize: str = ""
    """How, as --quantize of cnnjax compress."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Stored images, in batches, and their labels.

    Attributes:
      calibration: of the training split.
      validation: images and labels; of the training split where no validation images are held out.
      test: images and labels.
    """

    calibration: list[np.ndarray]
    validation: tuple[list[np.ndarray], list[np.ndarray]]
    test: tuple[list[np.ndarray], list[np.ndarray]]


def choose_images(dataset: Dataset, scheme: compress.Scheme, seed: int, *, labeled: bool) -> Images:
    """Draws images for calibration and validation; the test images are all.

    Args:
      dataset: in memory.
      scheme: says how many.
      seed: of the draw.
      labeled: whether the labels are those of the network's classes; else nothing is measured.

    Raises:
      UserError: no training images, or fewer than are asked for.
    """
    check_samples(dataset, scheme)
    drawn = np.asarray(
        jax.random.permutation(stream_key(seed, "calibration", 0), len(dataset.train.label))
    )
    calibration = np.sort(drawn[: scheme.samples])
    held = dataset.validation
    # A tenth of a point is an image of a thousand.
    count = max(scheme.report, FOR_BOUND if scheme.max_drop else 0)
    validation: tuple[Any, Any] = (held.image[:count], held.label[:count])
    if not len(held.label):
        chosen = np.sort(drawn[::-1][:count])
        validation = dataset.train.image[chosen], dataset.train.label[chosen]
    nothing: tuple[list, list] = ([], [])
    return Images(
        _batches(dataset.train.image[calibration]),
        tuple(map(_batches, validation)) if labeled else nothing,  # type: ignore[arg-type]
        tuple(map(_batches, dataset.test)) if labeled else nothing,  # type: ignore[arg-type]
    )


def check_samples(dataset: Dataset, scheme: compress.Scheme) -> None:
    """Raises a UserError unless a dataset has the images to calibrate on that a scheme names.

    Of the default number, all are taken where there are fewer.
    """
    count = len(dataset.train.label)
    if not count:
        raise UserError(f"{dataset.name} has no training images to calibrate on.")
    if scheme.samples > count and scheme.samples != compress.Scheme.samples:
        raise UserError(
            f"samples={scheme.samples}: {dataset.name} has {count:,} training images to calibrate "
            "on: give at most that many."
        )


def check_shape(dataset: Any, card: dict[str, Any]) -> None:
    """Raises a UserError unless a dataset has images of a network's shape."""
    if list(dataset.image_shape) != list(card["image_shape"]):
        sizes = ("x".join(map(str, x)) for x in (dataset.image_shape, card["image_shape"]))
        raise UserError(
            "{} has images of {}, but the network takes {}: calibrate on images of that "
            "shape.".format(dataset.name, *sizes)
        )


def prepared_run(
    trained: load.TrainedModel, scheme: compress.Scheme, images: Images | None
) -> tuple[Prepared, mixed.Simulation | None]:
    """Folds, calibrates and plans; of mixed precision the plan is chosen by what it costs."""
    shape = trained.card["image_shape"]
    calibration = images.calibration if images else []
    prepared = compress.prepare(
        trained.model,
        trained.variables,
        shape,
        scheme,
        images=calibration,
        normalize=trained.normalize,
    )
    if images is None:
        return prepared, None
    simulation = compress.simulate(prepared, clip=scheme.clip, normalize=trained.normalize)
    if scheme.is_mixed:
        plans = compress.mixed_precision(
            simulation,
            calibration,
            max_size=scheme.max_size,
            max_drop=scheme.max_drop,
            validation=images.validation,
        )
        prepared = dataclasses.replace(prepared, plans=plans)
        simulation = dataclasses.replace(simulation, prepared=prepared)
    return prepared, simulation


def quantized_run(
    trained: load.TrainedModel, scheme: compress.Scheme, images: Images | None
) -> Quantization:
    """Quantizes without training, and measures what each layer adds."""
    prepared, simulation = prepared_run(trained, scheme, images)
    calibration = images.calibration if images else []
    result = finish(prepared, scheme, images=calibration, normalize=trained.normalize)
    if simulation is None or not (scheme.report and images and images.validation[0]):
        return result
    return dataclasses.replace(result, rows=_with_accuracies(result.rows, simulation, images))


def trained_run(
    trained: load.TrainedModel,
    scheme: compress.Scheme,
    images: Images,
    settings: Training,
) -> Quantization | int:
    """Trains with rounded weights and activations; goes on where that was stopped.

    Returns:
      The network, or an exit code where training was stopped before its end.
    """
    prepared, simulation = prepared_run(trained, scheme, images)
    directory = Path(settings.run_dir)
    model = compress.FakeQuantized(
        prepared.model.model, prepared.model.folded, tuple(prepared.plans.items())
    )
    settings = _begun(settings, directory, cards.describe(model))
    if not (settings.resume and record.is_finished(settings)):
        scales = prepared.kernel_scales(scheme.clip)
        steps = lsq.with_steps(
            prepared.variables["params"], prepared.plans, prepared.input_scales, scales
        )
        recipe = classifier.make_recipe(
            settings,
            _training_data(settings),
            model,  # type: ignore[arg-type]
            _card(trained.card, settings.base, model),
            variables=jax.device_get({**prepared.variables, "params": steps}),
            base_checksum=variables_checksum(trained.variables),
        )
        code = trainer.train(settings, recipe)
        if code or not (directory / record.SUMMARY).exists():
            return code
    learned = load.load_trained(directory)
    quantized, variables = learned.model.quantized(learned.variables)
    noise = report.signal_to_noise(
        dataclasses.replace(prepared, variables=_floats(learned.variables)),
        variables,
        images.calibration,
        trained.normalize,
    )
    rows = report.rows_of(prepared, variables, noise)
    if simulation is not None and scheme.report and images.validation[0]:
        rows = _with_accuracies(rows, simulation, images)
    return Quantization(quantized, variables, rows, prepared)


def training_settings(
    base: classifier.Config, run: str, text: str, scheme: compress.Scheme, out: Path, **others: Any
) -> Training:
    """Returns the settings of a training with rounded weights: those of the run's data and batches.

    Args:
      base: the settings of the run.
      run: its directory.
      text: what `scheme` was read from.
      out: of the quantized run.
      **others: settings by name, such as `dataset`.
    """
    kept = (
        *("model", "model_arguments", "loss", "label_smoothing", "monitor", "augment"),
        *("dataset", "data_dir", "classes", "validation", "image_size", "fit", "crop_area"),
        *("stratify", "drop_duplicates", "train_examples", "label_noise", "exclude", "balance"),
        *("preprocess", "pipeline", "batch_size", "seed", "data_seed", "smoke"),
    )
    return Training(
        **{name: _value(getattr(base, name)) for name in kept},
        **others,
        base=str(Path(run).absolute()),
        quantize=text,
        optimizer="adam",
        epochs=scheme.epochs,
        learning_rate=scheme.learning_rate,
        warmup_epochs=0.0,
        run_dir=str(out / "qat"),
    )


def _value(value: Any) -> Any:
    """Returns a setting as it was before a file without tuples held it."""
    return tuple(value) if isinstance(value, list) else value


def write_run(
    out: Path,
    trained: load.TrainedModel,
    run: Path,
    text: str,
    result: Quantization,
    others: dict[str, Any],
) -> dict[str, int]:
    """Writes a run directory; returns the bytes of its parameters on disk, `before` and `after`.

    Both are stored in the same form, see `cnnjax.checkpoint.packed`.

    Args:
      out: the directory.
      trained: the network before.
      run: its directory, whose settings are recorded.
      text: how it was quantized.
      result: the network after.
      others: what else its record says.
    """
    saved = record.read_config(run)
    files.write_json(
        out / "config.json",
        {
            "experiment": EXPERIMENT,
            "settings": saved["settings"],
            "command": sys.argv,
            "versions": environment.versions(),
            **{name: saved[name] for name in ("data_checksum",) if name in saved},
            "compressed": {
                "run": str(run.absolute()),
                "step": trained.step,
                "quantize": text,
                **others,
            },
        },
    )
    card = _card(trained.card, str(run.absolute()), result.model)
    files.write_json(out / "model.json", card)
    after = save(out / "checkpoints", trained.step, result.variables, str(run))
    with tempfile.TemporaryDirectory() as directory:
        before = save(Path(directory), trained.step, trained.variables, str(run))
    return {"before": before, "after": after}


def accuracy(model: Any, variables: Any, normalize: Any, data: tuple[Sequence, Sequence]) -> float:
    """Returns the fraction of images that a network classifies as labeled."""
    predict = jax.jit(lambda v, x: jnp.argmax(class_logits(model.apply(v, x, train=False)), -1))
    right = 0
    for image, label in zip(*data, strict=True):
        right += int(np.sum(np.asarray(predict(variables, normalize(image))) == label))
    return right / sum(map(len, data[0]))


def _training_data(settings: Training) -> Any:
    """Returns the images of the run, of which a fine-tuned one may have had few."""
    dataset = classifier.read_data(settings)
    few = record.read_config(Path(settings.base))["settings"].get("labels_per_class")
    return few_labels(dataset, few, seed=settings.seed) if few else dataset


def _begun(settings: Training, directory: Path, described: dict[str, Any]) -> Training:
    """Returns the settings that go on with what is in the directory, or start there."""
    if not (directory / "config.json").exists():
        return settings
    saved = record.saved_config(Training, EXPERIMENT, directory)
    decided = record.filled_in(settings, dataclasses.asdict(saved))
    settings = dataclasses.replace(settings, **decided)
    places = record.CHANGEABLE_ON_RESUME - record.HOW_LONG
    for field in dataclasses.fields(Training):
        here, there = getattr(settings, field.name), getattr(saved, field.name)
        known = field.name in places | {"stop_after_epochs"} | set(record.LAUNCH_SETTINGS)
        if not known and here != there:
            raise UserError(
                f"{directory} was begun with {field.name} {there}, not {here}: repeat the command "
                "as it was, or choose another --out."
            )
    if (directory / "model.json").exists():
        card = files.read_json(directory / "model.json", f"{directory} is damaged")
        if card.get(cards.CARD, {}).get("layers") != described["layers"]:
            raise UserError(
                f"calibration gives other zero points now than when {directory} was begun: "
                "choose another --out."
            )
    return dataclasses.replace(settings, resume=settings.run_dir)


def _card(card: dict[str, Any], source: str, model: Any) -> dict[str, Any]:
    """Returns what `model.json` records: the network's own metadata, and how it is quantized."""
    # What was fine-tuned or a part of another network stands in the variables now.
    kept = {name: value for name, value in card.items() if name not in ("finetune", "part")}
    return {**kept, cards.CARD: {"source": source, **cards.describe(model)}}


def _floats(variables: dict[str, Any]) -> dict[str, Any]:
    params, _, _ = lsq.without_steps(variables["params"])
    return {**variables, "params": params}


def _with_accuracies(
    rows: Sequence[Any], simulation: mixed.Simulation, images: Images
) -> tuple[Any, ...]:
    processes.say(f"measuring    each of {len(simulation.prepared.plans)} layers alone")
    found = compress.one_at_a_time(simulation, *images.validation)
    return tuple(dataclasses.replace(row, accuracy=found.get(row.path)) for row in rows)


def save(directory: Path, step: int, variables: dict[str, Any], source: str) -> int:
    """Saves variables as a run keeps them, and returns the bytes of the files."""
    kept = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    state = {"step": np.int32(step), **jax.device_get(kept), "ema": None}
    written = checkpoint.save(directory, state, {"source": source}, sparse=True)
    folders = [written / name for name in kept]
    return sum(path.stat().st_size for each in folders for path in each.rglob("*"))


def _batches(array: np.ndarray) -> list[np.ndarray]:
    return [array[start : start + BATCH] for start in range(0, len(array), BATCH)]
