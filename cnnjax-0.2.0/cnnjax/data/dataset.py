"""A labeled image dataset in memory: its splits, its classes, its moments."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cnnjax import spec
from cnnjax.data import held_out
from cnnjax.data.fields import Field, Image, Label, check_examples
from cnnjax.data.held_out import Files
from cnnjax.errors import UserError, unknown_name
from cnnjax.rng import numpy_generator


class Arrays(NamedTuple):
    """One split: `image` uint8 `[n, height, width, channels]`, `label` int32 `[n]`."""

    image: np.ndarray
    label: np.ndarray


# A split: one array a key, whose first axis is the examples.
Split = Arrays | Mapping[str, np.ndarray]


def columns(split: Split) -> dict[str, np.ndarray]:
    """Returns the arrays of a split by key."""
    return split._asdict() if isinstance(split, Arrays) else dict(split)


def num_examples(split: Split) -> int:
    """Returns the number of examples of a split."""
    return len(next(iter(columns(split).values())))


def first_rows(split: Split, count: int) -> dict[str, np.ndarray]:
    """Returns the first examples of a split."""
    return {name: array[:count] for name, array in columns(split).items()}


class Source(NamedTuple):
    """A dataset that was found and checked but not read yet.

    Attributes:
      class_names: the name of each label.
      num_examples: split name -> number of examples, as far as that is known before reading.
      read: returns split name -> arrays: `train`, perhaps `validation` and `test`.
      files: returns the files of the examples, in the order of `read`; None where they have none.
      is_stratified: whether splits are drawn by class, if that is asked for. Those of the shipped
        datasets are not: their runs are compared with those of earlier versions.
    """

    class_names: tuple[str, ...]
    num_examples: dict[str, int]
    read: Callable[[], dict[str, Arrays]]
    files: Callable[[], Files] | None = None
    is_stratified: bool = False


@dataclass(frozen=True)
class ArrayDataset:
    """Examples of any task in memory: one array a key in each split, and what each key is.

    Attributes:
      name: for messages and for the record.
      fields: key -> what it is.
      train, validation, test: key -> array `[examples, ...]`; `validation` may have no examples.

    Raises:
      UserError: a split lacks a key, or an array is not what its field says.
    """

    name: str
    fields: Mapping[str, Field]
    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            check_examples(getattr(self, split), self.fields, f"the {split} split of {self.name}")
        if not any(field.is_input for field in self.fields.values()):
            raise UserError(f"{self.name} has no key that a model gets, such as an Image().")
        for split, name in itertools.product(("validation", "test"), self.fields):
            array, first = getattr(self, split)[name], self.train[name]
            if (array.shape[1:], array.dtype) != (first.shape[1:], first.dtype):
                raise UserError(
                    f"{name} of {self.name} is {first.dtype} {list(first.shape[1:])} in train and "
                    f"{array.dtype} {list(array.shape[1:])} in {split}: give the same."
                )

    @property
    def description(self) -> str:
        """What an example is, in words."""
        return "examples of " + ", ".join(
            f"{name} {'x'.join(map(str, self.train[name].shape[1:])) or 'scalar'}"
            for name in self.fields
        )

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 over the fields and every array's shape, dtype and bytes."""
        return _checksum(sorted(map(repr, self.fields.items())), self._splits())

    def _splits(self) -> list[list[np.ndarray]]:
        splits = (self.train, self.validation, self.test)
        return [[split[name] for name in sorted(self.fields)] for split in splits]


@dataclass(frozen=True)
class Dataset:
    """A labeled image dataset in memory.

    Attributes:
      name: what `load` was asked for.
      class_names: the name of each label, `label` being the index into it.
      train: what is trained on.
      validation: what choices (early stopping, hyperparameters) are made on; disjoint from `train`.
      test: what the final score is measured on.
      mean: per channel of `train`, pixels mapped to [0, 1].
      std: likewise the standard deviation; 1 for a channel that is constant.
      notes: what a person should know of the splits, a line each.
    """

    name: str
    class_names: tuple[str, ...]
    train: Arrays
    validation: Arrays
    test: Arrays
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.train.image.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fields(self) -> dict[str, Field]:
        """What the keys of an example are."""
        return labeled_images(self.num_classes)

    @property
    def description(self) -> str:
        """What an example is, in words."""
        return describe_images(self.image_shape, self.num_classes)

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 over the class names and every array's shape, dtype and bytes."""
        return _checksum(self.class_names, (self.train, self.validation, self.test))


