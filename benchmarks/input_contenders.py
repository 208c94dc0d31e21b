"""The input pipelines that `input_peers.py` compares, one in a process of its own.

Each reads a folder of JPEG files, decodes, takes a random part (8% to 100% of the area, aspect
ratio 3/4 to 4/3) at `size` x `size`, mirrors half of them, and yields uint8 NumPy batches for ever.
The argument is JSON; each line read, such as `{"images": 2048}`, is answered by one line.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from peer_worker import one_line, private_stdout, say

SMALLEST_AREA, LARGEST_RATIO, ATTEMPTS = 0.08, 4 / 3, 10

Batches = Iterator[np.ndarray]


class Feed(NamedTuple):
    """What to read, and how.

    Attributes:
      files: paths of the images.
      size: height and width of the batches' images.
      batch_size: images in a batch.
      cores: threads or processes that decode.
    """

    files: list[str]
    size: int
    batch_size: int
    cores: int


class Pipeline(NamedTuple):
    """A contender: the package it needs, whether it filters against aliasing, what it is."""

    package: str
    is_filtered: bool
    meaning: str
    open: Callable[[Feed], Batches]


def main() -> None:
    channel = private_stdout()
    spec = json.loads(sys.argv[1])
    feed = Feed(**spec["feed"])
    try:
        pipeline = PIPELINES[spec["contender"]]
        if importlib.util.find_spec(pipeline.package) is None:
            raise ModuleNotFoundError(pipeline.package, name=pipeline.package)
        batches = pipeline.open(feed)
        for _ in range(3):
            check(next(batches), feed)
        step = make_step(spec["model"], feed) if spec["model"] else None
    except ModuleNotFoundError as error:
        say(channel, {"missing": f"needs the package {error.name}"})
        return
    except Exception as error:
        say(channel, {"failed": one_line(error)})
        raise
    say(channel, {"ready": {}})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "steps" in request:
                say(channel, train(batches, step, request["steps"]))
            else:
                say(channel, drain(batches, request["images"]))
        except Exception as error:
            say(channel, {"failed": one_line(error)})
            raise


def check(batch: np.ndarray, feed: Feed) -> None:
    """Raises ValueError unless a batch is what was asked for."""
    shapes = [(feed.size, feed.size, 3), (3, feed.size, feed.size)]
    if batch.dtype != np.uint8 or len(batch) != feed.batch_size or batch.shape[1:] not in shapes:
        raise ValueError(f"a batch is {batch.dtype} {batch.shape}")


def drain(batches: Batches, num_images: int) -> dict[str, float]:
    """Takes whole batches and does nothing with them."""
    taken, start = 0, time.perf_counter()
    while taken < num_images:
        taken += len(next(batches))
    return {"images": taken, "wall_secs": time.perf_counter() - start}


Step = Callable[[np.ndarray], None]


def make_step(name: str, feed: Feed) -> Step:
    """Returns the compiled training step of a network of cnnjax, which waits for its result."""
    import jax
    import jax.numpy as jnp
    import optax

    from cnnjax import models, schedules
    from cnnjax.tasks.classification import classification
    from cnnjax.train.state import create_state
    from cnnjax.train.step import make_step as step_of

    model = models.create(name, num_classes=1000)
    optimizer = optax.sgd(0.01, momentum=0.9)
    image = jnp.zeros((1, feed.size, feed.size, 3))
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), image)
    state = create_state(variables, optimizer, jax.random.key(1))
    compiled = jax.jit(
        step_of(
            model,
            optimizer,
            classification(1000),
            schedule=schedules.constant(0.01, total_steps=1),
            normalize=lambda image: image.astype(jnp.float32) / 255.0,
        ),
        donate_argnums=0,
    )
    label, mask = jnp.zeros(feed.batch_size, jnp.int32), jnp.ones(feed.batch_size, bool)

    def step(image: np.ndarray) -> None:
        nonlocal state
        if image.shape[1] == 3:
            image = image.transpose(0, 2, 3, 1)
        state, _ = compiled(state, {"image": image, "label": label, "mask": mask})
        jax.block_until_ready(state)

    step(np.zeros((feed.batch_size, feed.size, feed.size, 3), np.uint8))
    return step


def train(batches: Batches, step: Step | None, num_steps: int) -> dict[str, float]:
    """Returns seconds of steps without input, of steps that are fed, and of waiting for it."""
    assert step is not None
    image = next(batches)
    start = time.perf_counter()
    for _ in range(num_steps):
        step(image)
    alone = time.perf_counter() - start
    waited, start = 0.0, time.perf_counter()
    for _ in range(num_steps):
        before = time.perf_counter()
        image = next(batches)
        waited += time.perf_counter() - before
        step(image)
    fed = time.perf_counter() - start
    return {"alone_secs": alone, "fed_secs": fed, "waited_secs": waited}


def cnnjax(feed: Feed, *, antialias: bool) -> Batches:
    from cnnjax.data import file_stream

    files = file_stream.scan_files(feed.files, np.zeros(len(feed.files), np.int32))
    pipeline = file_stream.stream_files(
        files,
        feed.batch_size,
        seed=0,
        image_size=(feed.size, feed.size),
        smallest_area=SMALLEST_AREA,
        antialias=antialias,
        mirror=True,
    )
    return (np.asarray(batch["image"]) for batch in pipeline.batches(0))


def tf_data(feed: Feed, *, antialias: bool) -> Batches:
    """The input of TensorFlow's and Flax's ImageNet examples, in 8 bits."""
    from cnnjax.data.decoding import tensorflow

    tf = tensorflow()

    def read(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.0,
            aspect_ratio_range=(1 / LARGEST_RATIO, LARGEST_RATIO),
            area_range=(SMALLEST_AREA, 1.0),
            max_attempts=ATTEMPTS,
        )
        window = tf.concat([begin[:2], extent[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.resize(image, (feed.size, feed.size), antialias=antialias)
        return tf.image.random_flip_left_right(tf.cast(tf.round(image), tf.uint8))

    return (
        tf.data.Dataset.from_tensor_slices(feed.files)
        .shuffle(len(feed.files))
        .repeat()
        .map(read, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(feed.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
        .as_numpy_iterator()
    )


class TorchFiles:
    """A map-style dataset of PyTorch."""

    def __init__(self, files: list[str], transform: Callable[[str], Any]):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.files[index])


def torch_loader(feed: Feed, transform: Callable[[str], Any]) -> Batches:
    """Returns the batches of a DataLoader with one process per core."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        TorchFiles(feed.files, transform),  # type: ignore[arg-type]
        feed.batch_size,
        shuffle=True,
        num_workers=feed.cores,
        drop_last=True,
        persistent_workers=True,
    )

    def batches() -> Batches:
        while True:
            for batch in loader:
                yield batch.numpy()

    return batches()


