"""Datasets of TensorFlow Datasets, read from prepared files; the network is never touched here.

TensorFlow is imported by `cnnjax.data.decoding.tensorflow` alone.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import numpy as np

from cnnjax.data.dataset import Arrays, Source
from cnnjax.data.decoding import pillow_tensor, tensor_fitter, tensorflow
from cnnjax.data.image_files import parse_fit
from cnnjax.data.tfds_splits import choose_splits, parse_spec, split_size
from cnnjax.errors import NotPreparedError, UserError, unknown_name
from cnnjax.paths import default_data_dir, expand, forget_empty_variables


class Features(NamedTuple):
    """Where an image-classification dataset keeps what we read.

    Attributes:
      image, label: the keys of the two features.
      shape: (height, width, channels); height and width are None where images differ in size.
      class_names: the name of each label.
    """

    image: str
    label: str
    shape: tuple[int | None, int | None, int]
    class_names: tuple[str, ...]


def find_builder(name: str, data_dir: str | os.PathLike | None = None) -> Any:
    """Returns the tfds builder of `name`, prepared or not, without the network.

    Raises:
      UserError: for names, configurations and versions that tfds does not know.
    """
    if not re.fullmatch(r"\w[\w.-]*(/[\w.+-]+)?(:[\w.*-]+)?", name):
        raise UserError(
            f"{name!r} is no name of a tfds dataset: write NAME, with /CONFIG or :VERSION"
        )
    directory = expand(data_dir or default_data_dir())
    # tfds itself would take an empty TFDS_DATA_DIR for the working directory.
    forget_empty_variables()
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        raise unknown_name("tfds dataset", name, known) from error
    except (ValueError, AssertionError) as error:
        raise _unknown_variant(name, error) from error
    except ImportError as error:
        raise UserError(
            f"tfds dataset {name!r} needs a Python package that is not installed: {error}"
        ) from error


def _unknown_variant(name: str, error: Exception) -> UserError:
    """The error for a configuration or version that the dataset does not have."""
    import tensorflow_datasets as tfds

    base, _, rest = name.partition("/")
    config, _, _ = rest.partition(":")
    builder_class = tfds.builder_cls(base.partition(":")[0])
    configs = [each.name for each in builder_class.BUILDER_CONFIGS]
    if config and config not in configs:
        if not configs:
            return UserError(f"tfds dataset {base!r} has no configurations: leave '/{config}' out")
        return unknown_name(f"configuration of tfds dataset {base!r}:", config, configs)
    # tfds repeats the arguments before it comes to the point.
    reason = " ".join(str(error).rpartition('}": ')[2].split())
    return UserError(f"tfds cannot build {name!r}: {reason}")


def image_features(builder: Any) -> Features:
    """Finds the image and the label among the builder's features.

    Raises:
      UserError: when there is not one image and one class label, with 1 or 3 channels of uint8.
    """
    import tensorflow_datasets as tfds

    features = dict(builder.info.features)
    keys = builder.info.supervised_keys or ("image", "label")
    found = [features.get(key) for key in keys]
    if (
        len(keys) != 2
        or not isinstance(found[0], tfds.features.Image)
        or not isinstance(found[1], tfds.features.ClassLabel)
        or found[0].np_dtype != np.uint8
    ):
        listed = ", ".join(f"{key} ({type(each).__name__})" for key, each in features.items())
        raise UserError(
            f"tfds dataset {builder.info.full_name!r} is not for image classification: its "
            f"features are {listed}; one 8-bit Image and one ClassLabel are needed"
        )
    if found[0].shape[2] not in (1, 3):
        raise UserError(
            f"images of tfds dataset {builder.info.full_name!r} have {found[0].shape[2]} channels: "
            "1 or 3 are supported"
        )
    return Features(keys[0], keys[1], found[0].shape, tuple(found[1].names))


def prepared_builder(name: str, data_dir: str | os.PathLike | None = None) -> Any:
    """Returns the builder of a dataset for image classification that is ready to be read.

    `mnist` is prepared on the spot from the files that ship with cnnjax (about ten seconds, once).

    Raises:
      NotPreparedError: at once, with the command that prepares the dataset.
    """
    builder = find_builder(name, data_dir)
    image_features(builder)
    if is_prepared(builder):
        return builder
    if builder.name == "mnist":
        prepare_shipped_mnist(builder)
        return builder
    check_prepared(builder, name)
    return builder


def check_prepared(builder: Any, name: str) -> None:
    """Raises a NotPreparedError, with the command that prepares it, unless a dataset is on disk."""
    if is_prepared(builder):
        return
    raise NotPreparedError(
        f"tfds dataset {builder.info.full_name!r} is not prepared in {builder.data_dir_root!s}: "
        f"prepare it once by 'python scripts/prepare_data.py {name} --data-dir "
        f"{builder.data_dir_root!s} --download' (--help tells how to do it without a network), or "
        "give the data directory where it is"
    )


def is_prepared(builder: Any) -> bool:
    """Whether the builder's files are on disk, whole."""
    # tfds logs a warning about a directory that is not there.
    return builder.data_path.exists() and builder.is_prepared()


