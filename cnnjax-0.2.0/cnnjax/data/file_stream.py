"""Batches of image files, decoded as they are needed.

Every example is read by its position in the epoch: the order is a permutation of all files, a
resumed run passes over nothing, and each process opens the files of its own devices only. What is
drawn depends on (seed, epoch, step) alone, never on the number of threads or processes.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from cnnjax.data.batches import (
    Batch,
    HostBatch,
    local_rows,
    pad_and_mask,
    padded_size,
    place_local,
    prefetch,
)
from cnnjax.data.decoding import resize_tensor, tensorflow
from cnnjax.data.image_files import (
    image_to_shape,
    is_gray,
    is_upright,
    open_image,
    parse_fit,
    read_image,
    resize_image,
    upright_size,
)
from cnnjax.data.pipelines import count_steps, epoch_indices, image_forms
from cnnjax.data.streaming import StreamingPipeline, host_batches
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator

# Szegedy et al. 2015 (arXiv 1409.4842), section 6.
LARGEST_RATIO = 4 / 3
ATTEMPTS = 10
# What libjpeg can leave out of a JPEG by computing fewer frequencies.
DCT_RATIOS = (1, 2, 4, 8)
# Batches that may have been asked for when an error comes back.
_SUSPECT_BATCHES = 32


class Files(NamedTuple):
    """Image files and what their headers say.

    Attributes:
      names: the paths.
      labels: int32 `[files]`.
      sizes: int32 `[files, 2]`: (height, width), upright.
      is_plain: bool `[files]`: JPEG that is RGB or gray, and upright as it is.
      num_channels: 1 where all files are gray, else 3.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    is_plain: np.ndarray
    num_channels: int

    def chosen(self, rows: np.ndarray) -> Files:
        """Returns the files of these numbers, in their order."""
        names = tuple(self.names[row] for row in rows)
        arrays = (self.labels[rows], self.sizes[rows], self.is_plain[rows])
        return Files(names, *arrays, self.num_channels)


class Job(NamedTuple):
    """What to read for one step: the files, of each a window (top, left, height, width), mirrored.

    The arrays are `[examples]`, the windows `[examples, 4]`.
    """

    files: np.ndarray
    window: np.ndarray
    is_mirrored: np.ndarray


def scan_files(names: Sequence[str | os.PathLike], labels: np.ndarray) -> Files:
    """Reads every header, and no pixels.

    Raises:
      UserError: for a file that is missing, or no image.
    """
    paths = tuple(os.fspath(name) for name in names)
    if len(paths) != len(labels):
        raise UserError(f"{len(paths)} files and {len(labels)} labels: give one label per file")

    def header(name: str) -> tuple[tuple[int, int], bool, bool]:
        with open_image(name) as image:
            is_plain = image.format == "JPEG" and image.mode in ("L", "RGB")
            return upright_size(image), is_plain and is_upright(image), is_gray(image)

    with ThreadPoolExecutor() as threads:
        headers = list(threads.map(header, paths, chunksize=64))
    return Files(
        paths,
        np.asarray(labels, np.int32),
        np.array([size for size, _, _ in headers], np.int32).reshape(-1, 2),
        np.array([is_plain for _, is_plain, _ in headers], bool),
        1 if all(is_gray for _, _, is_gray in headers) else 3,
    )