def _checksum(what: object, splits: Iterable[Iterable[np.ndarray]]) -> str:
    digest = hashlib.sha256(repr(what).encode())
    for split in splits:
        for array in split:
            digest.update(f"{array.shape}{array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def labeled_images(num_classes: int) -> dict[str, Field]:
    """Returns the fields of a classifier's examples."""
    return {"image": Image(), "label": Label(num_classes)}


def describe_images(image_shape: tuple[int, int, int], num_classes: int) -> str:
    """Returns what the examples of a labeled image dataset are, in words."""
    return f"images of {'x'.join(map(str, image_shape))}, {num_classes} classes"


def make_dataset(
    name: str,
    class_names: Sequence[str],
    splits: dict[str, Arrays],
    *,
    relabel: np.ndarray | None = None,
    validation: float = 0.1,
    fold: str = "",
    seed: int = 0,
    is_stratified: bool = False,
    files: Files | None = None,
    drop_duplicates: bool = False,
) -> Dataset:
    """Builds a checked `Dataset` from one to three splits.

    Args:
      name: for messages and for the record.
      class_names: the names after relabelling.
      splits: `train`, and `validation` and `test` where the dataset has them. Without `test`, its
        `validation` is the test split, as is usual for ImageNet; without both, a tenth of `train`
        is: the same tenth for every seed, so that the scores of different seeds compare.
      relabel: int32 `[old classes]`, the new label of each old one, -1 to leave the class out.
      validation: a fraction of the training images below 1, or their number; used where the dataset
        has no validation split left. 0 trains on all images and leaves `validation` empty.
      fold: such as `2/5`: validation is the second of five parts of the training images instead.
      seed: chooses the validation images.
      is_stratified: whether the splits that are drawn have each class in proportion.
      files: what each example was read from, in the order of `splits`, to find duplicates by.
      drop_duplicates: whether to train without the files that are held out too.

    Raises:
      UserError: for labels outside the classes, empty splits and impossible shares.
    """
    num_labels = len(class_names) if relabel is None else len(relabel)
    for split, arrays in splits.items():
        check_arrays(arrays, num_labels, f"{name} ({split})")
    divided = held_out.divide(
        name,
        class_names,
        {split: arrays.label for split, arrays in splits.items()},
        relabel=relabel,
        validation=validation,
        fold=fold,
        seed=seed,
        is_stratified=is_stratified,
        files=files,
        drop_duplicates=drop_duplicates,
    )
    parts = {split: _taken(splits, divided, split) for split in ("train", "validation", "test")}
    mean, std = channel_moments(parts["train"].image)
    return Dataset(
        name=name,
        class_names=tuple(class_names),
        **parts,
        mean=mean,
        std=std,
        notes=divided.notes,
    )


def _taken(stored: Mapping[str, Arrays], divided: held_out.Divided, split: str) -> Arrays:
    """The examples of a split, which are all of one stored split."""
    numbers, start = divided.numbers[split], 0
    for arrays in stored.values():
        stop = start + len(arrays.label)
        if not len(numbers) or start <= numbers[0] < stop:
            is_chosen = np.zeros(len(arrays.label), bool)
            is_chosen[numbers - start] = True
            label = divided.labels[start:stop]
            return _chosen(Arrays(arrays.image, label), is_chosen)
        start = stop
    raise AssertionError(f"no stored split holds {split}")


def _chosen(arrays: Arrays, is_chosen: np.ndarray) -> Arrays:
    # Copying half a gigabyte only to keep everything would be a waste.
    if is_chosen.all():
        return arrays
    return Arrays(arrays.image[is_chosen], arrays.label[is_chosen])


def check_arrays(arrays: Arrays, num_classes: int, name: str) -> None:
    """Raises UserError unless the arrays are images and labels of `num_classes` classes."""
    image, label = arrays
    if image.dtype != np.uint8 or image.ndim != 4:
        raise UserError(
            f"images of {name} are {image.dtype} {list(image.shape)}: give uint8 "
            "[n, height, width, channels]"
        )
    if label.dtype != np.int32 or label.shape != image.shape[:1]:
        raise UserError(
            f"labels of {name} are {label.dtype} {list(label.shape)}: give int32 "
            f"[{image.shape[0]}], one for each image"
        )
    if len(label) and not 0 <= label.min() <= label.max() < num_classes:
        raise UserError(
            f"labels of {name} run from {label.min()} to {label.max()}, but there are "
            f"{num_classes} classes: labels must lie in 0..{num_classes - 1}"
        )


Selection = tuple[tuple[str, ...], np.ndarray | None]


def all_classes(class_names: Sequence[str]) -> Selection:
    """Keeps every class."""
    return tuple(class_names), None


def even_odd(class_names: Sequence[str]) -> Selection:
    """Makes two classes of the label's parity."""
    return ("even", "odd"), np.arange(len(class_names), dtype=np.int32) % 2


def only(*classes: int | str, class_names: Sequence[str]) -> Selection:
    """Keeps these, by name or label, which become the labels 0, 1, ... in the order given."""
    chosen = [_class_index(class_names, str(each)) for each in classes]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise UserError("name at least two different classes, or 'all' or 'even-odd'")
    relabel = np.full(len(class_names), -1, np.int32)
    relabel[chosen] = np.arange(len(chosen), dtype=np.int32)
    return tuple(class_names[index] for index in chosen), relabel


CLASSES: spec.Registry = {"all": all_classes, "even-odd": even_odd, "only": only}


def select_classes(class_names: Sequence[str], classes: str) -> Selection:
    """Reads what `load` accepts as `classes`.

    Args:
      class_names: the names of the labels 0, 1, ...
      classes: `"all"`; `"even-odd"`; or `"only(3, 8)"`, of which `"3,8"` is short.

    Returns:
      (names of the classes left, the new label of each old one or -1; None for `"all"`).

    Raises:
      UserError: an unknown class, or fewer than two different ones.
    """
    items = spec.parse(classes, "classes")
    if len(items) != 1 or items[0].name not in CLASSES:
        items = [spec.Spec("only", tuple(spec.split(classes, ",")), text=classes)]
    return spec.call(items[0], CLASSES, "classes", class_names=class_names)


def _class_index(class_names: Sequence[str], text: str) -> int:
    text = text.strip()
    if text in class_names:
        return list(class_names).index(text)
    if text.isdecimal():
        if int(text) >= len(class_names):
            raise UserError(
                f"there is no class {text}: the labels are 0..{len(class_names) - 1}, or give a "
                "class by name"
            )
        return int(text)
    raise unknown_name("class", text, [*class_names, *CLASSES])


def hold_out(
    arrays: Arrays, amount: float, generator: np.random.Generator
) -> tuple[Arrays, Arrays]:
    """Splits at random into (the rest, `amount`): a share below 1, or a number of examples.

    Both parts keep the order that their examples had.
    """
    is_held = held_out.draw(arrays.label, amount, generator, is_stratified=False)
    return _chosen(arrays, ~is_held), _chosen(arrays, is_held)


def channel_moments(image: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 `[n, h, w, c]`, in units of 255.

    Exact up to float64 rounding: computed from the histogram. A constant channel gets a standard
    deviation of 1, so that dividing by it is harmless.
    """
    mean, std = [], []
    levels = np.arange(256) / 255.0
    for channel in range(image.shape[-1]):
        histogram = np.zeros(256, np.int64)
        for chunk in np.array_split(image[..., channel], max(1, len(image) // 4096)):
            histogram += np.bincount(chunk.ravel(), minlength=256)
        share = histogram / histogram.sum()
        center = float(share @ levels)
        deviation = float(np.sqrt(share @ (levels - center) ** 2))
        mean.append(center)
        std.append(deviation if np.count_nonzero(histogram) > 1 else 1.0)
    return tuple(mean), tuple(std)


def few_labels(dataset: object, per_class: int, *, seed: int) -> Dataset:
    """Returns the dataset with only `per_class` training examples of each class.

    Validation, test and the moments of the images stay as they are: images are not what is scarce.
    The examples of a class are the first of a shuffling that depends on the seed and the class
    alone, so that those of a smaller number are among those of a larger one.

    Args:
      dataset: in memory.
      per_class: how many examples of each class.
      seed: chooses them.

    Raises:
      UserError: `per_class` is not positive, a class has fewer examples, or the dataset is not in
        memory.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(
            "labels are counted in memory, but this dataset is streamed from disk: use the "
            "pipeline 'resident'."
        )
    if per_class < 1:
        raise UserError(f"{per_class} labels per class: use at least 1.")
    chosen = []
    for label, name in enumerate(dataset.class_names):
        rows = np.flatnonzero(dataset.train.label == label)
        if per_class > len(rows):
            raise UserError(
                f"{per_class} labels per class asked for, but class {name} of {dataset.name} has "
                f"{len(rows)} training images: use at most as many as the smallest class has."
            )
        order = numpy_generator(seed, "few labels", label).permutation(len(rows))
        chosen.append(rows[order[:per_class]])
    # In the order in which they were: shuffling is the pipeline's.
    rows = np.sort(np.concatenate(chosen))
    return replace(dataset, train=Arrays(dataset.train.image[rows], dataset.train.label[rows]))