def prepare_shipped_mnist(builder: Any) -> None:
    """Prepares tfds's own official `mnist` from the files that ship with cnnjax, offline."""
    from cnnjax.data import mnist

    for name in mnist.SHA256:
        mnist.read_verified(mnist.DIRECTORY, name)
    prepare_from_directory(builder, mnist.DIRECTORY)


def prepare_from_directory(builder: Any, manual_dir: str | os.PathLike) -> None:
    """Runs the official builder on files already on disk; tfds verifies their checksums.

    Args:
      builder: an unprepared tfds builder.
      manual_dir: holds the files under the names that the builder downloads or asks for.
    """
    import tensorflow_datasets as tfds

    tensorflow()
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=os.fspath(manual_dir), try_download_gcs=False
        )
    )


def image_shape(builder: Any, image_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """(height, width, channels) of the images as read; UserError if they differ in size."""
    height, width, channels = image_features(builder).shape
    if image_size is not None:
        return (*image_size, channels)
    if height is None or width is None:
        raise UserError(
            f"images of tfds dataset {builder.info.full_name!r} differ in size: give image_size"
        )
    return height, width, channels


def open_tfds(
    text: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: tuple[int, int] | None = None,
    fit: str = "pad",
    max_bytes: int,
) -> Source:
    """Finds and checks what `load("tfds:...")` reads, before TensorFlow is imported.

    Args:
      text: see `parse_spec`.
      data_dir: where prepared datasets are; `default_data_dir()` by default.
      image_size: (height, width) of all images; None where the dataset has one size.
      fit: how images get that size: see `cnnjax.data.image_files.fit_image`.
      max_bytes: the size in memory above which the dataset is refused.
    """
    spec = parse_spec(text)
    builder = prepared_builder(spec.name, data_dir)
    splits = choose_splits(builder, spec.splits)
    shape = image_shape(builder, image_size)
    num_examples = {name: split_size(builder, split) for name, split in splits.items()}
    size_bytes = memory_bytes(builder, splits, shape)
    if size_bytes > max_bytes:
        raise UserError(
            f"'tfds:{text}' takes {size_bytes / 2**30:.1f} GiB of memory, more than "
            f"{max_bytes / 2**30:g}: stream it by cnnjax.data.stream_tfds or, in an experiment, by "
            "--pipeline stream, or choose a smaller slice or image_size"
        )
    return Source(
        class_names=image_features(builder).class_names,
        num_examples=num_examples,
        read=lambda: {
            name: read_split(builder, split, image_size, shape, fit, num_examples[name])
            for name, split in splits.items()
        },
        is_stratified=True,
    )


def memory_bytes(builder: Any, splits: dict[str, str], shape: tuple[int, int, int]) -> int:
    """What the images of all splits take in memory, as uint8 of `shape`."""
    return sum(split_size(builder, split) for split in splits.values()) * int(np.prod(shape))


def read_split(
    builder: Any,
    split: str,
    image_size: tuple[int, int] | None,
    shape: tuple[int, int, int],
    fit: str,
    count: int,
) -> Arrays:
    """Reads the `count` examples of a tfds split with slices, in the order of the files.

    Other arguments as for `open_tfds`; `shape` is what `image_shape` returns.
    """
    import tensorflow_datasets as tfds

    tf = tensorflow()
    keys = image_features(builder)

    fitted = (lambda image: image) if image_size is None else tensor_fitter(image_size, fit)
    by_pillow = image_size is not None and parse_fit(fit)[0] == "center"

    # AutoGraph would only warn about what it cannot convert: there is nothing to convert.
    @tf.autograph.experimental.do_not_convert
    def as_pair(example: dict[str, Any]) -> tuple[Any, Any]:
        image = example[keys.image]
        image = pillow_tensor(image, shape[2]) if by_pillow else image
        return fitted(image), tf.cast(example[keys.label], tf.int32)

    dataset = builder.as_dataset(
        split=split,
        shuffle_files=False,
        read_config=read_config(),
        decoders={keys.image: tfds.decode.SkipDecoding()} if by_pillow else None,
    )
    dataset = dataset.map(as_pair, num_parallel_calls=tf.data.AUTOTUNE).batch(256).prefetch(2)
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)
    start = 0
    for image, label in tfds.as_numpy(dataset):
        images[start : start + len(label)] = image
        labels[start : start + len(label)] = label
        start += len(label)
    if start != count:
        raise UserError(
            f"split {split!r} of {builder.info.full_name!r} announces {count} examples but "
            f"{start} were read: prepare it again"
        )
    return Arrays(images, labels)


def read_config() -> Any:
    """tfds's reading options for an order that is the same each time."""
    import tensorflow_datasets as tfds

    return tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