def stream_files(
    files: Files,
    batch_size: int,
    *,
    seed: int,
    image_size: tuple[int, int],
    num_channels: int | None = None,
    fit: str = "pad",
    smallest_area: float = 0.0,
    antialias: bool = True,
    mirror: bool = False,
    num_threads: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    rows: np.ndarray | None = None,
) -> StreamingPipeline:
    """Streams image files, in the order of `ResidentPipeline` with the same seed.

    Args:
      files: from `scan_files`.
      batch_size: examples in a batch, over all processes.
      seed: determines the order and what is drawn.
      image_size: (height, width) of the batches' images.
      num_channels: 1 or 3; None for the files' own.
      fit: of whole images: see `cnnjax.data.image_files.fit_image`. Their pixels are those of
        `cnnjax.data.load`.
      smallest_area: above 0 a random part of at least this fraction of an image's area is read
        instead, stretched to the size: see `random_windows`. 0.08 in the paper. Only the part
        of a JPEG is decoded; of one that is 2, 4 or 8 times larger than needed each pixel is the
        mean of as many in height and width.
      antialias: whether parts are shrunk by a filter as wide as the scale, as Pillow and PyTorch
        do. False weighs the four pixels around each place, as TensorFlow does, which is faster.
      mirror: whether half of the images, drawn anew each epoch, are mirrored left to right.
      num_threads: how many images are decoded at a time; None lets TensorFlow choose.
      sharding: how a batch is spread over devices, along its first axis; None for the default
        device.
      rows: the positions in a batch of the examples that are read here; by default those that
        `sharding` puts on this process's devices. Without a sharding batches hold only these.

    Raises:
      UserError: at once for arguments that do not work; from the batches, for a file that cannot
        be decoded (named).
    """
    if not 0.0 <= smallest_area <= 1.0:
        raise UserError(f"smallest_area={smallest_area}: give a share from 0 to 1, such as 0.08")
    parse_fit(fit)
    steps_per_epoch = count_steps(len(files.names), batch_size)
    here = local_rows(batch_size, sharding) if rows is None else rows
    shape = (*image_size, num_channels or files.num_channels)

    def jobs(first_step: int) -> Iterator[Job]:
        epoch, offset = divmod(first_step, steps_per_epoch)
        while True:
            order = epoch_indices(len(files.names), batch_size, seed, epoch)
            for step in range(offset, steps_per_epoch):
                # For the whole batch: what is read here does not depend on who reads the rest.
                generator = numpy_generator(seed, "files", epoch, step)
                draws = generator.random((batch_size, ATTEMPTS, 4))[here]
                is_mirrored = generator.random(batch_size)[here] < (0.5 if mirror else 0.0)
                index = order[step, here]
                yield Job(
                    index,
                    random_windows(files.sizes[index], draws, smallest_area),
                    is_mirrored,
                )
            epoch, offset = epoch + 1, 0

    read = _reader(files, shape, fit, is_cut=smallest_area > 0, antialias=antialias)

    def read_from(first_step: int) -> Iterator[HostBatch]:
        return _host_batches(files, jobs(first_step), read, len(here), num_threads)

    return StreamingPipeline(
        read_from,
        len(files.names),
        batch_size,
        image_forms(shape, np.dtype(np.uint8)),
        sharding=sharding,
        rows=here,
    )


def stream_files_evaluation(
    files: Files,
    batch_size: int,
    *,
    image_size: tuple[int, int],
    num_channels: int | None = None,
    fit: str = "pad",
    sharding: jax.sharding.Sharding | None = None,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Yields every file exactly once, in order; the last batch is padded and masked.

    Arguments and errors as for `stream_files`; the batch grows to the next size that divides among
    the devices.
    """
    parse_fit(fit)
    batch_size = padded_size(batch_size, sharding)
    here = local_rows(batch_size, sharding) if rows is None else rows
    shape = (*image_size, num_channels or files.num_channels)
    count = len(files.names)
    parts = [here[here < count - start] + start for start in range(0, count, batch_size)]
    jobs = (
        Job(index, np.zeros((len(index), 4), np.int32), np.zeros(len(index), bool))
        for index in parts
    )
    read = _reader(files, shape, fit, is_cut=False, antialias=True)

    empty: HostBatch = {"image": np.zeros((0, *shape), np.uint8), "label": np.zeros(0, np.int32)}

    def batches() -> Iterator[Batch]:
        read_here = _host_batches(files, jobs, read, len(here))
        # A process may have nothing of the last batch.
        for _ in parts:
            part = next(read_here, empty)
            unmasked = {name: part[name] for name in empty}
            yield place_local(pad_and_mask(unmasked, len(here)), sharding, here, batch_size)

    return prefetch(batches())


def random_windows(sizes: np.ndarray, draws: np.ndarray, smallest_area: float) -> np.ndarray:
    """Draws a part of each image, int32 `[images, 4]`: (top, left, height, width).

    Szegedy et al. 2015 (arXiv 1409.4842), section 6: the area is uniform in [`smallest_area`, 1] of
    the image's, the logarithm of width / height in that of [3/4, 4/3]; where no attempt fits into
    the image, the part is the whole.

    Args:
      sizes: integers `[images, 2]`: (height, width).
      draws: uniform in [0, 1), `[images, attempts, 4]`.
      smallest_area: in (0, 1].
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * (smallest_area + (1.0 - smallest_area) * draws[..., 0])
    ratio = np.exp(math.log(LARGEST_RATIO) * (2.0 * draws[..., 1] - 1.0))
    extent = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=-1)
    extent = np.maximum(1, np.round(extent))
    fits: np.ndarray = np.all(extent <= sizes[:, None, :], axis=-1)
    first = fits.argmax(1)
    chosen = np.arange(len(sizes))
    extent = np.where(fits.any(axis=1, keepdims=True), extent[chosen, first], sizes)
    start = np.floor(draws[chosen, first, 2:] * (sizes - extent + 1))
    return np.concatenate([start, extent], axis=1).astype(np.int32)


# (index, window, is_mirrored) tensors -> uint8 image tensor.
Read = Callable[[Any, Any, Any], Any]


