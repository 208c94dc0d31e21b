"""Features of a tfds dataset as the fields of any task: one array a key, in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cnnjax.data import held_out
from cnnjax.data.dataset import ArrayDataset
from cnnjax.data.fields import Boxes, ClassMap, Field, Image, Label, Scalar, Tokens, Waveform
from cnnjax.data.image_files import resize_image
from cnnjax.data.sources import MAX_BYTES, checked_size
from cnnjax.data.tfds_source import check_prepared, find_builder, read_config
from cnnjax.data.tfds_splits import choose_splits, parse_spec
from cnnjax.errors import UserError, unknown_name
from cnnjax.rng import numpy_generator

Split = dict[str, np.ndarray]


def load_features(
    name: str,
    fields: Mapping[str, Field],
    *,
    features: Mapping[str, str] | None = None,
    change: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    data_dir: str | os.PathLike | None = None,
    image_size: int | tuple[int, int] | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> ArrayDataset:
    """Reads features of a prepared tfds dataset into memory, for any task.

        pets = load_features(
            "tfds:oxford_iiit_pet",
            {"image": Image(), "class_map": ClassMap(3)},
            features={"class_map": "segmentation_mask"},
            change={"class_map": lambda mask: mask - 1},
            image_size=128,
        )

    Args:
      name: `tfds:NAME`, with configuration, version and splits as `cnnjax.data.load` takes them.
      fields: key of a batch -> what it is.
      features: key -> name of its feature, `objects/bbox` for one within another; by default the
        key's own name.
      change: key -> function of one example's feature, as it is stored, applied first.
      data_dir: where prepared datasets are.
      image_size: the size (height, width), or the side, that images and class maps are stretched
        to, interpolated and by the nearest neighbor; boxes move with them. None where all images
        have one size.
      validation: share of the training examples held out, or their number, where the dataset has no
        split of that name. One without a test split is tested on a tenth of its training examples.
      seed: chooses the validation examples.

    Returns:
      The dataset. Boxes, in tfds relative to the image, are in pixels; rows that are missing are
      zeros. So are tokens behind the end of a shorter text.

    Raises:
      NotPreparedError: the dataset is not on disk.
      UserError: no such feature, one that is not what its field says, examples of several shapes,
        or more than 4 GiB.
    """
    import tensorflow_datasets as tfds

    held_out.check_validation(validation)
    spec = parse_spec(name.removeprefix("tfds:"))
    builder = find_builder(spec.name, data_dir)
    check_prepared(builder, spec.name)
    size = checked_size(image_size)
    places = {key: (features or {}).get(key, key) for key in fields}
    for place in places.values():
        _check_feature(builder, place)
    splits: dict[str, Split] = {}
    for split, slices in choose_splits(builder, spec.splits).items():
        stored = builder.as_dataset(split=slices, shuffle_files=False, read_config=read_config())
        examples = (
            _example(example, fields, places, change or {}, size, number)
            for number, example in enumerate(tfds.as_numpy(stored))
        )
        splits[split] = _stacked(examples, fields, f"{split} of {name}")
    for split, amount, own_seed in (
        ("test", held_out.TEST_SHARE, 0),
        ("validation", validation, seed),
    ):
        if split not in splits:
            generator = numpy_generator(own_seed, f"{split} split")
            splits["train"], splits[split] = _divided(splits["train"], amount, generator)
    return ArrayDataset(name, dict(fields), splits["train"], splits["validation"], splits["test"])


def _check_feature(builder: Any, place: str) -> None:
    found: Any = builder.info.features
    for part in place.split("/"):
        # A Sequence of features has them as it were its own.
        inner = getattr(found, "feature", found)
        if not hasattr(inner, "keys") or part not in inner:
            known = list(inner) if hasattr(inner, "keys") else []
            raise unknown_name(f"feature of {builder.info.full_name}", part, known)
        found = inner[part]


def _example(
    stored: Mapping[str, Any],
    fields: Mapping[str, Field],
    places: Mapping[str, str],
    change: Mapping[str, Callable[[np.ndarray], Any]],
    size: tuple[int, int] | None,
    number: int,
) -> dict[str, np.ndarray]:
    values: dict[str, Any] = {}
    for key, place in places.items():
        value: Any = stored
        for part in place.split("/"):
            value = value[part]
        values[key] = change[key](value) if key in change else value
    images = [np.shape(values[key]) for key, field in fields.items() if isinstance(field, Image)]
    final = size or (images[0][:2] if images else None)
    return {
        key: _converted(values[key], field, size, final, f"{key} of example {number}")
        for key, field in fields.items()
    }


def _converted(
    value: Any,
    field: Field,
    size: tuple[int, int] | None,
    final: tuple[int, ...] | None,
    name: str,
) -> np.ndarray:
    """Returns one example's array as its field wants it."""
    array = np.asarray(value)
    if isinstance(field, Image):
        if array.ndim != 3 or array.dtype != np.uint8:
            raise _not_a(name, array, "an 8-bit image [height, width, channels]")
        return array if size is None else resize_image(array, size)
    if isinstance(field, ClassMap):
        array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise _not_a(name, array, "integers [height, width]")
        array = array.astype(np.uint8)
        return array if size is None else _nearest(array, size)
    if isinstance(field, Boxes):
        array = array.reshape(-1, 4) if array.size else np.zeros((0, 4), np.float32)
        if len(array) > field.max:
            raise UserError(f"{name}: there are {len(array)} boxes, more than Boxes({field.max}).")
        if final is None:
            raise UserError(f"{name}: boxes are in pixels of an image, and there is no Image().")
        pixels = array.astype(np.float32) * np.array([*final, *final], np.float32)
        return np.concatenate([pixels, np.zeros((field.max - len(array), 4), np.float32)])
    if isinstance(field, Tokens):
        if array.ndim != 1 or len(array) > field.length:
            raise _not_a(name, array, f"at most {field.length} integers")
        return np.pad(array.astype(np.int32), (0, field.length - len(array)))
    if isinstance(field, Waveform):
        array = array[:, None] if array.ndim == 1 else array
        return array.astype(np.float32)
    if isinstance(field, Label):
        return array.astype(np.int32)
    if isinstance(field, Scalar):
        return array.astype(np.float32)
    return array


