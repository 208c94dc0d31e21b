"""Arrays that are mostly zero, in one file: which values are not zero, and those values.

A file `packed.npz` is a NumPy archive that `numpy.load` reads. Of an array `conv1/kernel` that is
smaller so, it has `conv1/kernel|values`, what is not zero in C order, and where that is: as
`|bits`, a bit for each value (`numpy.packbits`), or as `|gaps`, the number of zeros before each of
them, whichever is smaller. Other arrays are in it under their own path, as they are. Zero is the
value whose bits are all zero, so all come back bit for bit. Everything is deflated.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnnjax.checkpoint.manifest import Damaged

NAME = "packed.npz"
VALUES, BITS, GAPS = "|values", "|bits", "|gaps"


def write(directory: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Makes a directory, and writes arrays by path into one file in it."""
    directory.mkdir(parents=True, exist_ok=True)
    parts: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        parts |= packed(name, np.asarray(leaf))
    with zipfile.ZipFile(directory / NAME, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, part in parts.items():
            # A fixed time, so that the same arrays are the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, part, allow_pickle=False)


def packed(name: str, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what stands for an array in the file."""
    flat = _as_bytes(leaf)
    there = flat.any(axis=1)
    places = np.flatnonzero(there)
    gaps = np.diff(places, prepend=-1) - 1
    gaps = gaps.astype(np.min_scalar_type(int(gaps.max(initial=0))))
    bits = np.packbits(there)
    where = {BITS: bits} if bits.nbytes <= gaps.nbytes else {GAPS: gaps}
    size = sum(part.nbytes for part in where.values()) + len(places) * leaf.dtype.itemsize
    if size >= leaf.nbytes:
        return {name: flat if _is_foreign(leaf.dtype) else leaf}
    values = flat[places]
    if not _is_foreign(leaf.dtype):
        values = values.copy().view(leaf.dtype)[:, 0]
    return {f"{name}{VALUES}": values, **{f"{name}{key}": part for key, part in where.items()}}


def read(path: Path, table: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, of the shapes and dtypes in a table.

    Raises:
      Damaged: the file cannot be read, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        return {name: _unpacked(name, found, row) for name, row in table.items()}
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        text = str(error).partition("\n")[0]
        raise Damaged(f"its file {path.name} cannot be read ({text})") from None


def _unpacked(name: str, found: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = jnp.dtype(row["dtype"]), row["shape"]
    if name in found:
        return np.ascontiguousarray(found[name]).view(dtype).reshape(shape)
    flat = np.zeros((int(np.prod(shape)), dtype.itemsize), np.uint8)
    if name + BITS in found:
        places = np.flatnonzero(np.unpackbits(found[name + BITS], count=len(flat)))
    else:
        places = np.cumsum(found[name + GAPS].astype(np.int64) + 1) - 1
    flat[places] = _as_bytes(found[name + VALUES]).reshape(len(places), dtype.itemsize)
    return flat.view(dtype).reshape(shape)


def _as_bytes(leaf: np.ndarray) -> np.ndarray:
    """Returns the bytes of each value: `[values, bytes]`."""
    flat = np.ascontiguousarray(leaf).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, leaf.dtype.itemsize)


def _is_foreign(dtype: Any) -> bool:
    """Whether NumPy's files do not know a type, such as bfloat16."""
    return np.dtype(dtype).kind == "V"
