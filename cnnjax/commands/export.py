"""Write a run's network as a file for other programs, and prove that it answers the same.

    cnnjax export --run RUN --out model.onnx
    cnnjax export --run RUN --out model.tflite --precision int8 --check 1000
    cnnjax export --run RUN --out model.stablehlo --platforms cpu tpu
    cnnjax export --run RUN --format saved_model --out model
    cnnjax export --run RUN --format web --out page    # open page/index.html

The file is run in its own runtime (ONNX Runtime, LiteRT, TensorFlow, jax.export) on test images of
the run. What is printed: the largest difference of logits, how often both answer the same, both
accuracies, size and latency. A file that is beyond the tolerance is not called by the name that was
asked for but NAME.rejected.SUFFIX, and the exit code is 1.

By default a file takes images as they are stored, uint8, and normalizes them itself; see
--preprocess. Class names and preprocessing are in the metadata of ONNX files, and beside others as
FILE.json. Adapters of low rank (LoRA) are merged first. See docs/export.md.
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import files, load

# Images of noise are answered with, where a run's own are not known.
SEED = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Write a run's network as ONNX, StableHLO, LiteRT or TensorFlow SavedModel, and check it."""

    run: str
    """The run directory."""

    out: Path
    """The file to write (.onnx, .stablehlo or .tflite), or the folder of a SavedModel or page."""

    format: Literal["", "onnx", "stablehlo", "tflite", "saved_model", "web"] = ""
    """By default what the suffix of --out says. web: a page that runs the network in a browser."""

    check: int = 256
    """Test images on which the file is compared with the network; 0 for no check."""

    preprocess: str = "normalize"
    """none: the file takes float32 images as the network expects them; normalize: uint8 images as
    they are stored; resize:HEIGHTxWIDTH: uint8 images of that size, scaled in the file."""

    batch: int | None = None
    """Images in a call, fixed; 0 for any number. By default any, but 1 of a .tflite file, whose
    converter joins operators then and makes it several times as fast."""

    precision: Literal["", "float32", "float16", "int8"] = ""
    """Of a .tflite file: float16 weights, or int8 weights and activations. By default float32; a
    quantized run keeps its integers, in every format."""

    calibration: int = 200
    """Training images that int8 is calibrated with."""

    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    """Of a .stablehlo file: where it can run (cpu, cuda, rocm, tpu)."""

    channels_first: bool = False
    """Of an .onnx file: take [batch, channels, height, width], as PyTorch's do."""

    tolerance: float | None = None
    """Largest difference of logits, relative to the largest logit; by default 1e-4, of float16
    2e-2, of int8 any."""

    agreement: float | None = None
    """Fraction of images that must be answered alike; by default 0.99 of int8, otherwise any."""

    runtime: str = ""
    """Of a page: ONNX Runtime Web, the archive or folder of its npm package; by default it is
    fetched by npm, once."""

    threads: int = 0
    """Of the runtime while it is checked; 0 for as many as it takes."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""


def main(config: Config) -> int:
    """Writes the file, checks it, and returns 1 where it does not answer as the network does."""
    from cnnjax.export import comparison, formats, preprocessing

    _check(config)
    kind = formats.kind_of(config.out, config.format)
    if config.batch is None:
        config = dataclasses.replace(config, batch=1 if kind == "tflite" else 0)
    options = formats.Options(
        precision=config.precision or "float32",
        platforms=config.platforms,
        channels_first=config.channels_first,
        runtime=config.runtime,
    )
    formats.check(kind, options)
    cnnjax.devices.backend.start(devices=1)
    if config.check and kind == "stablehlo":
        _check_runs_here(config.platforms)
    read = load.load_classifier if kind == "web" else load.load_trained
    trained = read(config.run, base=config.base or None)
    model, variables = _in_float32(trained), trained.variables
    is_quantized = isinstance(model, cnnjax.compress.Quantized)
    if is_quantized and config.precision:
        raise UserError(
            f"--precision {config.precision}: {config.run} is quantized, and its file is as it is; "
            "leave it out, or export the run that it was made from."
        )
    files.make_directory(config.out.absolute().parent, "the folder of the file", "--out")
    made = preprocessing.make(
        config.preprocess, trained.normalize, _image_shape(trained), batch=config.batch or None
    )
    own = cnnjax.export.forward_of(model, made.change, integers=True)
    if kind == "tflite" and is_quantized:
        if _has_integers(model):
            codes = cnnjax.compress.quantization_parameters(model, variables)
            options = dataclasses.replace(options, precision="int8", codes=codes)
        model, variables = cnnjax.compress.dequantized(model, variables)
    tested = _images(config, trained, made, int8=options.precision == "int8")
    if options.precision == "int8":
        options = dataclasses.replace(options, calibration=tested.calibration if tested else None)
    forward = cnnjax.export.forward_of(model, made.change)
    precision = "int8" if is_quantized else options.precision
    said = preprocessing.metadata(
        trained.card, made, run=Path(config.run).name, step=trained.step, precision=precision
    )
    if kind == "web":
        is_digit = trained.card.get("dataset") in load.MNIST
        said |= {"prepare": "digit" if is_digit else "image"}
    if config.channels_first:
        said = preprocessing.with_channels_first(said)
    temporary = config.out.with_name(f".{config.out.stem}.unchecked{config.out.suffix}")
    _remove(temporary)
    try:
        scales = formats.write(
            temporary,
            kind,
            forward,
            variables,
            made.signature,
            metadata=said,
            options=options,
        )
        if scales is not None:
            print(scales.table())
        good = True
        if tested is not None and config.check:
            logits = comparison.logits_of(own, trained.variables, tested.images)
            good = _compared(config, kind, temporary, tested, logits, precision)
        out = config.out if good else rejected(config.out)
        _put(temporary, out)
    finally:
        _remove(temporary)
    lengths = ", ".join(map(str, said["input_shape"]))
    print(f"takes     {said['input_dtype']} [{lengths}], preprocessing {config.preprocess}")
    if good:
        print(f"written   {out}" + ("" if config.check else ", not checked"))
        return 0
    print(f"REJECTED  it does not answer as the network does: kept as {out}")
    return 1


def rejected(out: Path) -> Path:
    """Returns the name of a file that failed its check."""
    return out.with_name(f"{out.stem}.rejected{out.suffix}")


def _check(config: Config) -> None:
    for name in ("check", "batch", "threads"):
        if (getattr(config, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: give 0 or more.")
    if config.calibration < 1:
        raise UserError(f"--calibration {config.calibration}: give at least 1 image.")
    cnnjax.export.preprocessing.parse(config.preprocess)
    for name in ("tolerance", "agreement"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name} {value}: give a number from 0 to 1.")
    if config.out.is_dir() and config.format not in ("saved_model", "web"):
        raise UserError(f"--out {config.out} is a folder: name a file in it.")
    if config.format == "web":
        _check_page(config)
    if config.format in ("saved_model", "web"):
        _check_folder(config.out)
    if config.check:
        from cnnjax.export.packages import require

        require(cnnjax.export.formats.kind_of(config.out, config.format), running=True)


def _check_folder(out: Path) -> None:
    """Raises a UserError unless what a folder is to be written over was written by this command."""
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: give the new folder's name.")
    for path in (out, rejected(out)):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out}: {path} is a file; name a new folder.")
        ours = (path / "saved_model.pb").exists() or cnnjax.export.web.is_page(path)
        if path.is_dir() and any(path.iterdir()) and not ours:
            raise UserError(f"--out {out}: {path} holds other files; name a new folder.")


def _check_page(config: Config) -> None:
    if config.preprocess != Config.preprocess:
        raise UserError(
            f"--preprocess {config.preprocess}: a page prepares images as the run's; leave it out."
        )
    if (config.batch or 1) != 1:
        raise UserError(f"--batch {config.batch}: a page has one image at a time; leave it out.")


def _check_runs_here(platforms: tuple[str, ...]) -> None:
    import jax

    here = jax.default_backend()
    if here not in platforms and not (here == "gpu" and {"cuda", "rocm"} & set(platforms)):
        raise UserError(
            f"--platforms {' '.join(platforms)}: the file could not be run here, on {here}: add "
            f"{here}, or leave the comparison to another machine by --check 0."
        )


def _in_float32(trained: load.TrainedModel) -> Any:
    """Returns the network as it was trained, but computing in float32."""
    from cnnjax import finetune, models

    model = trained.model
    # Factors of low rank are merged where a run is read back.
    if trained.card.get("finetune", {}).get("method", {}).get("lora_ranks"):
        print("LoRA      merged into the kernels")
    if isinstance(model, finetune.FineTuned):
        print("adapters  stay, as layers of their own")
        return dataclasses.replace(model, model=models.with_fields(model.model, dtype=None))
    return models.with_fields(model, dtype=None) if "dtype" in models.fields(model) else model


def _has_integers(model: Any) -> bool:
    """Whether a quantized model is for LiteRT's integer kernels, rather than of few bits on the
    disk alone."""
    activations = {plan.activations for _, plan in model.layers}
    if activations == {0}:
        print("LiteRT    computes such weights in float32: they are written so")
        return False
    if activations != {8} or any(isinstance(plan.weights, str) for _, plan in model.layers):
        raise UserError(
            "LiteRT's integer kernels take 8 bits for activations, in all layers: quantize the run "
            "by int8 or int4(activations=8), or export it as onnx."
        )
    return True


def _image_shape(trained: load.TrainedModel) -> tuple[int, int, int]:
    if "image_shape" not in trained.card:
        raise UserError(
            "the run's model.json does not say which images it takes: export it from Python, by "
            "cnnjax.export."
        )
    height, width, channels = trained.card["image_shape"]
    return height, width, channels


@dataclasses.dataclass(frozen=True)
class _Tested:
    """Images as the file takes them, labels where they are known, and images for calibration."""

    images: np.ndarray
    labels: np.ndarray | None
    calibration: np.ndarray | None


def _images(config: Config, trained: load.TrainedModel, made: Any, *, int8: bool) -> _Tested | None:
    """Returns test images; noise where those of the run are not known."""
    if not config.check and not int8:
        return None
    try:
        test, train = _splits(config)
    except UserError as error:
        if config.dataset or int8:
            raise
        print(f"checked on noise, without labels: {error}")
        test, train = _noise(config.check, _image_shape(trained)), None
    shape = _image_shape(trained)
    for images in filter(None, (test, train)):
        if images["image"].shape[1:] != shape:
            raise UserError(
                f"the images are {images['image'].shape[1:]}, and the network takes {shape}: name "
                "the run's own by --dataset."
            )
    count = config.calibration
    if int8 and train and len(train["image"]) < count != Config.calibration:
        raise UserError(
            f"--calibration {count}: there are {len(train['image']):,} training images: give at "
            "most that many."
        )
    calibration = _as_taken(train["image"][:count], trained, made) if int8 and train else None
    labels = test.get("label")
    return _Tested(
        _as_taken(test["image"][: config.check], trained, made),
        None if labels is None else labels[: config.check],
        calibration,
    )


def _splits(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the arrays `image` and perhaps `label` of the test and the training split."""
    from cnnjax.run import again

    if load.task_of(config.run) == "classification":
        dataset: Any = again.data_of_run(Path(config.run), dataset=config.dataset)
        spread = cnnjax.data.streamed.spread_examples
        test = spread(dataset, "test", config.check)._asdict()
        return test, spread(dataset, "train", config.calibration)._asdict()
    dataset = again.recipe_of_run(config.run).dataset
    if not isinstance(dataset, cnnjax.data.ArrayDataset):
        raise UserError(f"{dataset.name} is streamed: give a --dataset that fits memory.")
    parts = [dataset.test, dataset.train]
    if any("image" not in part for part in parts):
        raise UserError("the run's data have no images called image.")
    # What is not one label an image is no answer to compare with here.
    test, train = ({"image": part["image"]} for part in parts)
    return test, train


