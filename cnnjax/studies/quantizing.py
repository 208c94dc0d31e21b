"""The course of `cnnjax compress --quantize`: what is checked, done, printed and recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax import compress
from cnnjax.compress.quantization import report, schemes
from cnnjax.errors import UserError
from cnnjax.run import again, files, load, record
from cnnjax.studies import quantized_runs

# What was asked for, in the new run: by it the rest is done after a stop.
ASKED = "quantize.json"
PRUNED = "pruned"
KEPT = ("run", "quantize", "prune", "low_rank", "epochs", "dataset", "data_dir", "base", "seed")


def is_begun(directory: str) -> bool:
    """Returns whether a quantized run was begun there."""
    return bool(directory) and (Path(directory) / ASKED).exists()


def run(config: Any, prune: Callable[[Any], int]) -> int:
    """Quantizes a run as flags say, after pruning it where they say so; returns the exit code.

    Args:
      config: of `cnnjax compress`.
      prune: what prunes and factors by such a config, and returns an exit code.

    Raises:
      UserError: whatever is wrong with flags, run or images, before long work starts.
    """
    if config.resume:
        config = _resumed(config)
        if (Path(config.out) / "model.json").exists():
            print(f"{config.out} is finished; nothing to do.")
            return 0
    scheme = compress.read_scheme(config.quantize)
    _check(config, scheme)
    source, out = Path(config.run), Path(config.out)
    if config.prune or config.low_rank:
        trained = load.load_classifier(source, base=config.base or None)
        _check_plain(source, trained)
        if scheme.samples != compress.Scheme.samples:
            # Before pruning trains for long.
            dataset, _ = _images(config, source, trained.card, scheme)
            if dataset is not None:
                quantized_runs.check_samples(dataset, scheme)
        _begin(config, out)
        source = out / PRUNED
        if not (source / "summary.json").exists():
            begun = (source / "config.json").exists()
            first = {"resume": str(source)} if begun else {"resume": "", "out": str(source)}
            code = prune(dataclasses.replace(config, quantize="", **first))
            if code or not (source / "summary.json").exists():
                return code
    return _quantize(config, scheme, source, out)


def _quantize(config: Any, scheme: compress.Scheme, source: Path, out: Path) -> int:
    settings = _training(config, scheme, source, out)
    if settings is None:
        cnnjax.devices.backend.start(devices=1)
    else:
        cnnjax.run.trainer.start(settings)
    # What pruning left has none.
    base = None if source.name == PRUNED else config.base or None
    trained = load.load_classifier(source, base=base)
    _check_plain(source, trained)
    dataset, labeled = _images(config, source, trained.card, scheme)
    images = None
    if dataset is not None:
        images = quantized_runs.choose_images(dataset, scheme, config.seed, labeled=labeled)
    _check_layers(trained, scheme)
    _begin(config, out)
    print(f"network      {trained.card['model']} of {source}, step {trained.step}")
    print(f"quantizing   {config.quantize}")
    if settings is not None and images is not None:
        result = quantized_runs.trained_run(trained, scheme, images, settings)
        if isinstance(result, int):
            return result
    else:
        result = quantized_runs.quantized_run(trained, scheme, images)
    found = _measured(config, trained, result, images)
    found["bytes"] = quantized_runs.write_run(
        out, trained, source, config.quantize, result, {"seed": config.seed}
    )
    files.write_json(out / quantized_runs.REPORT, found)
    print(_text(found, result))
    print(f"see          {out / quantized_runs.REPORT}")
    return 0


def _measured(config: Any, trained: Any, result: Any, images: Any) -> dict[str, Any]:
    """Returns what the report records."""
    found: dict[str, Any] = {"quantize": config.quantize, "layers": report.as_json(result.rows)}
    if images is not None and images.test[0]:
        networks = {"before": trained, "after": result}
        found["test_images"] = sum(map(len, images.test[0]))
        found["test_accuracy"] = {
            name: quantized_runs.accuracy(
                network.model, network.variables, trained.normalize, images.test
            )
            for name, network in networks.items()
        }
    return found


def _text(found: dict[str, Any], result: Any) -> str:
    size = found["bytes"]
    lines = [
        compress.report_table(result.rows),
        f"on disk      {size['before']:,} bytes before, {size['after']:,} after: "
        f"{size['before'] / size['after']:.2f} times less",
    ]
    if "test_accuracy" in found:
        scores = found["test_accuracy"]
        lines.append(
            f"test         accuracy {scores['before']:.4f} before, {scores['after']:.4f} after "
            f"({found['test_images']:,} images)"
        )
    return "\n".join(lines)


def _check(config: Any, scheme: compress.Scheme) -> None:
    """Raises a UserError for flags that are missing or contradict each other."""
    record.read_config(Path(config.run))
    if not config.out:
        raise UserError("no directory for the new run given: name it with --out OUT.")
    out = Path(config.out)
    if not config.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} is there already, and nothing is written over: choose another, or go on "
            f"with --resume {out}."
        )
    if config.sensitivity:
        raise UserError("--sensitivity is of pruning: --quantize measures each layer by itself.")
    prunes = config.prune or config.low_rank
    if config.epochs and not prunes:
        raise UserError(
            f"--epochs {config.epochs} is of pruning: write --quantize "
            f'"int8(qat=true, epochs={config.epochs})".'
        )
    if config.stop_after_epochs and not (scheme.qat or prunes):
        raise UserError("--stop-after-epochs is for training: add qat=true to --quantize.")
    if scheme.qat and not isinstance(scheme.weights, int):
        raise UserError(f"qat trains codes, and {scheme.weights} has none: give int8 or int4.")


def _resumed(config: Any) -> Any:
    """Returns the config of what was begun, with the directories that are given now."""
    path = Path(config.resume) / ASKED
    asked = files.read_json(path, f"{config.resume} is damaged")
    for name in KEPT:
        given, default = getattr(config, name), getattr(type(config), name)
        places = ("dataset", "data_dir", "base")
        if given not in (default, asked[name]) and name not in places:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {given} differs from the resumed run's {asked[name]}: drop the flag, or "
                "start a new run."
            )
    known = {name: getattr(config, name) or asked[name] for name in KEPT}
    return dataclasses.replace(config, **known, out=config.resume)


def _begin(config: Any, out: Path) -> None:
    files.make_directory(out, "the new run", "--out")
    asked = {name: getattr(config, name) for name in KEPT}
    files.write_json(out / ASKED, asked | {"run": str(Path(config.run).absolute())})


def _training(
    config: Any, scheme: compress.Scheme, source: Path, out: Path
) -> quantized_runs.Training | None:
    """Returns the settings of training with rounded weights; None where there is none."""
    if not scheme.qat:
        return None
    if not config.dataset:
        again.check_data_known(source)
    others = {n: getattr(config, n) for n in ("dataset", "data_dir") if getattr(config, n)}
    own = dataclasses.replace(again.settings_of_run(source), **others)
    return quantized_runs.training_settings(
        own,
        str(source),
        config.quantize,
        scheme,
        out,
        stop_after_epochs=config.stop_after_epochs,
        devices=config.devices,
    )


def _check_plain(source: Path, trained: load.TrainedModel) -> None:
    """Raises a UserError for what cannot be quantized."""
    if "frozen" in trained.variables:
        raise UserError(
            f"{source} is a model with adapters, which have no place in a quantized one: fine-tune "
            "with lora, whose changes are merged."
        )
    if "quantize" in trained.card:
        made_from = trained.card["quantize"]["source"]
        raise UserError(
            f"{source} is quantized already: quantize what it was made from, {made_from}."
        )


def _check_layers(trained: load.TrainedModel, scheme: compress.Scheme) -> None:
    """Raises a UserError for patterns of layers that match nothing, before anything is computed."""
    program = compress.quantization.traced.trace(
        trained.model, trained.variables, trained.card["image_shape"]
    )
    paths = [path for path, layer in program.layers.items() if layer.has_kernel]
    schemes.selected(paths, scheme.layers, scheme.skip)


def _images(
    config: Any, source: Path, card: dict[str, Any], scheme: compress.Scheme
) -> tuple[Any, bool]:
    """Returns the images to use, or None; and whether their labels are the network's classes."""
    saved = record.read_config(source)
    known = saved["settings"].get("dataset") and saved["experiment"] != "cnnjax.convert"
    if config.dataset and config.dataset != saved["settings"].get("dataset"):
        # Images of a fixed size stay as they are: a wrong one is told, not resized.
        sized = ":" in config.dataset
        dataset = cnnjax.data.open_dataset(
            config.dataset,
            data_dir=config.data_dir or None,
            image_size=tuple(card["image_shape"][:2]) if sized else None,
            fit=card.get("fit", "pad"),
        )
    elif known:
        dataset = again.data_of_run(source, data_dir=config.data_dir)
    elif scheme.needs_images:
        raise UserError(
            f"{source} does not say what it was trained on, and activations are calibrated on "
            "images: name some with --dataset, or give int8(weights_only=true)."
        )
    else:
        print("accuracy     is not measured: no --dataset is given")
        return None, False
    if not isinstance(dataset, cnnjax.data.Dataset):
        raise UserError(f"{dataset.name} is streamed: give a --dataset that fits in memory.")
    quantized_runs.check_shape(dataset, card)
    labeled = list(dataset.class_names) == list(card["class_names"])
    if not labeled:
        print(f"accuracy     is not measured: {dataset.name} has other classes than the network")
    return dataset, labeled
