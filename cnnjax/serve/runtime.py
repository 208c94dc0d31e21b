"""A run directory or an exported file as a function of images; once warm, it compiles nothing.

    runtime = open_runtime("runs/mnist_lenet", Options(largest_batch=32))
    logits, probabilities = runtime.run(images)      # uint8 [batch, 28, 28, 1]

Images are computed in batches of a few sizes, the buckets: 1, 2, 4 and so on. A batch is filled up
with black images to the next bucket, and what they answer is dropped. `open_runtime` compiles a
program for every bucket (and every image size) and runs each once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.explain import markup
from cnnjax.paths import expand

Shape = tuple[int, int, int]
# images `[bucket, height, width, channels]` -> logits and probabilities `[bucket, classes]`.
Call = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Of as many runs of one image, the quickest says how long it takes.
LONE_TRIES = 5
SUFFIXES = {".onnx": "onnx", ".tflite": "tflite", ".stablehlo": "stablehlo"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How models are opened.

    Attributes:
      largest_batch: images that are computed at once; the largest bucket.
      image_sizes: (height, width) pairs that are taken besides the one of training.
      prepare: how image files are prepared: `auto`, `image` or `digit`, as for `cnnjax predict`.
      explain: whether Grad-CAM is compiled, too, where the network allows it.
      base: where the base of a fine-tuned run is; empty for where it was.
      threads: of the runtimes of exported files; None for as many as they take.
    """

    largest_batch: int = 32
    image_sizes: tuple[tuple[int, int], ...] = ()
    prepare: str = "auto"
    explain: bool = True
    base: str = ""
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A model that is ready to answer.

    Attributes:
      source: the run directory or file.
      platform: what computes, such as `jax_run` or `onnx`.
      step: of the checkpoint; -1 where it is not known.
      shapes: `[height, width, channels]` of the images that are taken, that of training first.
      dtype: of the images, `uint8` or `float32`.
      class_names: one per class.
      num_logits: 1 for a network of one logit and two classes, else the classes.
      buckets: the batch sizes that are compiled, ascending.
      call: computes one whole bucket.
      prepare: an image file's pixels, uint8 `[height, width, 1, 3 or 4]` -> an image of shapes[0].
      explain: (image `[height, width, channels]`, class number) -> Grad-CAM `[height, width]` from
        0 to 1; None where there is none.
      parallel: whether several batches may be computed at once.
      warm_secs: how long compiling and warming up took.
      lone_secs: how long one image of the largest shape takes at best.
    """

    source: str
    platform: str
    step: int
    shapes: tuple[Shape, ...]
    dtype: str
    class_names: tuple[str, ...]
    num_logits: int
    buckets: tuple[int, ...]
    call: Call
    prepare: Callable[[np.ndarray], np.ndarray]
    explain: Callable[[np.ndarray, int], np.ndarray] | None = None
    parallel: bool = True
    warm_secs: float = 0.0
    lone_secs: float = math.inf

    @property
    def largest_batch(self) -> int:
        """The images that are computed at once."""
        return self.buckets[-1]

    def bucket(self, count: int) -> int:
        """Returns the batch size in which so many images are computed."""
        return next(bucket for bucket in self.buckets if bucket >= count)

    def run_parts(self, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits and probabilities `[images, classes]` of parts of one batch.

        Args:
          parts: arrays `[images, height, width, channels]` of one shape, together at most
            `largest_batch` images.
        """
        count = sum(map(len, parts))
        bucket = self.bucket(count)
        if len(parts) == 1 and count == bucket:
            batch = np.ascontiguousarray(parts[0])
        else:
            batch = np.zeros((bucket, *parts[0].shape[1:]), self.dtype)
            np.concatenate(parts, out=batch[:count])
        logits, probabilities = self.call(batch)
        return logits[:count], probabilities[:count]

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns logits and probabilities of any number of images, a largest batch at a time."""
        step = self.largest_batch
        parts = [self.run_parts([images[at : at + step]]) for at in range(0, len(images), step)]
        logits, probabilities = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(probabilities)


def start_jax() -> None:
    """Starts JAX on one device; on a CPU, each thread computes what it asks for.

    By default JAX leaves that to a thread of its own, and two threads are woken up for each batch.

    Raises:
      UserError: JAX cannot use the device that it is told to.
    """
    import jax

    from cnnjax.devices import backend

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    backend.start(devices=1)


def buckets_up_to(largest: int) -> tuple[int, ...]:
    """Returns 1, 2, 4 and so on, and the largest itself."""
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return (*powers, largest)


def check_options(options: Options) -> None:
    """Raises a UserError for options out of range."""
    if not 1 <= options.largest_batch <= 4096:
        raise UserError(f"--max-batch {options.largest_batch}: give 1 to 4096 images.")
    for height, width in options.image_sizes:
        if min(height, width) < 1 or max(height, width) > 4096:
            raise UserError(f"--sizes {height}x{width}: give sides of 1 to 4096 pixels.")


def check_source(path: str | Path) -> str:
    """Returns the platform of a source, `jax_run` or a format; nothing is loaded.

    Raises:
      UserError: no run directory and no exported file, or its runtime is not installed.
    """
    from cnnjax.export.packages import require
    from cnnjax.run.record import read_config

    found = Path(expand(path))
    if found.is_dir():
        read_config(found)
        return "jax_run"
    if found.suffix not in SUFFIXES:
        kinds = f"a run directory or a file that ends in {', '.join(SUFFIXES)}"
        what = "is none" if found.exists() else "is not there"
        raise UserError(f"{path} {what}: name {kinds}.")
    if not found.is_file():
        raise UserError(f"there is no file {path}: write it by cnnjax export.")
    require(SUFFIXES[found.suffix], running=True)
    return SUFFIXES[found.suffix]


def check_sizes(path: str | Path, options: Options) -> None:
    """Raises a UserError for image sizes that a source does not take; no weights are read.

    Args:
      path: a source that `check_source` has found good.
      options: whose `image_sizes` are tried.
    """
    if not options.image_sizes:
        return
    import jax
    import jax.numpy as jnp

    from cnnjax import models
    from cnnjax.run import load
    from cnnjax.run.files import read_json

    directory = Path(expand(path))
    if not directory.is_dir():
        raise UserError(f"--sizes: {path} takes images of one size; leave it out.")
    card = read_json(directory / "model.json", f"{directory} has not trained a model yet")
    if not {"num_outputs", "image_shape"} <= card.keys():
        return  # It is no classifier, which is said when it is opened.
    fields = load.computation(card["model"], card["arguments"], precision=card.get("precision"))
    network = models.create(card["model"], num_classes=card["num_outputs"], **fields)
    height, width, channels = card["image_shape"]

    def image_of(size: tuple[int, int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)

    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, image_of((height, width)))
    for size in options.image_sizes:
        try:
            jax.eval_shape(functools.partial(network.apply, train=False), variables, image_of(size))
        except Exception:  # Of many types: shapes that do not fit.
            raise UserError(
                f"--sizes {size[0]}x{size[1]}: {card['model']} of {path}, trained on images of "
                f"{height}x{width}, takes none of this size; leave it out."
            ) from None


def open_runtime(path: str | Path, options: Options | None = None) -> Runtime:
    """Loads a model, compiles a program for each bucket and each image size, and runs each once.

    Args:
      path: a run directory, or a file `.onnx`, `.tflite` or `.stablehlo` of `cnnjax export`.
      options: see `Options`.

    Raises:
      UserError: no such run or file, a damaged one, or a network that does not take the sizes.
    """
    options = options or Options()
    check_options(options)
    platform = check_source(path)
    check_sizes(path, options)
    began = time.perf_counter()
    if platform == "jax_run":
        runtime = _of_run(str(path), options)
    else:
        from cnnjax.serve.exported import of_file

        runtime = of_file(Path(expand(path)), platform, options)
    lone_secs = warm(runtime)
    warm_secs = time.perf_counter() - began
    return dataclasses.replace(runtime, warm_secs=warm_secs, lone_secs=lone_secs)


def warm(runtime: Runtime) -> float:
    """Runs every bucket of every image size once, and Grad-CAM; returns the `lone_secs`."""
    from cnnjax.data import read_image

    for shape in runtime.shapes:
        for bucket in runtime.buckets:
            logits, _ = runtime.call(np.zeros((bucket, *shape), runtime.dtype))
            if logits.shape != (bucket, runtime.num_logits):
                raise UserError(
                    f"{runtime.source} answers {logits.shape} to {bucket} images, and is to answer "
                    f"[{bucket}, {runtime.num_logits}]: it is no classifier of its classes."
                )
    with contextlib.suppress(UserError):  # Of a digit's picture, in which there is none.
        runtime.prepare(read_image(_picture(runtime.shapes[0])))
    if runtime.explain:
        runtime.explain(np.zeros(runtime.shapes[0], runtime.dtype), 0)
    lone = np.zeros((1, *max(runtime.shapes, key=math.prod)), runtime.dtype)
    tries = []
    for _ in range(LONE_TRIES):
        began = time.perf_counter()
        runtime.run_parts([lone])
        tries.append(time.perf_counter() - began)
    return min(tries)


def _picture(shape: Shape) -> bytes:
    """Returns a PNG file of noise: what decoding imports is imported before the first request."""
    return markup.png(np.random.default_rng(0).integers(0, 256, (*shape[:2], 3), np.uint8))


def _of_run(path: str, options: Options) -> Runtime:
    from cnnjax.run import load

    trained = load.load_classifier(path, base=load.base_if_tuned(path, options.base))
    names = tuple(map(str, trained.card["class_names"]))
    height, width, channels = trained.card["image_shape"]
    sizes = dict.fromkeys([(height, width), *options.image_sizes])
    shapes = tuple((*size, channels) for size in sizes)
    buckets = buckets_up_to(options.largest_batch)
    prepare, _ = load.preparation(trained, options.prepare)
    return Runtime(
        source=path,
        platform="jax_run",
        step=trained.step,
        shapes=shapes,
        dtype="uint8",
        class_names=names,
        num_logits=trained.card["num_outputs"],
        buckets=buckets,
        call=_compiled(trained, shapes, buckets),
        prepare=prepare,
        explain=_compiled_map(trained, shapes[0]) if options.explain else None,
    )


def program_of(trained: Any) -> Any:
    """Returns the jitted `(variables, {"image": images}) -> (logits, probabilities)` of a run.

    It is the program of `cnnjax predict`, which keeps the probabilities alone.
    """
    import cnnjax
    from cnnjax.train.predict import make_predict

    task = cnnjax.tasks.classification.classification(len(trained.card["class_names"]))
    both = dataclasses.replace(task, predict=lambda logits: (logits, task.predict(logits)))
    predict = make_predict(trained.model, both, normalize=trained.normalize)
    mesh = cnnjax.devices.sharding.make_mesh(1)
    return cnnjax.train.evaluate.compile_predict(predict, mesh)


def _compiled(trained: Any, shapes: Sequence[Shape], buckets: Sequence[int]) -> Call:
    """Returns a call of programs that are compiled here: another shape is a KeyError."""
    import jax

    program = program_of(trained)
    variables = jax.device_put(trained.variables)
    programs = {}
    for shape in shapes:
        for bucket in buckets:
            image = jax.ShapeDtypeStruct((bucket, *shape), np.uint8)
            lowered = program.lower(variables, {"image": image})
            programs[bucket, *shape] = lowered.compile()

    def call(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = programs[images.shape](variables, {"image": images})
        return np.asarray(logits), np.asarray(probabilities)

    return call


def _compiled_map(trained: Any, shape: Shape) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Returns Grad-CAM of a run, compiled; None for a network without a layer of images."""
    import jax
    import jax.numpy as jnp

    from cnnjax import explain
    from cnnjax.explain import taps

    abstract = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        if not taps.image_layers(trained.model, trained.variables, abstract, ()):
            return None
    except UserError:
        return None

    def of_class(variables: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        target = explain.class_score(label[None])
        normalized = trained.normalize(image[None])
        map_ = explain.grad_cam(trained.model, variables, normalized, target)[0]
        return map_ / jnp.maximum(map_.max(), jnp.finfo(map_.dtype).tiny)

    image = jax.ShapeDtypeStruct(shape, np.uint8)
    label = jax.ShapeDtypeStruct((), np.int32)
    compiled = jax.jit(of_class).lower(trained.variables, image, label).compile()
    one_at_a_time = threading.Lock()

    def map_of(image: np.ndarray, label: int) -> np.ndarray:
        with one_at_a_time:
            return np.asarray(compiled(trained.variables, image, np.int32(label)))

    return map_of
