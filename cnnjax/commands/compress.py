"""Make a trained classifier smaller: weights and activations of few bits.

    cnnjax compress --run RUN --quantize "int8(calibration=percentile, samples=512)" --out RUN2
    cnnjax compress --run RUN --quantize "int8(qat=true, epochs=2)" --out RUN2
    cnnjax compress --run RUN --quantize "mixed(max_size=0.15)" --out RUN2

Writes a run like any other, which predict, evaluate, explain and export take, and prints the
accuracy on test images before and after, the size on disk, and what was done to each layer.
RUN2/quantization.json has the same numbers. See docs/quantize.md.
"""

import dataclasses
from pathlib import Path

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import files, load, record


@dataclasses.dataclass(frozen=True)
class Config:
    """Quantize a classifier, and say what that costs."""

    run: str
    """The run directory."""

    quantize: str = ""
    """How, such as "int8(calibration=mse)" or "int4(skip=head)"."""

    out: str = ""
    """The directory of the new run; by default RUN-quantized."""

    dataset: str = ""
    """The images to calibrate and test on, such as folder:NEW; by default the run's own."""

    data_dir: str = ""
    """Where tfds datasets are; by default the run's own."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    seed: int = 0
    """Of the choice of calibration images."""

    stop_after_epochs: int = 0
    """With qat: stop there, to go on later by the same command; 0 does not stop."""

    smoke: bool = False
    """Use as many images as a smoke run has. The scores mean nothing."""


def main(config: Config) -> int:
    """Quantizes the run, and returns the exit code."""
    from cnnjax.studies import quantized_runs

    if not config.quantize:
        raise UserError('nothing to do: say how, such as --quantize "int8".')
    scheme = cnnjax.compress.read_scheme(config.quantize)
    run, out = Path(config.run), Path(config.out or f"{config.run.rstrip('/')}-quantized")
    record.read_config(run)
    if (out / "model.json").exists():
        raise UserError(f"{out} holds a run already: choose another --out.")
    settings = _training(config, scheme, out)
    if settings is None:
        cnnjax.devices.backend.start(devices=1)
    else:
        cnnjax.run.trainer.start(settings)
    trained = load.load_classifier(run, base=config.base or None)
    _check_plain(run, trained)
    dataset, labeled = _dataset(config, run, trained.card, scheme)
    files.make_directory(out, "the new run", "--out")
    images = None
    if dataset is not None:
        images = quantized_runs.choose_images(dataset, scheme, config.seed, labeled=labeled)
    print(f"network      {trained.card['model']} of {run}, step {trained.step}")
    print(f"quantizing   {cnnjax.compress.quantization.schemes.describe(scheme)}")
    if settings is not None and images is not None:
        result = quantized_runs.trained_run(trained, scheme, images, settings)
        if isinstance(result, int):
            return result
    else:
        result = quantized_runs.quantized_run(trained, scheme, images)
    before, after = quantized_runs.write_run(out, trained, run, config.quantize, result)
    print(cnnjax.compress.report_table(result.rows))
    report = {
        "quantize": config.quantize,
        "bytes": {"before": before, "after": after},
        "layers": cnnjax.compress.quantization.report.as_json(result.rows),
    }
    print(f"on disk      {before:,} bytes before, {after:,} after: {before / after:.2f} times less")
    if images is not None and images.test[0]:
        scores = {
            name: quantized_runs.accuracy(model, variables, trained.normalize, images.test)
            for name, model, variables in (
                ("before", trained.model, trained.variables),
                ("after", result.model, result.variables),
            )
        }
        report["test_accuracy"] = scores
        print(
            f"test         accuracy {scores['before']:.4f} before, {scores['after']:.4f} after "
            f"({sum(map(len, images.test[0])):,} images)"
        )
    files.write_json(out / quantized_runs.REPORT, report)
    print(f"see          {out / quantized_runs.REPORT}")
    return 0


def _training(config, scheme, out):
    """Returns the settings of training with rounded weights; None where there is none."""
    from cnnjax.run import again
    from cnnjax.studies import quantized_runs

    if not scheme.qat:
        if config.stop_after_epochs:
            raise UserError("--stop-after-epochs is for training: add qat=true to --quantize.")
        return None
    if not isinstance(scheme.weights, int):
        raise UserError(f"qat trains codes, and {scheme.weights} has none: give int8 or int4.")
    if not config.dataset:
        again.check_data_known(config.run)
    others = {"stop_after_epochs": config.stop_after_epochs, "smoke": config.smoke}
    others |= {n: getattr(config, n) for n in ("dataset", "data_dir") if getattr(config, n)}
    own = dataclasses.replace(again.settings_of_run(config.run), **others)
    others = {name: getattr(own, name) for name in ("stop_after_epochs", "smoke")}
    return quantized_runs.training_settings(own, config.run, config.quantize, scheme, out, **others)


def _check_plain(run, trained):
    """Raises a UserError for what cannot be quantized."""
    if "frozen" in trained.variables:
        raise UserError(
            f"{run} is a model with adapters, which have no place in a quantized one: fine-tune "
            "with lora, whose changes are merged."
        )
    if "quantize" in trained.card:
        source = trained.card["quantize"]["source"]
        raise UserError(f"{run} is quantized already: quantize what it was made from, {source}.")


def _dataset(config, run, card, scheme):
    """Returns the images to use, or None; and whether their labels are the network's classes."""
    from cnnjax.run import again
    from cnnjax.studies import quantized_runs

    known = "dataset" in record.read_config(run)["settings"]
    is_trained_here = record.read_config(run)["experiment"] != "cnnjax.convert"
    if config.dataset:
        shape = card["image_shape"]
        dataset = cnnjax.data.open_dataset(
            config.dataset,
            data_dir=config.data_dir or None,
            image_size=tuple(shape[:2]) if ":" in config.dataset else None,
            fit=card.get("fit", "pad"),
        )
    elif known and is_trained_here:
        dataset = again.data_of_run(run, data_dir=config.data_dir)
    else:
        if scheme.needs_images:
            again.check_data_known(run)
        print("accuracy     is not measured: no --dataset is given")
        return None, False
    if not isinstance(dataset, cnnjax.data.Dataset):
        raise UserError(f"{dataset.name} is streamed: give a --dataset that fits in memory.")
    quantized_runs.check_shape(dataset, card)
    if config.smoke:
        dataset = cnnjax.run.trainer.shrink(dataset)
    labeled = list(dataset.class_names) == list(card["class_names"])
    if not labeled:
        print(f"accuracy     is not measured: {dataset.name} has other classes than the network")
    return dataset, labeled
