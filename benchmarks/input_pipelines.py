"""Times each stage of the input against the training step, and says which of them starves it.

    python benchmarks/input_pipelines.py
    python benchmarks/input_pipelines.py --model cnn_32_64 --batch-size 128 --rounds 5
    python benchmarks/input_pipelines.py --dataset tfds:imagenette/160px-v2:1.0.0 \\
        --image-size 160 --model resnet18

Three tables, all in images per second: the stages apart (reading and decoding what tfds has stored,
augmenting on the host and on the device, moving a batch to the device); the pipelines that put
them together, with nobody training; and training, fed by each of them. On a CPU the input and the
step share the cores, so that only the last table shows what is lost.

`input_peers.py` compares reading JPEG files with other libraries.

`mnist` needs no network: it is prepared for tfds in a temporary directory, unless it already is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cnnjax import augment as augment_lib
from cnnjax.devices.sharding import batch_sharding, check_batch_size, replicated
from cnnjax.errors import UserError
from cnnjax.paths import expand_flags
from cnnjax.run.exits import one_line_errors
from cnnjax.tasks.classification import classification

ROTATION_DEGREES, TRANSLATION_PIXELS = 10.0, 2.0
MOST_ENCODED = 4096
# A pipeline this much slower than resident data slows training by more than noise does.
TOLERANCE = 0.9

READ, DECODE, TRANSFER = "read from disk", "decode", "transfer to the device"
HOST_AUGMENT = "augment on the host (crop, brightness)"
STEP_ALONE, WHOLE_EPOCH = "one batch, over and over", "resident, an epoch a call"
STAGES_OF = {
    "resident": (),
    "stream_arrays": (TRANSFER,),
    "stream_tfds": (READ, DECODE, TRANSFER),
}

# Runs for about this many seconds and returns (images, seconds).
Measure = Callable[[float], tuple[int, float]]


class Setting(NamedTuple):
    """What is fed to what."""

    dataset: Any
    tfds_name: str
    data_dir: str | None
    image_size: tuple[int, int] | None
    model: str
    batch_size: int
    mesh: Any


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    from cnnjax.devices import backend

    with one_line_errors(), contextlib.ExitStack() as stack:
        check(options)
        backend.start(options.devices, batch_size=options.batch_size)
        setting = open_setting(options, stack)
        print(f"{backend.describe()}; {setting.model}, {setting.dataset.name}, ", end="")
        print(f"batch {setting.batch_size}, images {setting.dataset.image_shape}\n", flush=True)
        stages = measure_all(stage_measures(setting), options)
        print_table("stage, alone", stages)
        alone = {name: make_pipeline(setting, name).batches(0) for name in STAGES_OF}
        pipelines = measure_all({name: draining(alone[name]) for name in alone}, options)
        # Closed, so that none reads ahead while others are measured.
        alone.clear()
        print_table("pipeline, alone", pipelines)
        trained = measure_all(training_measures(setting), options)
        print_table("training, fed by", trained)
        print("\n".join(verdicts(stages, pipelines, trained)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="lenet5", help="a name that `cnnjax models` lists (lenet5)")
    add("--dataset", default="mnist", help="mnist or tfds:NAME, prepared (default mnist)")
    add("--data-dir", help="where tfds datasets are")
    add("--image-size", type=int, help="side that images are resized to, where they differ")
    add("--batch-size", type=int, default=64, help="default 64")
    add("--devices", type=int, default=0, help="default: as experiments choose")
    add("--rounds", type=int, default=3, help="measurements of each (default 3)")
    add("--seconds", type=float, default=1.0, help="length of a measurement (default 1)")
    return parser.parse_args(expand_flags(argv))


def check(options: argparse.Namespace) -> None:
    """Raises UserError for numbers and datasets of no use."""
    for name in ("batch_size", "rounds", "seconds"):
        if not getattr(options, name) > 0:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)}: give a positive number")
    if options.dataset != "mnist" and not options.dataset.startswith("tfds:"):
        raise UserError(f"--dataset {options.dataset!r}: give mnist or tfds:NAME")


def open_setting(options: argparse.Namespace, stack: contextlib.ExitStack) -> Setting:
    """Loads the data, and prepares MNIST for tfds where nobody has."""
    from cnnjax import data, models
    from cnnjax.data import tfds_source
    from cnnjax.models.summary import summary
    from cnnjax.train import compile as parallel

    dataset = data.load(
        options.dataset, data_dir=options.data_dir, image_size=options.image_size, fit="resize"
    )
    tfds_name = options.dataset.removeprefix("tfds:")
    data_dir = options.data_dir
    if options.dataset == "mnist" and not tfds_source.is_prepared(
        tfds_source.find_builder(tfds_name, data_dir)
    ):
        data_dir = stack.enter_context(tempfile.TemporaryDirectory())
        print("preparing mnist for tfds ...", flush=True)
        tfds_source.prepare_shipped_mnist(tfds_source.find_builder(tfds_name, data_dir))
    model = models.create(options.model, num_classes=dataset.num_classes)
    macs = options.batch_size * summary(model, dataset.image_shape).macs
    mesh = parallel.choose_mesh(options.devices, macs)
    check_batch_size(options.batch_size, mesh)
    size = (options.image_size, options.image_size) if options.image_size else None
    return Setting(dataset, tfds_name, data_dir, size, options.model, options.batch_size, mesh)


def measure_all(
    measures: dict[str, Measure], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Returns images per second of each, measured in turns; the first turn is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(options.rounds + 1):
        for name, measure in measures.items():
            images, seconds = measure(options.seconds)
            if number:
                rates[name].append(images / seconds)
    return rates


def timed(run: Callable[[], int]) -> Measure:
    """Returns a measure that calls `run`, which returns how many images it has dealt with."""

    def measure(seconds: float) -> tuple[int, float]:
        images, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not images:
            images += run()
        return images, elapsed

    return measure


def draining(batches: Iterator[dict[str, Any]]) -> Measure:
    """Returns a measure that takes batches and waits until each is on the device."""
    import jax

    def take() -> int:
        return len(jax.block_until_ready(next(batches))["label"])

    return timed(take)


def stage_measures(setting: Setting) -> dict[str, Measure]:
    """The stages, each alone and on data that are at hand."""
    import jax

    from cnnjax.data.batches import place

    image = setting.dataset.train.image[: setting.batch_size]
    host = {"image": image, "label": setting.dataset.train.label[: setting.batch_size]}
    sharding = batch_sharding(setting.mesh)
    floats = jax.device_put(augment_lib.normalize(image, 0.0, 1.0), sharding)
    key = jax.random.key(0)
    affine = augment_lib.random_affine(
        rotation_degrees=ROTATION_DEGREES, translation_pixels=TRANSLATION_PIXELS
    )
    augment = jax.jit(lambda key, images: augment_lib.apply_per_image(key, images, affine))

    def transfer() -> int:
        jax.block_until_ready(place(host, sharding))
        return len(image)

    def augment_on_device() -> int:
        augment(key, floats).block_until_ready()
        return len(image)

    return {
        **encoded_measures(setting),
        "augment on the device (rotation, shift)": timed(augment_on_device),
        TRANSFER: timed(transfer),
    }


def encoded_measures(setting: Setting) -> dict[str, Measure]:
    """Reading stored examples, decoding them, and augmenting decoded ones with TensorFlow."""
    import tensorflow_datasets as tfds

    from cnnjax.data import tfds_source

    tf = tfds_source.tensorflow()
    builder = tfds_source.prepared_builder(setting.tfds_name, setting.data_dir)
    image_key = tfds_source.image_features(builder).image
    feature = builder.info.features[image_key]
    stored = builder.as_dataset(
        split="train",
        decoders={image_key: tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(try_autocache=False),
    ).map(lambda example: example[image_key])
    # Decoding is to be measured without reading, augmenting without decoding.
    encoded = list(stored.take(MOST_ENCODED).as_numpy_iterator())
    in_memory = tf.data.Dataset.from_tensor_slices(encoded).repeat()
    decoded = tf.data.Dataset.from_tensor_slices(
        setting.dataset.train.image[: setting.batch_size]
    ).repeat()
    augment = host_augment()

    def batches(dataset: Any, transform: Any = None) -> Iterator[Any]:
        if transform is not None:
            dataset = dataset.map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        if setting.image_size is not None and transform is feature.decode_example:
            dataset = dataset.map(tfds_source.tensor_fitter(setting.image_size, "resize"))
        return dataset.batch(setting.batch_size).prefetch(2).as_numpy_iterator()

    def measure(batches: Iterator[Any]) -> Measure:
        return timed(lambda: len(next(batches)))

    seed = tf.constant([0, 0], tf.int64)
    return {
        READ: measure(batches(stored.repeat())),
        DECODE: measure(batches(in_memory, feature.decode_example)),
        HOST_AUGMENT: measure(batches(decoded, lambda image: augment(image, seed))),
    }


def host_augment() -> Any:
    """Returns `(image, seed) -> image` of TensorFlow: padded, cropped at random, brightened."""
    from cnnjax.data import tfds_source

    tf = tfds_source.tensorflow()

    def augment(image: Any, seed: Any) -> Any:
        shape = tf.shape(image)
        larger = tf.pad(image, [[2, 2], [2, 2], [0, 0]])
        cropped = tf.image.stateless_random_crop(larger, shape, seed)
        brighter = tf.image.stateless_random_brightness(cropped, 0.1, seed)
        return tf.ensure_shape(brighter, image.shape)

    return augment


def make_pipeline(setting: Setting, name: str, augmented: bool = False) -> Any:
    """Returns one of the library's pipelines; only those that stream can augment on the host."""
    from cnnjax import data

    sharding = batch_sharding(setting.mesh)
    augment = host_augment() if augmented else None
    if name == "resident":
        return data.ResidentPipeline(
            setting.dataset.train,
            setting.batch_size,
            seed=0,
            sharding=sharding,
            replicated=replicated(setting.mesh),
        )
    if name == "stream_arrays":
        return data.stream_arrays(
            setting.dataset.train,
            setting.batch_size,
            seed=0,
            host_augment=augment,
            sharding=sharding,
        )
    return data.stream_tfds(
        setting.tfds_name,
        "train",
        setting.batch_size,
        seed=0,
        data_dir=setting.data_dir,
        image_size=setting.image_size,
        fit="resize",
        host_augment=augment,
        sharding=sharding,
    )