def _not_a(name: str, array: np.ndarray, wanted: str) -> UserError:
    return UserError(
        f"{name} is {array.dtype} {list(array.shape)}, not {wanted}: name another feature, or make "
        "it one by `change`."
    )


def _nearest(class_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image as PillowImage

    wanted = size[1], size[0]
    picture = PillowImage.fromarray(class_map)
    return np.asarray(picture.resize(wanted, PillowImage.Resampling.NEAREST))


def _stacked(examples: Any, fields: Mapping[str, Field], name: str) -> Split:
    columns: dict[str, list[np.ndarray]] = {key: [] for key in fields}
    num_bytes = 0
    for number, example in enumerate(examples):
        for key, array in example.items():
            first = columns[key][0] if columns[key] else array
            if array.shape != first.shape:
                raise UserError(
                    f"{key} of example {number} in {name} is {list(array.shape)}, of others "
                    f"{list(first.shape)}: give image_size, or one shape by `change`."
                )
            columns[key].append(array)
            num_bytes += array.nbytes
        if num_bytes > MAX_BYTES:
            raise UserError(
                f"{name} takes more than {MAX_BYTES / 2**30:g} GiB of memory: choose a smaller "
                "image_size, or a slice such as train[:10%]."
            )
    return {key: np.stack(arrays) for key, arrays in columns.items()}


def _divided(split: Split, amount: float, generator: np.random.Generator) -> tuple[Split, Split]:
    count = len(next(iter(split.values())))
    labels = np.zeros(count, np.int32)
    is_held = held_out.draw(labels, amount, generator, is_stratified=False)
    rest = {key: array[~is_held] for key, array in split.items()}
    return rest, {key: array[is_held] for key, array in split.items()}