def _noise(count: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(SEED).integers(0, 256, (count, *shape), np.uint8)
    return {"image": draws}


def _as_taken(stored: np.ndarray, trained: load.TrainedModel, made: Any) -> np.ndarray:
    """Returns stored images as the file takes them."""
    if made.change is None:
        return np.asarray(trained.normalize(stored))
    shape = made.signature.shape
    if stored.shape[1:] == shape:
        return stored
    fit = cnnjax.data.image_to_shape
    return np.stack([fit(image, shape, fit="resize") for image in stored])


def _compared(
    config: Config, kind: str, path: Path, tested: _Tested, logits: np.ndarray, precision: str
) -> bool:
    """Prints the comparison, and returns whether the file is within the limits."""
    from cnnjax.export import comparison, runtimes

    run = runtimes.opened(path, kind, threads=config.threads or None)
    if config.channels_first:
        inner = run
        run = lambda images: inner(images.transpose(0, 3, 1, 2))  # noqa: E731
    found = comparison.compare(
        run,
        tested.images,
        logits,
        limits=comparison.limits_for(precision, config.tolerance, config.agreement),
        path=path,
        labels=tested.labels,
        fixed=config.batch or None,
    )
    print(found.table())
    return found.good


def _put(temporary: Path, out: Path) -> None:
    """Gives the file, and what lies beside it, its name."""
    from cnnjax.export.formats import beside

    _remove(out)
    os.replace(temporary, out)
    if beside(temporary).exists():
        os.replace(beside(temporary), beside(out))


def _remove(path: Path) -> None:
    from cnnjax.export.formats import beside

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    beside(path).unlink(missing_ok=True)