def training_measures(setting: Setting) -> dict[str, Measure]:
    """Training fed by each pipeline; one batch over and over is what the step itself can eat."""
    feeds = {STEP_ALONE: ("resident", False, "jit")}
    feeds[WHOLE_EPOCH] = ("resident", False, "scan")
    for name in STAGES_OF:
        feeds[name] = (name, False, "jit")
    for name in ("stream_arrays", "stream_tfds"):
        feeds[f"{name}, augmented on the host"] = (name, True, "jit")
    return {
        label: training(
            setting, make_pipeline(setting, name, augmented), method, label == STEP_ALONE
        )
        for label, (name, augmented, method) in feeds.items()
    }


def training(setting: Setting, pipeline: Any, method: str, repeat: bool) -> Measure:
    """Returns a measure of the compiled training step of `cnnjax`, fed by `pipeline`."""
    import jax

    from cnnjax import models, optim, schedules
    from cnnjax.train import compile as parallel
    from cnnjax.train import feeding
    from cnnjax.train import step as steps
    from cnnjax.train.state import create_state

    dataset, mesh = setting.dataset, setting.mesh
    if repeat:
        pipeline = feeding.repeated(pipeline)
    model = models.create(setting.model, num_classes=dataset.num_classes)
    normalize = functools.partial(augment_lib.normalize, mean=dataset.mean, std=dataset.std)
    schedule = schedules.constant(0.01, total_steps=1)
    optimizer = optim.make_optimizer("momentum", schedule)
    key = jax.random.key(0)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(key, normalize(dataset.train.image[:1]))
    state = jax.device_put(create_state(variables, optimizer, key), replicated(mesh))

    def make_step(axis_name: str | None) -> Any:
        return steps.make_step(
            model,
            optimizer,
            classification(dataset.num_classes),
            schedule=schedule,
            normalize=normalize,
            axis_name=axis_name,
        )

    train = parallel.compile_train(make_step, state, pipeline, method=method, mesh=mesh)
    chunk = 1

    def chunks() -> Iterator[int]:
        while True:
            yield chunk

    # One call for all measurements: the pipeline stays open, as it does in training.
    trained = train(state, 0, chunks())

    def measure(seconds: float) -> tuple[int, float]:
        nonlocal chunk
        num_steps, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not num_steps:
            jax.block_until_ready(next(trained)[0])
            num_steps += chunk
        # From now on about five chunks a measurement, so that few waits fall between steps.
        chunk = max(1, round(num_steps * seconds / elapsed / 5))
        return num_steps * setting.batch_size, elapsed

    return measure