def torchvision_v2() -> Any:
    """Imports torchvision's transforms, also where its compiled operators are missing."""
    import torch

    register = torch.library.register_fake

    def register_known(name: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **options)

    torch.library.register_fake = register_known  # type: ignore[assignment]
    from torchvision.transforms import v2

    return v2


def torch_pil(feed: Feed) -> Batches:
    """As torchvision's references: PIL decodes, crops and resizes."""
    from PIL import Image

    v2 = torchvision_v2()
    change = v2.Compose(
        [v2.RandomResizedCrop(feed.size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    return torch_loader(feed, lambda path: change(Image.open(path).convert("RGB")))


def torch_tensor(feed: Feed) -> Batches:
    """As torchvision's guide to speed: PIL decodes, the rest is done on 8-bit tensors."""
    from PIL import Image

    v2 = torchvision_v2()
    change = v2.Compose(
        [v2.ToImage(), v2.RandomResizedCrop(feed.size, antialias=True), v2.RandomHorizontalFlip()]
    )
    return torch_loader(feed, lambda path: change(Image.open(path).convert("RGB")).contiguous())


def torchvision_decode(feed: Feed) -> Batches:
    """Decoding by torchvision, where its wheel has the compiled operators."""
    v2 = torchvision_v2()
    from torchvision import io

    change = v2.Compose(
        [v2.RandomResizedCrop(feed.size, antialias=True), v2.RandomHorizontalFlip()]
    )

    def read(path: str) -> Any:
        return change(io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)).contiguous()

    read(feed.files[0])
    return torch_loader(feed, read)


def draw_window(height: int, width: int, generator: np.random.Generator) -> tuple[int, ...]:
    """Returns (top, left, height, width) of a random part."""
    for _ in range(ATTEMPTS):
        area = generator.uniform(SMALLEST_AREA, 1.0) * height * width
        ratio = math.exp(generator.uniform(-1, 1) * math.log(LARGEST_RATIO))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = (
                generator.integers(height - rows + 1),
                generator.integers(width - columns + 1),
            )
            return int(top), int(left), rows, columns
    return 0, 0, height, width


def pil_part(path: str, generator: np.random.Generator, size: int) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        top, left, rows, columns = draw_window(image.height, image.width, generator)
        part = image.convert("RGB").resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + columns, top + rows)
        )
    if generator.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)


