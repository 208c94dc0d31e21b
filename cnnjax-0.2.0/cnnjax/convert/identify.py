"""Whose names a file has, and which network of the zoo its tensors fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import numpy as np

from cnnjax import models
from cnnjax.convert import mapping, prefixes
from cnnjax.convert.names import Entry, Names, entries
from cnnjax.errors import UserError

# Of the networks whose number of parameters is the file's: so many are compared by name and shape.
MOST_CANDIDATES = 6
# Between a layer's name and the names of its kernel and its bias.
KERNELS = {".bias": ".weight", "/bias": "/kernel", "/biases": "/weights"}


def framework_of(
    arrays: Mapping[str, np.ndarray], model: nn.Module, image_shape: Sequence[int], library: str
) -> str:
    """Returns the framework whose names of `model` the arrays have.

    Args:
      arrays: of a file.
      model: of `cnnjax.models`.
      image_shape: `[height, width, channels]` of its images.
      library: that was named, which goes first; "" for none.

    Raises:
      UserError: the names of the library are not known, and the arrays have no others.
    """
    known = mapping.frameworks_for(model)
    known = [library, *(each for each in known if each != library)] if library in known else known
    found, share = framework(arrays, model, image_shape, known)
    if library and library not in known and share < 0.5:
        raise UserError(
            f"{library}'s names of the layers of {type(model).__name__} are not known here, and "
            f"the file has not those of {' or '.join(known)} either: from Python, give "
            "convert.to_cnnjax a table of your own (convert.Names)."
        )
    return found


def framework(
    arrays: Mapping[str, np.ndarray],
    model: nn.Module,
    image_shape: Sequence[int],
    frameworks: Sequence[str],
) -> tuple[str, float]:
    """Returns that of the frameworks of whose names for `model` the arrays have most, and how many.

    The first where several have as many, or none any. How many is the fraction of all its names.
    """
    best, most = frameworks[0], 0.0
    for each in frameworks:
        found = _table(model, image_shape, each)
        if found is None:
            continue
        needed = {entry.name for entry in found[1]}
        share = len(needed & _stripped(arrays, found).keys()) / max(len(needed), 1)
        if share > most:
            best, most = each, share
        if most == 1:
            break
    return best, most


@dataclasses.dataclass(frozen=True)
class Fit:
    """A network of the zoo that a file's tensors fit.

    Attributes:
      name: ours.
      framework: whose names the file has.
      classes: that its head is for; None without a head.
    """

    name: str
    framework: str
    classes: int | None


def fitting(arrays: Mapping[str, np.ndarray]) -> Iterator[Fit]:
    """Yields the networks whose names and shapes the arrays have, with any head or none.

    Networks are told apart by the numbers of their parameters first, so few are looked at closely.
    """
    for name in itertools.islice(_of_that_size(arrays), MOST_CANDIDATES):
        model = models.create(name, num_classes=models.canonical_classes(name))
        for each in mapping.frameworks_for(model):
            found = _table(model, models.input_shape(name), each)
            stripped = _stripped(arrays, found) if found else {}
            if found and _fits(stripped, found[1]):
                yield Fit(name, each, mapping.classes_of(stripped, found[1]))
                break


def _of_that_size(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    weights = {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind in "fV" and "aux" not in name.lower() and array.ndim
    }
    total = sum(array.size for array in weights.values())
    heads = {
        (array.size, weights[kernel].size // array.size)
        for name, array in weights.items()
        if (kernel := _kernel_of(name)) in weights and array.size
    }
    for name, row in models.MODELS.items():
        if row.parameters is None:
            continue
        missing = row.parameters + (row.statistics or 0) - total
        changed = any(missing == (row.num_classes - c) * (width + 1) for c, width in heads)
        # Without a head: whole features, that is, a number of parameters for each class.
        absent = 0 < missing <= row.num_classes * 8193 and missing % row.num_classes == 0
        if missing == 0 or changed or absent:
            yield name


def _kernel_of(name: str) -> str:
    for bias, kernel in KERNELS.items():
        if name.endswith(bias):
            return name.removesuffix(bias) + kernel
    return ""


def _table(
    model: nn.Module, image_shape: Sequence[int], framework: str
) -> tuple[Names, list[Entry]] | None:
    """Returns the names, and the entries of the model with the fields that they require."""
    try:
        names = mapping.find_names(model, framework)
        model = models.with_fields(model, **names.requires)
        return names, entries(model, image_shape, names)
    except UserError:
        return None


def _stripped(
    arrays: Mapping[str, np.ndarray], table: tuple[Names, list[Entry]]
) -> Mapping[str, np.ndarray]:
    names, found = table
    try:
        needed = {entry.name for entry in found}
        prefix = prefixes.common_prefix(arrays, needed, names.separator)
        return prefixes.without_prefix(arrays, prefix) if prefix else arrays
    except UserError:
        return arrays


def _fits(arrays: Mapping[str, np.ndarray], table: Sequence[Entry]) -> bool:
    return all(
        entry.name in arrays and tuple(arrays[entry.name].shape) == entry.their_shape
        for entry in table
        if not mapping.is_head(entry)
    )
