"""Files of named arrays: safetensors, NumPy's npz and Keras's; to read, those of others too.

Nothing in a file is executed. A file is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cnnjax.convert import flax_files, folders, keras_files, sizes, states, torch_files
from cnnjax.data.packaged import tensor_files
from cnnjax.errors import UserError

# What readers raise on damaged files: NotImplementedError and RuntimeError are zipfile's, of
# compression and encryption.
DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    AttributeError,
    *(NotImplementedError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error),
)

Arrays = dict[str, np.ndarray]
Note = Callable[[str], None]
Reader = Callable[[Path, str, Note], Arrays]

# https://github.com/huggingface/safetensors, section "Format".
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
SAFETENSORS_LARGEST_HEADER = 100_000_000


def read(path: str | Path, *, entry: str = "", note: Note = warnings.warn) -> Arrays:
    """Returns `{name: array}` of a file, each array as it is stored.

    Args:
      path: `.safetensors`, `.npz`, Keras's `.weights.h5`, `.keras` or `.h5` (see `keras_files`),
        PyTorch's `.pth`, `.pt`, `.bin`, `.ckpt` or `.pth.tar`, Flax's `.msgpack`; a checkpoint of
        TensorFlow, by its prefix or one of its files; or a folder, of a hub or of Orbax.
      entry: of PyTorch's and Flax's files: the key of the dictionary that holds the weights, dots
        between keys of nested ones. By default of PyTorch's the file's own content if it is a
        dictionary of arrays or a module, or else the first of `states.ENTRIES` that holds weights,
        or the only one that does; of Flax's what `flax_files.choose` finds.
      note: called with a line of text for each thing that is not taken as it is: the entry chosen,
        what in it is no array, and the functions and classes that the file refers to. Names are
        those of the file: `to_cnnjax` drops prefixes.

    Raises:
      UserError: the file is not there, not whole, of another format, or its tensors take code to
        make, which is never run.
    """
    path = Path(path)
    prefix = tensor_files.prefix_of(path)
    read_file = _read_tensors if prefix else _read_folder if path.is_dir() else None
    if read_file is None:
        read_file = _by_suffix(path, READERS, "read")
    with _one_error(path):
        arrays = read_file(prefix or path, entry, lambda text: note(f"{path}: {text}"))
        if not arrays:
            raise UserError("it holds no arrays.")
    return arrays


def is_readable(folder: Path) -> bool:
    """Whether a folder is one of weights that `read` reads, by the files that it has."""
    return folders.weights_file(folder) is not None or flax_files.is_orbax(folder)


def _only(read_file: Callable[[Path], Any]) -> Callable[[Path, str, Note], Any]:
    """Returns the reader of a format that has no entries."""

    def read_without_entry(path: Path, entry: str, note: Note) -> Arrays:
        if entry:
            raise UserError(f"entry={entry!r} is for PyTorch's and Flax's files; this has none.")
        return read_file(path)

    return read_without_entry


def _read_torch(path: Path, entry: str, note: Note) -> Arrays:
    if tensor_files.is_first_format(path):
        return _read_tensors(path, entry, note)
    with torch_files.opened(path) as reader:
        return states.choose(reader, entry, note)


def _read_folder(path: Path, entry: str, note: Note) -> Arrays:
    if folders.weights_file(path) is None and flax_files.is_orbax(path):
        return flax_files.choose(flax_files.read_orbax(path), entry, note)
    return folders.read(path, lambda file: read(file, entry=entry, note=note))


def _read_tensors(path: Path, entry: str, note: Note) -> Arrays:
    arrays, left_out = _only(tensor_files.read_variables)(path, entry, note)
    if left_out:
        note(f"leaving out {len(left_out)} of an optimizer, averages or counters: {left_out[0]}.")
    return arrays


def _read_msgpack(path: Path, entry: str, note: Note) -> Arrays:
    return flax_files.choose(flax_files.read_msgpack(path), entry, note)


def write(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    like: str | Path | None = None,
) -> None:
    """Writes arrays to a `.safetensors`, `.npz`, `.weights.h5` or `.keras` file, whole or not.

    Args:
      path: the file; replaced if it is there.
      arrays: `{name: array}`; for `.weights.h5` in the order of Keras (see `keras_files.write`).
      metadata: text for the file's header (npz has none).
      like: for `.keras`: a file of the same network that Keras saved. Its architecture is written
        with the arrays as weights, because arrays alone do not tell it.

    Raises:
      UserError: unknown suffix, a dtype that the format lacks, a `like` that is missing or does not
        fit, or the disk is full or not writable.
    """
    path = Path(path)
    write_file = _by_suffix(path, WRITERS, "write")
    if (path.suffix == ".keras") != (like is not None):
        raise UserError(
            f"cannot write {path}: like is for .keras files, which hold the architecture too, and "
            "these need it: a .keras file of the same network that Keras's model.save has written. "
            "A .weights.h5 file needs none."
        )
    if like is not None:
        with _one_error(Path(like)):
            template = keras_files.read_template(Path(like))
        write_file = functools.partial(write_file, template=template)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write_file(file, dict(arrays), dict(metadata or {}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): free some space or choose another path."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _by_suffix(path: Path, functions: Mapping[str, Any], verb: str) -> Any:
    for suffix in sorted(functions, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return functions[suffix]
    raise UserError(
        f"cannot {verb} {path}: its suffix tells no format; choose from {', '.join(functions)}."
    )


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Turns what goes wrong in reading `path` into one error that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not a file of weights.") from None
    except UserError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except DAMAGE as error:
        raise UserError(
            f"cannot read {path}: it is damaged, cut short or of another format "
            f"({type(error).__name__}: {error})."
        ) from None


def _read_npz(path: Path, entry: str, note: Note) -> Arrays:
    # The first bytes, because np.load reads .npy files and pickles under any name.
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise UserError("it is no npz file (a zip archive): it is cut short or another format.")
    with zipfile.ZipFile(path) as archive:
        sizes.check_archive(archive)
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise UserError(f"{name} is of dtype {array.dtype}: npz keeps no bfloat16.")
    if flax_files.has_collections(arrays):
        return flax_files.choose(flax_files.nested(arrays), entry, note)
    return _only(lambda path: arrays)(path, entry, note)


def _write_npz(file: BinaryIO, arrays: Arrays, metadata: dict[str, str]) -> None:
    del metadata
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise UserError(f"npz keeps no {array.dtype} ({name}): write a .safetensors file.")
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _read_safetensors(path: Path) -> Arrays:
    content = path.read_bytes()
    if len(content) < 8:
        raise UserError("it is cut short: a safetensors file begins with eight bytes of length.")
    length = int.from_bytes(content[:8], "little")
    if length > min(SAFETENSORS_LARGEST_HEADER, len(content) - 8):
        raise UserError(
            f"its header would have {length:,} bytes: it is cut short or no safetensors file."
        )
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        rows = {
            name: (
                SAFETENSORS_DTYPES[row["dtype"]],
                sizes.checked_shape(row["shape"]),
                *row["data_offsets"],
            )
            for name, row in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"its header is no safetensors header ({error!r}).") from None
    data = memoryview(content)[8 + length :]
    end = 0
    for name, (dtype, shape, start, stop) in sorted(rows.items(), key=lambda row: row[1][2:]):
        if start != end or stop - start != dtype.itemsize * math.prod(shape) or stop > len(data):
            raise UserError(f"{name} is not where its header says: it is cut short or damaged.")
        end = stop
    if end != len(data):
        raise UserError(f"{len(data) - end:,} bytes belong to no tensor: it is damaged.")
    return {
        name: np.frombuffer(data[start:stop], dtype).reshape(shape)
        for name, (dtype, shape, start, stop) in rows.items()
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("two entries have the same name")
    return dict(pairs)


def _write_safetensors(file: BinaryIO, arrays: Arrays, metadata: dict[str, str]) -> None:
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    # Wide types first, so that every array is aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in order:
        array = arrays[name]
        if array.dtype not in names:
            raise UserError(f"safetensors has no dtype {array.dtype} ({name}).")
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(np.ascontiguousarray(arrays[name]).tobytes())


TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".tar", ".th")
READERS: dict[str, Reader] = {
    ".safetensors": _only(_read_safetensors),
    ".npz": _read_npz,
    **dict.fromkeys((".weights.h5", ".keras", ".h5"), _only(keras_files.read)),
    **dict.fromkeys(TORCH_SUFFIXES, _read_torch),
    ".msgpack": _read_msgpack,
}
WRITERS: dict[str, Callable[..., None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".weights.h5": keras_files.write,
    ".keras": keras_files.write_archive,
}