def opencv_part(path: str, generator: np.random.Generator, size: int) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    image: Any = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
    top, left, rows, columns = draw_window(image.shape[0], image.shape[1], generator)
    part = cv2.resize(image[top : top + rows, left : left + columns], (size, size))
    return cv2.flip(part, 1) if generator.random() < 0.5 else part


def torch_opencv(feed: Feed) -> Batches:
    import torch

    generator = np.random.default_rng()

    def read(path: str) -> Any:
        return torch.from_numpy(opencv_part(path, generator, feed.size))

    return torch_loader(feed, read)


def grain_pil(feed: Feed) -> Batches:
    """Grain with one process per core."""
    import grain
    from absl import flags

    # Its workers read flags, which only programs of absl parse.
    flags.FLAGS.mark_as_parsed()

    def read(path: str, generator: np.random.Generator) -> np.ndarray:
        return pil_part(path, generator, feed.size)

    dataset = (
        grain.MapDataset.source(feed.files)
        .seed(0)
        .shuffle()
        .random_map(read)
        .repeat()
        .batch(feed.batch_size, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )
    options = grain.MultiprocessingOptions(num_workers=feed.cores, per_worker_buffer_size=2)
    return iter(dataset.mp_prefetch(options))


def grain_threads(feed: Feed) -> Batches:
    """Grain with one thread per core."""
    import grain

    def read(path: str, generator: np.random.Generator) -> np.ndarray:
        return pil_part(path, generator, feed.size)

    dataset = grain.MapDataset.source(feed.files).seed(0).shuffle().random_map(read).repeat()
    options = grain.ReadOptions(num_threads=feed.cores, prefetch_buffer_size=2 * feed.batch_size)
    return iter(dataset.to_iter_dataset(options).batch(feed.batch_size, drop_remainder=True))


PIPELINES = {
    "cnnjax": Pipeline("jax", True, "cnnjax", functools.partial(cnnjax, antialias=True)),
    "torch-pil": Pipeline("torch", True, "DataLoader, PIL (references)", torch_pil),
    "torch-tensor": Pipeline("torch", True, "DataLoader, PIL, then tensors", torch_tensor),
    "torchvision-decode": Pipeline(
        "torch", True, "DataLoader, torchvision.io.decode_jpeg", torchvision_decode
    ),
    "grain": Pipeline("grain", True, "Grain, PIL, processes", grain_pil),
    "grain-threads": Pipeline("grain", True, "Grain, PIL, threads", grain_threads),
    "tf.data-antialias": Pipeline(
        "tensorflow", True, "tf.data, antialias=True", functools.partial(tf_data, antialias=True)
    ),
    "cnnjax-plain": Pipeline(
        "jax", False, "cnnjax, antialias=False", functools.partial(cnnjax, antialias=False)
    ),
    "tf.data": Pipeline(
        "tensorflow", False, "tf.data (examples)", functools.partial(tf_data, antialias=False)
    ),
    "torch-opencv": Pipeline("cv2", False, "DataLoader, OpenCV", torch_opencv),
}


if __name__ == "__main__":
    main()
