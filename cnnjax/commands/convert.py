"""Convert a file of weights into a run, or a run into a file of weights.

    cnnjax convert resnet50.safetensors --model resnet50 --out runs/resnet50
    cnnjax convert runs/mine --framework torchvision --out mine.safetensors

A run directory made so is read like one that was trained here: by `cnnjax.commands.predict`, by
`cnnjax.commands.evaluate`, by fine-tuning, by `cnnjax.run.load.load_trained`. Its `card.json` says
where the weights came from, and with --check how far they are from the other framework's outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import cnnjax
from cnnjax import convert
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
    """A file of weights (.safetensors, .npz, .keras, .h5, .pth, .pt, .bin, .ckpt, .pth.tar); or a
    run directory to make a file of (.safetensors, .npz, .weights.h5 or .keras)."""

    out: Path
    """The run directory, or the file, to write."""

    model: str = ""
    """A name that `cnnjax models` lists, or MODULE:NAME of a file of your own."""

    framework: str = "auto"
    """Whose names and layouts the file has: torchvision, timm, lukemelas (efficientnet-pytorch),
    keras (keras.applications), or pytorch (a module of your own whose layers have our names). auto:
    keras for Keras's suffixes, or else the first of the others, in this order, that has the
    network."""

    num_classes: int = 0
    """Classes of the head; 0: as published."""

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
    if not config.source.exists():
        raise UserError(f"there is no {config.source}: give a file of weights, or a run directory.")
    return export_run(config) if config.source.is_dir() else import_weights(config)


def import_weights(config: Config) -> int:
    """Makes a run directory of a file of weights; returns the exit code."""
    if config.like:
        raise UserError(
            f"--like is for writing a .keras file of a run, and {config.source} is none."
        )
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out} exists and is not empty: choose another --out.")
    config, card, model, variables = read_weights(config)
    checked = _check(config, model, variables) if config.check else None
    _write_run(config, card, variables, checked)
    count = cnnjax.trees.count_parameters(variables["params"])
    print(f"{config.model}: {count:,} parameters from {config.source}, see {config.out}")
    return 0


def read_weights(config: Config) -> tuple[Config, dict[str, Any], Any, Any]:
    """Reads a file of weights; nothing is written.

    Returns:
      The settings with the framework that was found; what `model.json` of a run says; the model;
      its variables.
    """
    if not config.model:
        raise UserError("no model given: name one with --model (cnnjax models lists them).")
    name, given = cnnjax.models.read_model(config.model, config.model_arguments)
    framework = _framework(
        config, config.source, cnnjax.models.create(name, num_classes=1, **given)
    )
    config = dataclasses.replace(config, model=name, framework=framework)
    card = _model_card(config, given)
    model = cnnjax.models.create(
        card["model"], num_classes=card["num_outputs"], **card["arguments"]
    )
    arrays = convert.read(config.source, entry=config.entry, note=_note)
    if config.framework == convert.names_keras.FRAMEWORK:
        found = convert.preprocessing.moments_within(arrays).items()
        channels = card["image_shape"][-1]
        card |= {key: _moments(key, getattr(config, key), channels, value) for key, value in found}
    variables = convert.to_cnnjax(
        arrays,
        model,
        card["image_shape"],
        framework=config.framework,
        ignore=config.ignore,
        new_head_key=cnnjax.rng.stream_key(config.seed, "head", 0) if config.new_head else None,
        note=_note,
    )
    return config, card, model, variables


def export_run(config: Config) -> int:
    """Makes a file of weights of a run; returns the exit code."""
    for field in dataclasses.fields(config):
        if field.name not in FOR_EXPORT and getattr(config, field.name) != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{config.source} is a run, which knows its own settings: drop {flag}.")
    if config.out.exists():
        raise UserError(f"{config.out} exists: choose another --out, or delete it.")
    trained = load.load_trained(config.source)
    if "frozen" in trained.variables:
        raise UserError(
            f"{config.source} is a model with adapters, for which no other framework has a place."
        )
    card = trained.card
    framework = _framework(config, config.out, trained.model)
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


def _framework(config: Config, file: Path, model: Any) -> str:
    """Returns the framework, chosen by the file's suffix and the network where none is given.

    Raises:
      UserError: the one that is given is unknown, or it has no such network.
    """
    if config.framework != "auto":
        convert.find_names(model, config.framework)
        return config.framework
    if file.name.lower().endswith(KERAS_SUFFIXES):
        return convert.names_keras.FRAMEWORK
    return convert.frameworks_for(model)[0]


def _model_card(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """Returns what `run.load.load_trained` needs to build the model and to feed it."""
    height, width, channels = cnnjax.models.input_shape(config.model)
    published = convert.preprocessing.preprocessing(config.model, config.framework)
    size = config.image_size or published.get("crop", height)
    num_classes = config.num_classes or cnnjax.models.canonical_classes(config.model)
    return {
        "model": config.model,
        "num_outputs": num_classes,
        "arguments": _arguments(config, given, num_classes),
        "dataset": str(config.source),
        "image_shape": [size, config.image_size or published.get("crop", width), channels],
        "fit": convert.preprocessing.fit(published),
        "class_names": _class_names(config, max(num_classes, 2)),
        "mean": _moments("mean", config.mean, channels, published.get("mean", [0.0])),
        "std": _moments("std", config.std, channels, published.get("std", [1.0])),
        "channel_order": config.channel_order or published.get("channel_order", "RGB"),
        "parameters_averaged": False,
    }


def _arguments(config: Config, given: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """Returns the model's arguments; those that Keras's networks need where none are given."""
    if config.framework != convert.names_keras.FRAMEWORK:
        return given
    model = cnnjax.models.create(config.model, num_classes=num_classes, **given)
    return {**convert.names_keras.names_for(model).requires, **given}


def _class_names(config: Config, num_classes: int) -> list[str]:
    if not config.class_names:
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
    if len(values) not in (1, channels) or (name == "std" and min(values) <= 0):
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
        "sha256": _digest(Path(config.check)),
        "tolerance": config.tolerance,
        "relative_errors": errors,
    }


def _write_run(
    config: Config, card: dict[str, Any], variables: Any, checked: dict[str, Any] | None
) -> None:
    files.make_directory(config.out, flag="--out")
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(config).items()
    }
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
            "sha256": _digest(config.source),
            "framework": config.framework,
            "model": {key: card[key] for key in ("model", "num_outputs", "arguments")},
            "new_head": config.new_head,
            "ignored": config.ignore,
            "preprocessing": {
                **convert.preprocessing.preprocessing(config.model, config.framework),
                **{key: card[key] for key in ("mean", "std", "channel_order", "image_shape")},
            },
            "parity": checked,
        },
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