def verdicts(
    stages: dict[str, list[float]],
    pipelines: dict[str, list[float]],
    trained: dict[str, list[float]],
) -> list[str]:
    """Returns one sentence for each pipeline: whether it keeps the step busy, and what does not."""
    median = {name: statistics.median(rates) for name, rates in (stages | trained).items()}
    alone = {name: statistics.median(rates) for name, rates in pipelines.items()}
    step = median[STEP_ALONE]
    lines = [
        f"The step alone eats {step:,.0f} images/s, a step a call; with resident data and an epoch "
        f"a call it is {median[WHOLE_EPOCH]:,.0f}."
    ]
    for label in trained:
        name, _, augmented = label.partition(", ")
        if name not in STAGES_OF or label == WHOLE_EPOCH:
            continue
        share = median[label] / step
        if share >= TOLERANCE:
            lines.append(f"{label}: feeds the step ({share:.0%} of its speed).")
            continue
        used = [*STAGES_OF[name], *([HOST_AUGMENT] if augmented else [])]
        slowest = min(used, key=median.__getitem__, default=None)
        if slowest is None:
            reason = "gathering a batch is a call between the steps, which an epoch a call saves"
        elif median[slowest] < step:
            reason = f"its slowest stage is to {slowest}, {median[slowest]:,.0f} images/s alone"
        else:
            reason = (
                f"no stage alone is slower than the step (the slowest is to {slowest}, "
                f"{median[slowest]:,.0f} images/s), but they share the processor with it"
            )
        lines.append(
            f"{label}: starves the step ({share:.0%} of its speed); {reason}; the pipeline alone, "
            f"without augmentation, makes {alone[name]:,.0f} images/s."
        )
    return lines


def print_table(title: str, rates: dict[str, list[float]]) -> None:
    """Prints the median, the least and the most of each."""
    print(f"| {title} | images/s | min | max |\n|---|---|---|---|")
    for name, values in rates.items():
        cells = (statistics.median(values), min(values), max(values))
        print(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in cells) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
