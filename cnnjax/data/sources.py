"""`load`: a dataset by name, as NumPy arrays, with a validation split."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

import numpy as np

from cnnjax.data import held_out, mnist
from cnnjax.data.dataset import (
    Arrays,
    Dataset,
    Source,
    make_dataset,
    select_classes,
)
from cnnjax.data.image_files import fit_image, pad_to, parse_fit, shrunk_size
from cnnjax.data.packaged import digits
from cnnjax.errors import UserError
from cnnjax.paths import expand

# Larger datasets are streamed: see `cnnjax.data.streamed`.
MAX_BYTES = 4 * 2**30


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    classes: str = "all",
    validation: float = 0.1,
    fold: str = "",
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    fit: str = "pad",
    stratify: bool = True,
    drop_duplicates: bool = False,
) -> Dataset:
    """Loads a labeled image dataset into memory, as uint8.

    Nothing is downloaded: `mnist` ships with cnnjax, and other tfds datasets are prepared once by
    `python scripts/prepare_data.py`. Everything that can be checked is checked before the pixels
    are read.

    >>> mnist = load("mnist", classes="3,8", validation=0.1)
    >>> mnist.class_names, mnist.image_shape, len(mnist.test.label)
    (('3', '8'), (28, 28, 1), 1984)

    Args:
      name: one of
        `mnist`: the shipped MNIST, without TensorFlow;
        `digits`: the 1,797 digits of 8x8 pixels of scikit-learn;
        `tfds:NAME`: any image-classification dataset of tfds, with configuration, version and
        sliced splits as tfds writes them: `tfds:fashion_mnist`, `tfds:mnist:3.0.1`,
        `tfds:mnist?train=train[:10%]&test=test`;
        `folder:PATH`: image files in one sub-directory per class, optionally below `train`,
        `validation` and `test`: see `cnnjax.data.folder.open_folder`.
      data_dir: where tfds keeps prepared datasets; `$TFDS_DATA_DIR` or `~/tensorflow_datasets` by
        default. The other sources do not use it.
      classes: `"all"`; names or labels such as `"3,8"`, which become the labels 0, 1, ...; or
        `"even-odd"`, the label's parity.
      validation: the share (below 1) or the number of training images held out for validation, for
        a dataset without a validation split. 0 holds out none: `validation` is then empty.
      fold: such as `2/5`: the validation images are the second of five parts of the training images
        instead, for cross-validation.
      seed: chooses which images those are.
      image_size: side of the square images wanted, or (height, width); needed where files differ.
      fit: `"pad"` centers an image on black, made smaller first where it does not fit; `"resize"`
        stretches it; `"crop"` cuts out its middle, as ImageNet is tested: see
        `cnnjax.data.image_files.fit_image`.
      stratify: whether a validation or test split that is drawn has the images of each class in
        proportion. Those of `mnist` and `digits`, whose classes are of one size, are drawn from all
        images alike.
      drop_duplicates: of a folder, whether to train without the files that are, byte for byte, in
        validation or test too. They are counted in the `notes` of the dataset in any case.

    Returns:
      The dataset. One without a test split is tested on its validation split, or without that on a
      tenth of its training images, the same for every seed.

    Raises:
      UserError: whatever is wrong, in one line.
    """
    held_out.check_validation(validation)
    held_out.check_fold(fold)
    parse_fit(fit)
    size = checked_size(image_size)
    source = _open(name, data_dir, size, fit)
    check_duplicates(name, has_files=source.files is not None, drop_duplicates=drop_duplicates)
    class_names, relabel = select_classes(source.class_names, classes)
    num_train = source.num_examples["train"]
    if "validation" not in source.num_examples and validation >= num_train:
        raise UserError(
            f"validation={validation:g} is not fewer than the {num_train} training images of "
            f"{name!r}: hold out fewer"
        )
    return make_dataset(
        name,
        class_names,
        source.read(),
        relabel=relabel,
        validation=validation,
        fold=fold,
        seed=seed,
        is_stratified=stratify and source.is_stratified,
        files=source.files() if source.files else None,
        drop_duplicates=drop_duplicates,
    )


def check_duplicates(name: str, *, has_files: bool, drop_duplicates: bool) -> None:
    """Raises UserError where duplicates are to be dropped from what was not read from files."""
    if drop_duplicates and not has_files:
        raise UserError(
            f"drop_duplicates (--drop-duplicates): {name!r} is no folder of files that could be "
            "compared: leave it out"
        )


def checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) of what `load` accepts as `image_size`; UserError unless positive."""
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"image_size={image_size}: give a positive side, or (height, width)")
    return size[0], size[1]


def _open(
    name: str, data_dir: str | os.PathLike | None, size: tuple[int, int] | None, fit: str
) -> Source:
    kind, colon, rest = name.partition(":")
    if name == "mnist":
        return _open_arrays(
            mnist.CLASS_NAMES, {"train": 60_000, "test": 10_000}, mnist.read, size, fit
        )
    if name == "digits":
        counts = {"train": digits.NUM_EXAMPLES}
        return _open_arrays(digits.CLASS_NAMES, counts, lambda: {"train": digits.read()}, size, fit)
    if kind == "tfds" and rest:
        from cnnjax.data.tfds_source import open_tfds

        return open_tfds(rest, data_dir=data_dir, image_size=size, fit=fit, max_bytes=MAX_BYTES)
    if kind == "folder" and rest:
        from cnnjax.data.folder import open_folder

        return open_folder(rest, image_size=size, fit=fit, max_bytes=MAX_BYTES)
    if not colon and os.path.isdir(expand(name)):
        raise UserError(f"unknown dataset {name!r}: for a directory write 'folder:{name}'")
    raise _unknown_dataset(name)


def _unknown_dataset(name: str) -> UserError:
    import tensorflow_datasets as tfds

    known = {each: f"tfds:{each}" for each in tfds.list_builders(with_community_datasets=False)}
    known |= {"mnist": "mnist", "digits": "digits"}
    # Among hundreds of short names some are always somewhat alike.
    near = [each for each in known if len(name) > 3 and each.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.75)
    hint = f": did you mean {' or '.join(known[each] for each in near[:3])}?" if near else "."
    return UserError(
        f"unknown dataset {name!r}{hint} Datasets are named 'mnist', 'digits', 'tfds:NAME' or "
        "'folder:PATH'"
    )


def _open_arrays(
    class_names: tuple[str, ...],
    num_examples: dict[str, int],
    read: Callable[[], dict[str, Arrays]],
    size: tuple[int, int] | None,
    fit: str,
) -> Source:
    def read_fitted() -> dict[str, Arrays]:
        splits = read()
        if size is None:
            return splits
        return {split: _fitted(arrays, size, fit) for split, arrays in splits.items()}

    return Source(class_names, num_examples, read_fitted)


def _fitted(arrays: Arrays, size: tuple[int, int], fit: str) -> Arrays:
    found = arrays.image.shape[1:3]
    if found == size:
        return arrays
    num_bytes = len(arrays.label) * size[0] * size[1] * arrays.image.shape[-1]
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"{len(arrays.label)} images of {size[0]}x{size[1]} pixels take "
            f"{num_bytes / 2**30:,.0f} GiB of memory: give a smaller image_size"
        )
    if fit == "pad" and shrunk_size(found, size) == found:
        return Arrays(pad_to(arrays.image, size), arrays.label)
    images = np.empty((len(arrays.label), *size, arrays.image.shape[-1]), np.uint8)
    for index, image in enumerate(arrays.image):
        images[index] = fit_image(image, size, fit)
    return Arrays(images, arrays.label)
