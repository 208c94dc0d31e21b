"""Convert a file of weights into a run, or a run into a file of weights.

    cnnjax convert resnet50.safetensors --model resnet50 --out runs/resnet50
    cnnjax convert runs/mine --framework torchvision --out mine.safetensors

A run directory made so is read like one that was trained here: by `cnnjax.commands.predict`, by
`cnnjax.commands.evaluate`, by fine-tuning, by `cnnjax.run.load.load_trained`. Its `card.json` says
where the weights came from, and with --check how far they are from the other framework's outputs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import cnnjax
from cnnjax import convert
from cnnjax.data.packaged import tensor_files
from cnnjax.errors import UserError
from cnnjax.paths import read_text
from cnnjax.run import files, load

# What a file of weights says of its model, besides the classes.
IN_FILES = ("model", "arguments", "image_shape", "mean", "std", "channel_order")
KERAS_SUFFIXES = (".keras", ".h5")
# The settings that mean something when a run is made into a file.
FOR_EXPORT = ("source", "out", "framework", "like")


@dataclasses.dataclass(frozen=True)
class Config:
    """Convert weights from another framework into a run, or a run into another's weights."""

    source: tyro.conf.Positional[Path]
    """A file of weights (.safetensors, .npz, .keras, .h5, .pth, .pt, .bin, .ckpt, .pth.tar,
    .msgpack), TensorFlow's .ckpt.index, a folder of a hub or of Orbax; or a run directory to make a
    file of (.safetensors, .npz, .weights.h5 or .keras)."""

    out: Path
    """The run directory, or the file, to write."""

    model: str = ""
    """A name that `cnnjax models` lists, or timm's, torchvision's or Keras's (timm/resnet50 says
    which), or MODULE:NAME of a file of your own; default: that of a hub folder's config.json."""

    framework: str = "auto"
    """Whose names and layouts the file has: torchvision, timm, lukemelas (efficientnet-pytorch),
    keras (keras.applications), tf_slim, flax (our own paths), or pytorch (a module of your own
    whose layers have our names). auto: keras for Keras's suffixes, or else that whose names the
    file has."""

    num_classes: int = 0
    """Classes of the head; 0: as published, or as a hub folder says."""

    model_arguments: tuple[str, ...] = ()
    """Fields of the model, such as stem=cifar or auxiliary_heads=True."""

    image_size: int = 0
    """Height and width of the images; 0: as published."""

    new_head: bool = False
    """Drop the file's head and initialize a new one: for another number of classes."""

    seed: int = 0
    """Of the new head."""

    ignore: tuple[str, ...] = ()
    """Regular expressions of tensors in the file to leave out, such as 'aux.*'."""

    entry: str = ""
    """The key under which a PyTorch file holds the weights, where it holds other things too; dots
    between nested ones, such as extra.ema."""

    check: str = ""
    """An npz file of `image`, `logits` and outputs of modules, recorded in the other framework (in
    its layout, in evaluation mode), to compare with."""

    tolerance: float = 1e-4
    """Largest relative error that --check lets pass."""

    class_names: str = ""
    """A text file with one class name per line."""

    mean: tuple[float, ...] = ()
    """Per channel, of the images that the model expects; default: the published weights', or 0
    where none are published."""

    std: tuple[float, ...] = ()
    """The standard deviation, likewise, or 1."""

    channel_order: Literal["", "RGB", "BGR"] = ""
    """Of the images that the model expects; default: the published weights'."""

    like: str = ""
    """To write a .keras file: one of the same network, which Keras has saved, for its
    architecture."""


def main(config: Config) -> int:
    """Converts in the direction that the source tells."""
    if (config.source / "model.json").is_file():
        return export_run(config)
    if not config.source.exists() and tensor_files.prefix_of(config.source) is None:
        raise UserError(f"there is no {config.source}: give a file of weights, or a run directory.")
    if config.source.is_dir() and not convert.files.is_readable(config.source):
        return export_run(config)
    return import_weights(config)