def _reader(
    files: Files, shape: tuple[int, int, int], fit: str, *, is_cut: bool, antialias: bool
) -> Callable[[], Read]:
    """Returns a function that makes the TensorFlow function that reads one example."""
    size, channels = shape[:2], shape[2]

    def whole(index: np.ndarray, window: np.ndarray) -> np.ndarray:
        return image_to_shape(read_image(files.names[index]), shape, fit=fit)

    def part(index: np.ndarray, window: np.ndarray) -> np.ndarray:
        image = read_image(files.names[index])
        image = image_to_shape(image, (*image.shape[:2], channels))
        top, left, height, width = window
        return np.ascontiguousarray(image[top : top + height, left : left + width])

    def make() -> Read:
        tf = tensorflow()
        names = tf.constant(files.names)
        is_plain = tf.constant(files.is_plain)

        def by_python(function: Callable) -> Callable:
            return lambda *tensors: tf.ensure_shape(
                tf.numpy_function(function, tensors, tf.uint8, stateful=False),
                (None, None, channels),
            )

        decode = _part_decoder(files.sizes, size, channels)

        def decoded(index: Any, window: Any) -> Any:
            def from_jpeg() -> Any:
                return decode(tf.io.read_file(tf.gather(names, index)), window)

            if files.is_plain.all():
                return from_jpeg()
            return tf.cond(is_plain[index], from_jpeg, lambda: by_python(part)(index, window))

        def read(index: Any, window: Any, is_mirrored: Any) -> Any:
            if not is_cut:
                image = by_python(whole)(index, window)
            elif antialias:
                image = by_python(lambda image: resize_image(image, size))(decoded(index, window))
            else:
                image = resize_tensor(decoded(index, window), size, antialias=False)
            image = tf.cond(is_mirrored, lambda: tf.reverse(image, [1]), lambda: image)
            return tf.ensure_shape(image, shape)

        return read

    return make


def _part_decoder(
    sizes: np.ndarray, size: tuple[int, int], channels: int
) -> Callable[[Any, Any], Any]:
    """Returns `(encoded, window) -> image`: a part of a JPEG, at the scale that `size` needs."""
    tf = tensorflow()
    largest = (sizes // np.array(size)).min(axis=1).max(initial=1)
    ratios = [ratio for ratio in DCT_RATIOS if ratio <= max(1, largest)]

    def decode(encoded: Any, window: Any) -> Any:
        def at(ratio: int) -> Callable[[], Any]:
            return lambda: tf.image.decode_and_crop_jpeg(
                encoded, window // ratio, channels=channels, ratio=ratio
            )

        if len(ratios) == 1:
            return at(1)()
        scale = tf.reduce_min(window[2:] // tf.constant(size))
        branch = tf.reduce_sum(tf.cast(scale >= tf.constant(ratios[1:]), tf.int32))
        return tf.switch_case(branch, [at(ratio) for ratio in ratios])

    return decode


def _host_batches(
    files: Files,
    jobs: Iterator[Job],
    make_read: Callable[[], Read],
    batch_size: int,
    num_threads: int | None = None,
) -> Iterator[HostBatch]:
    """Reads the examples of each job, in order."""
    tf = tensorflow()
    read = make_read()
    asked: deque[np.ndarray] = deque(maxlen=_SUSPECT_BATCHES)

    def rows() -> Iterator[tuple[np.ndarray, ...]]:
        for job in jobs:
            asked.append(job.files)
            yield (*job, files.labels[job.files])

    signature = (
        tf.TensorSpec((None,), tf.int32),
        tf.TensorSpec((None, 4), tf.int32),
        tf.TensorSpec((None,), tf.bool),
        tf.TensorSpec((None,), tf.int32),
    )

    # AutoGraph would only warn about what it cannot convert: there is nothing to convert.
    @tf.autograph.experimental.do_not_convert
    def example(index: Any, window: Any, is_mirrored: Any, label: Any) -> dict[str, Any]:
        return {"image": read(index, window, is_mirrored), "label": label}

    # A batch of rows a call of Python; one pipeline for all epochs, which never runs dry.
    dataset = tf.data.Dataset.from_generator(rows, output_signature=signature).unbatch()
    dataset = dataset.map(
        example, num_parallel_calls=num_threads or tf.data.AUTOTUNE, deterministic=True
    )
    batches = host_batches(dataset, batch_size, drop_remainder=False)
    try:
        yield from batches
    except tf.errors.OpError as error:
        raise _damaged(files, asked, error) from error
    finally:
        # Before `dataset` is forgotten, whose Python functions it would miss as it ends.
        batches.close()


def _damaged(files: Files, asked: Iterable[np.ndarray], error: Exception) -> UserError:
    """The error for the file that could not be decoded, among those that were asked for."""
    for index in np.concatenate(list(asked)):
        try:
            read_image(files.names[index])
        except UserError as found:
            return found
    return UserError(f"cannot decode an image: {str(error).splitlines()[0][:200]}")
