"""ImageNet's classes by WordNet's numbers, and the images of its test sets, one at a time.

The list of the 1000 numbers, in the order of the logits, is in the package tensorflow-datasets.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data import folder
from cnnjax.data.batches import Batch
from cnnjax.data.file_stream import scan_files, stream_files_evaluation
from cnnjax.data.streaming import stream_tfds_evaluation
from cnnjax.data.tfds_source import image_features, prepared_builder
from cnnjax.data.tfds_splits import parse_spec, split_size
from cnnjax.errors import UserError
from cnnjax.paths import read_text

LABELS = Path("datasets") / "imagenet2012" / "labels.txt"
# These have images of 200 of the 1000 classes that tfds lists.
OF_SOME_CLASSES = ("imagenet_a", "imagenet_r")
SPLITS = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class TestImages:
    """A labeled set of images to test a network of ImageNet on.

    Attributes:
      name: of the dataset.
      class_names: as the dataset has them.
      rows: of the network's 1000 logits, those of the dataset's classes, in its order.
      count: of images.
      only_present: whether the logits of classes without any image do not count.
      batches: `batch_size -> ` batches with `image`, `label` and `mask`.
    """

    name: str
    class_names: tuple[str, ...]
    rows: np.ndarray
    count: int
    only_present: bool
    batches: Callable[[int], Iterator[Batch]]


def wordnet_numbers() -> list[str]:
    """Returns the numbers of the 1000 classes, such as `n01440764`, in the order of the logits.

    Raises:
      UserError: tensorflow-datasets is not there, or has no such list.
    """
    found = importlib.util.find_spec("tensorflow_datasets")
    if found is None or not found.submodule_search_locations:
        raise UserError("the list of ImageNet's classes is in tensorflow-datasets: install it")
    path = Path(found.submodule_search_locations[0]) / LABELS
    return read_text(path, "list of ImageNet's classes").split()


def logit_rows(class_names: Sequence[str]) -> np.ndarray:
    """Returns for each class of a dataset the number of its logit among ImageNet's 1000.

    Names are WordNet's numbers, as of ImageNet and most of its variants, or the numbers of the
    logits themselves, as in the archives of ImageNet-V2.

    Raises:
      UserError: a name is neither.
    """
    if all(name.isdecimal() and int(name) < 1000 for name in class_names):
        return np.array([int(name) for name in class_names])
    place = {number: row for row, number in enumerate(wordnet_numbers())}
    if strange := [name for name in class_names if name not in place]:
        raise UserError(
            f"{len(strange)} of {len(class_names)} classes are none of ImageNet's, such as "
            f"{strange[0]!r}: they are named n01440764, or 0 to 999"
        )
    return np.array([place[name] for name in class_names])


def open_images(
    name: str,
    image_size: tuple[int, int],
    *,
    fit: str,
    split: str = "test",
    data_dir: str | os.PathLike | None = None,
) -> TestImages:
    """Opens `tfds:NAME` or `folder:PATH` of classes of ImageNet; images are read as they are asked.

    Args:
      name: of the dataset.
      image_size: (height, width).
      fit: how images get that size: see `cnnjax.data.image_files.fit_image`.
      split: `test` is the validation split where there is no test split with labels, as of
        ImageNet; of a folder without splits it is all of it.
      data_dir: where tfds datasets are.

    Raises:
      UserError: there is no such dataset, or its classes are not ImageNet's.
    """
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        return _open_folder(name, rest, image_size, fit, split)
    if kind != "tfds" or not rest:
        raise UserError(f"unknown dataset {name!r}: give tfds:NAME or folder:PATH")
    spec = parse_spec(rest)
    builder = prepared_builder(spec.name, data_dir)
    class_names = image_features(builder).class_names
    # The test split of ImageNet has no labels.
    default = next(each for each in ("validation", *SPLITS) if each in builder.info.splits)
    chosen = spec.splits.get(split) or (default if split == "test" else split)
    return TestImages(
        name=name,
        class_names=class_names,
        rows=logit_rows(class_names),
        count=split_size(builder, chosen),
        only_present=builder.name in OF_SOME_CLASSES,
        batches=lambda batch_size: stream_tfds_evaluation(
            spec.name, chosen, batch_size, data_dir=data_dir, image_size=image_size, fit=fit
        ),
    )


def check_images(
    name: str, *, split: str = "test", data_dir: str | os.PathLike | None = None
) -> None:
    """Raises what `open_images` raises, without opening an image; arguments as there."""
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        logit_rows(folder.labeled_files(rest, split)[0])
    elif kind == "tfds" and rest:
        logit_rows(image_features(prepared_builder(parse_spec(rest).name, data_dir)).class_names)
    else:
        raise UserError(f"unknown dataset {name!r}: give tfds:NAME or folder:PATH")


def _open_folder(
    name: str, path: str, image_size: tuple[int, int], fit: str, split: str
) -> TestImages:
    class_names, names, labels = folder.labeled_files(path, split)
    rows = logit_rows(class_names)
    files = scan_files(names, labels)
    options: dict[str, Any] = {"image_size": image_size, "num_channels": 3, "fit": fit}
    return TestImages(
        name=name,
        class_names=tuple(class_names),
        rows=rows,
        count=len(names),
        only_present=False,
        batches=lambda batch_size: stream_files_evaluation(files, batch_size, **options),
    )