def import_weights(config: Config) -> int:
    """Makes a run directory of a file of weights; returns the exit code."""
    if config.like:
        raise UserError(
            f"--like is for writing a .keras file of a run, and {config.source} is none."
        )
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out} exists and is not empty: choose another --out.")
    config, described, card, model, variables = read_weights(config)
    checked = _check(config, model, variables) if config.check else None
    _write_run(config, card, variables, checked, _published(config, described))
    count = cnnjax.trees.count_parameters(variables["params"])
    print(f"{config.model}: {count:,} parameters from {config.source}, see {config.out}")
    return 0


def read_weights(
    config: Config,
) -> tuple[Config, convert.folders.Described, dict[str, Any], Any, dict[str, Any]]:
    """Reads a file of weights; nothing is written.

    Returns:
      The settings with the framework that was found; what a hub folder says; what `model.json` of a
      run says; the model; its variables.
    """
    asked = config
    config, described = _as_described(config)
    if not config.model:
        arrays = convert.read(config.source, entry=config.entry, note=_note)
        advice = convert.advice.for_no_model(asked, arrays)
        raise UserError(
            f"no model given: name one with --model (cnnjax models lists them).{advice}"
        )
    meaning = cnnjax.models.find(config.model.partition("(")[0])
    name, given = cnnjax.models.read_model(config.model, config.model_arguments)
    config = dataclasses.replace(config, model=name)
    if config.framework != "auto":
        convert.find_names(cnnjax.models.create(name, num_classes=1, **given), config.framework)
    arrays = convert.read(config.source, entry=config.entry, note=_note)
    framework = _framework_of(config, meaning.library, given, arrays)
    config = dataclasses.replace(config, framework=framework)
    _note_definition(config, meaning, described)
    card = _model_card(config, given, described)
    model = cnnjax.models.create(
        card["model"], num_classes=card["num_outputs"], **card["arguments"]
    )
    if config.framework == convert.names_keras.FRAMEWORK:
        found = convert.preprocessing.moments_within(arrays).items()
        channels = card["image_shape"][-1]
        card |= {key: _moments(key, getattr(config, key), channels, value) for key, value in found}
    variables = _variables(asked, config, arrays, model, card)
    return config, described, card, model, variables


def _note_definition(
    config: Config, meaning: cnnjax.models.Meaning, described: convert.folders.Described
) -> None:
    """Says whose network is meant, where libraries have several."""
    if meaning.library:
        _note(f"{meaning}.")
        if meaning.arguments and config.framework in {"torchvision", "timm"} - {meaning.library}:
            _note(
                f"the file has {config.framework}'s names, whose network has not these fields: "
                f"outputs will differ. Its own is --model {config.framework}/{meaning.name}."
            )
    elif others := convert.advice.other_definitions(config.model, config.framework):
        there = cnnjax.models.MODELS[config.model].also.get(config.framework, config.model)
        _note(f"{config.model} is {config.framework}'s {there}, not {' or '.join(others)}.")
    if meaning.library == "timm" and meaning.tag and not described.preprocessing:
        _note("images are prepared as for timm's default weights of it (--mean, --std, ...).")


def _as_described(config: Config) -> tuple[Config, convert.folders.Described]:
    """Returns the settings with what a folder's config.json says where nothing is given."""
    if not config.source.is_dir():
        return config, convert.folders.Described()
    if config.model and not convert.folders.is_timms(config.source):
        return config, convert.folders.Described()
    described = convert.folders.describe(config.source)
    for text in described.ignored:
        _note(f"{config.source}: leaving out {text}.")
    # What it says of classes and images is of its own model alone.
    model = config.model or described.model
    num_classes = config.num_classes or described.num_classes or 0
    return dataclasses.replace(config, model=model, num_classes=num_classes), described


def _variables(
    asked: Config, config: Config, arrays: dict[str, np.ndarray], model: Any, card: dict[str, Any]
) -> dict[str, Any]:
    """Returns the variables; where the weights do not fit, the error ends in what to do."""
    try:
        return convert.to_cnnjax(
            arrays,
            model,
            card["image_shape"],
            framework=config.framework,
            ignore=config.ignore,
            new_head_key=cnnjax.rng.stream_key(config.seed, "head", 0) if config.new_head else None,
            note=_note,
        )
    except convert.Mismatch as error:
        text = convert.advice.for_mismatch(asked, config.model, arrays, error)
        raise UserError(text) from None


def export_run(config: Config) -> int:
    """Makes a file of weights of a run; returns the exit code."""
    for field in dataclasses.fields(config):
        if field.name not in FOR_EXPORT and getattr(config, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{config.source} is a run, which knows its own settings: drop {flag}.")
    if config.out.exists():
        raise UserError(f"{config.out} exists: choose another --out, or delete it.")
    trained = load.load_trained(config.source)
    if "frozen" in trained.variables or "quantize" in trained.card:
        what = "quantized" if "quantize" in trained.card else "a model with adapters"
        raise UserError(f"{config.source} is {what}, for which no other framework has a place.")
    card = trained.card
    framework = _framework_for(config, trained.model)
    config = dataclasses.replace(config, framework=framework)
    arrays = convert.from_cnnjax(
        trained.variables, trained.model, card["image_shape"], framework=config.framework
    )
    metadata = {
        "framework": config.framework,
        **{key: str(card[key]) for key in IN_FILES if key in card},
        "class_names": "\n".join(card["class_names"]),
        "producer": f"cnnjax {cnnjax.__version__}",
    }
    if config.framework == convert.names_keras.FRAMEWORK:
        arrays |= convert.names_keras.normalization(arrays, card["mean"], card["std"])
    convert.write(config.out, arrays, metadata, like=config.like or None)
    print(
        f"{config.out}: {len(arrays)} tensors of {card['model']}, step {trained.step}, under "
        f"{config.framework}'s names"
    )
    return 0


def _framework_of(
    config: Config, library: str, given: dict[str, Any], arrays: dict[str, np.ndarray]
) -> str:
    """Returns the framework whose names the file has."""
    if config.framework != "auto":
        return config.framework
    if config.source.name.lower().endswith(KERAS_SUFFIXES):
        return convert.names_keras.FRAMEWORK
    model = cnnjax.models.create(config.model, num_classes=config.num_classes or 1, **given)
    height, width, channels = cnnjax.models.input_shape(config.model)
    size = (config.image_size or height, config.image_size or width, channels)
    return convert.identify.framework_of(arrays, model, size, library)


def _framework_for(config: Config, model: Any) -> str:
    """Returns the framework to write, chosen by the file's suffix and the network.

    Raises:
      UserError: the one that is given is unknown, or it has no such network.
    """
    if config.framework != "auto":
        convert.find_names(model, config.framework)
        return config.framework
    if config.out.name.lower().endswith(KERAS_SUFFIXES):
        return convert.names_keras.FRAMEWORK
    return convert.frameworks_for(model)[0]


def _model_card(
    config: Config, given: dict[str, Any], described: convert.folders.Described
) -> dict[str, Any]:
    """Returns what `run.load.load_trained` needs to build the model and to feed it."""
    published = _published(config, described)
    shape = published.get("image_shape", cnnjax.models.input_shape(config.model))
    height, width = (config.image_size or published.get("crop", side) for side in shape[:2])
    channels = shape[-1]
    num_classes = config.num_classes or cnnjax.models.canonical_classes(config.model)
    return {
        "model": config.model,
        "num_outputs": num_classes,
        "arguments": _arguments(config, given, num_classes),
        "dataset": str(config.source),
        "image_shape": [height, width, channels],
        "fit": convert.preprocessing.fit(published),
        "class_names": _class_names(config, max(num_classes, 2), described.class_names),
        "mean": _moments("mean", config.mean, channels, published.get("mean", [0.0])),
        "std": _moments("std", config.std, channels, published.get("std", [1.0])),
        "channel_order": config.channel_order or published.get("channel_order", "RGB"),
        "parameters_averaged": False,
    }


def _published(config: Config, described: convert.folders.Described) -> dict[str, Any]:
    """Returns how the weights' images are prepared: as their folder says, or as published."""
    published = convert.preprocessing.preprocessing(config.model, config.framework)
    return {**published, **described.preprocessing}


def _arguments(config: Config, given: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Returns the model's arguments; those that the framework's network needs where not given."""
    model = cnnjax.models.create(config.model, num_classes=num_classes, **given)
    known = cnnjax.models.fields(model)
    required = convert.find_names(model, config.framework).requires
    differing = {name: value for name, value in required.items() if known[name] != value}
    if config.framework == convert.names_keras.FRAMEWORK:
        return {**required, **given}
    if differing.keys() - given.keys():
        written = ", ".join(f"{name}={value}" for name, value in differing.items())
        _note(f"{config.framework}'s network has {written}.")
    return {**differing, **given}


def _class_names(config: Config, num_classes: int, described: tuple[str, ...]) -> list[str]:
    if not config.class_names:
        if len(described) == num_classes:
            return list(described)
        return [str(number) for number in range(num_classes)]
    names = read_text(config.class_names, "list of --class-names").split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) != num_classes:
        raise UserError(
            f"--class-names {config.class_names} has {len(names)} names, and the model "
            f"{num_classes} classes: give a line for each."
        )
    return names


def _moments(
    name: str, given: tuple[float, ...], channels: int, published: list[float]
) -> list[float]:
    values = list(given or published)
    finite = all(map(math.isfinite, values))
    if len(values) not in (1, channels) or not finite or (name == "std" and min(values) <= 0):
        raise UserError(
            f"--{name} is {' '.join(map(str, values))}: give one number, or one for each of the "
            f"{channels} channels{', above 0' if name == 'std' else ''}."
        )
    return values


def _check(config: Config, model: Any, variables: Any) -> dict[str, Any]:
    """Compares with the reference; a UserError where the two diverge."""
    reference = convert.parity.read_reference(config.check)
    cnnjax.devices.backend.start(devices=1)
    names = convert.find_names(model, config.framework)
    errors = convert.parity.compare(model, variables, reference, names)
    for name, error in errors.items():
        print(f"  {name:40} relative error {error:.2e}")
    first = convert.parity.first_divergence(errors, config.tolerance)
    if first is not None:
        raise UserError(
            f"{first} is the first output that diverges from {config.check}: relative error "
            f"{errors[first]:.2e}, tolerance {config.tolerance:.0e}. Nothing is written."
        )
    return {
        "reference": config.check,
        "sha256": files.digest(Path(config.check)),
        "tolerance": config.tolerance,
        "relative_errors": errors,
    }


def _write_run(
    config: Config,
    card: dict[str, Any],
    variables: Any,
    checked: dict[str, Any] | None,
    published: dict[str, Any],
) -> None:
    files.make_directory(config.out, flag="--out")
    settings = dataclasses.asdict(config)
    settings |= {key: str(value) for key, value in settings.items() if isinstance(value, Path)}
    files.write_json(
        config.out / "config.json",
        {
            "experiment": "cnnjax.convert",
            "settings": settings,
            "command": sys.argv,
            "versions": cnnjax.devices.environment.versions(),
        },
    )
    files.write_json(config.out / "model.json", card)
    state = {"step": np.zeros((), np.int32), **variables, "ema": None}
    cnnjax.checkpoint.save(config.out / "checkpoints", state, {"source": str(config.source)})
    files.write_json(
        config.out / "card.json",
        {
            "source": str(config.source),
            "sha256": files.digest(config.source),
            "framework": config.framework,
            "model": {key: card[key] for key in ("model", "num_outputs", "arguments")},
            "new_head": config.new_head,
            "ignored": config.ignore,
            "preprocessing": {
                **published,
                **{key: card[key] for key in ("mean", "std", "channel_order", "image_shape")},
            },
            "parity": checked,
        },
    )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
