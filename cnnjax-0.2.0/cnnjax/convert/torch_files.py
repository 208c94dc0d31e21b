"""Reads what `torch.save` wrote, without PyTorch and without executing anything.

Such a file is a pickle, that is, a program: `pickles` carries it out with placeholders for all that
it would call. The tensors' bytes stand next to the pickle: in a zip archive since PyTorch 1.6, one
after another in a row before. They are read for the tensors that are asked for alone, so that an
optimizer's costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np

from cnnjax.convert.pickles import Global, Machine, Placeholder
from cnnjax.errors import UserError

# By torch's name of the dtype, and by the class of its storages where it has one.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "float64": np.float64,
        "float32": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "int64": np.int64,
        "int32": np.int32,
        "int16": np.int16,
        "int8": np.int8,
        "uint64": np.uint64,
        "uint32": np.uint32,
        "uint16": np.uint16,
        "uint8": np.uint8,
        "bool": np.bool_,
        "complex64": np.complex64,
        "complex128": np.complex128,
    }.items()
}
STORAGES = {
    f"{name}Storage": DTYPES[dtype]
    for name, dtype in {
        **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
        **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
        **{"Bool": "bool", "Untyped": "uint8"},
        **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
        # Of quantized tensors, which are refused; the sizes tell where the next begins.
        **{"QInt8": "int8", "QUInt8": "uint8", "QInt32": "int32"},
    }.items()
}
# torch/serialization.py, `MAGIC_NUMBER` of the format before 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MOST_AXES = 32
# Tensors that are views of one storage are copied: so many times the file's size at most.
MOST_COPIES = 8
# Placeholders that `Reader.array` makes arrays of, and the modules whose functions make tensors.
TENSORS = (
    *(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")),
    *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
    *("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"),
    "torch._utils._rebuild_device_tensor_from_numpy",
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
)
REBUILD = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.nested")


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bytes that tensors are views of."""

    key: str
    dtype: np.dtype
    size: int


class Reader:
    """A file's content, and its tensors on demand.

    Attributes:
      content: what was saved, tensors and other objects as placeholders.
      unknown: the functions and classes that it refers to, without those that make tensors.
      read_without: the classes of modules whose tensors were read all the same.
    """

    def __init__(
        self,
        content: Any,
        unknown: list[str],
        load: Callable[[Storage], bytes],
        order: str,
        size: int,
    ) -> None:
        self.content = content
        self.unknown = [name for name in unknown if not _of_tensors(name)]
        self.read_without: set[str] = set()
        self._load = load
        self._order = order
        self._left = MOST_COPIES * size + 2**20
        self._unread = size
        self._loaded: dict[Storage, bytes] = {}
        self._views: dict[tuple, np.ndarray] = {}

    def array(self, thing: Any, name: str = "") -> np.ndarray:
        """Returns the array of a placeholder for which `is_tensor` holds.

        Raises:
          UserError: it takes code to make it, or it is damaged; `name` is for the message.
        """
        try:
            return self._array(thing, 0)
        except UserError as error:
            raise UserError(f"its tensor {name}: {error}" if name else str(error)) from None
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(f"its tensor {name} is damaged ({error}).") from None

    def _array(self, thing: Any, depth: int) -> np.ndarray:
        if not isinstance(thing, Placeholder) or thing.name not in TENSORS or depth > 3:
            raise refused(thing)
        kind, arguments = thing.name.rpartition(".")[2], thing.arguments
        if kind in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return self._array(arguments[0], depth + 1)
        if kind == "_rebuild_device_tensor_from_numpy":
            return self._array(arguments[0], depth + 1)
        if kind in ("_rebuild_from_type_v2", "_rebuild_from_type"):
            function, _, inner = arguments[:3]
            return self._array(Placeholder(_name(function), inner), depth + 1)
        if kind == "_reconstruct":
            _, shape, dtype, columns_first, content = thing.state[:5]
            flat = np.frombuffer(_content(content), _numpy_dtype(dtype))
            return self._copied(flat.reshape(shape, order="F" if columns_first else "C"))
        if kind == "_frombuffer":
            content, dtype, shape, order = arguments[:4]
            array = np.frombuffer(_content(content), _numpy_dtype(dtype))
            return self._copied(array.reshape(shape, order=order))
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, Storage):
            raise refused(storage)
        dtype = storage.dtype
        if kind == "_rebuild_tensor_v3":
            dtype = DTYPES[_name(arguments[6]).removeprefix("torch.")]
        return self._view(storage, dtype, offset, tuple(shape), tuple(strides))

    def _view(
        self, storage: Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple
    ) -> np.ndarray:
        whole = all(type(n) is int and n >= 0 for n in (*shape, *strides, offset))
        if not whole or len(shape) != len(strides) or len(shape) > MOST_AXES:
            raise UserError("it has no proper shape: it is damaged.")
        view = (storage, dtype, offset, shape, strides)
        if view not in self._views:
            self._views[view] = self._made(*view)
        return self._views[view]

    def _made(
        self, storage: Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple
    ) -> np.ndarray:
        numbers = np.frombuffer(self._bytes(storage), dtype)
        numbers = numbers.byteswap() if self._order == "big" else numbers
        size = math.prod(shape)
        if size == 0:
            return np.zeros(shape, dtype)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # The second: a few bytes must not claim to be a huge tensor of repeated values.
        if last >= numbers.size or size > numbers.size:
            raise UserError("it reaches beyond its storage: it is damaged.")
        steps = [step * numbers.itemsize for step in strides]
        view = np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)
        return self._copied(view)

    def _copied(self, view: np.ndarray) -> np.ndarray:
        self._left -= view.nbytes
        if self._left < 0:
            raise UserError(f"all tensors have more than {MOST_COPIES} times the file's size.")
        # Without a copy where it is a whole part of what was read.
        return np.array(view, view.dtype.newbyteorder("="), order="C", copy=None)

    def _bytes(self, storage: Storage) -> bytes:
        if storage not in self._loaded:
            # Those of a zip archive might overlap.
            self._unread -= storage.size * storage.dtype.itemsize
            if self._unread < 0:
                raise UserError("its storages have more bytes than the file.")
            content = self._load(storage)
            if len(content) != storage.size * storage.dtype.itemsize:
                raise UserError(f"its storage {storage.key} is cut short.")
            self._loaded[storage] = content
        return self._loaded[storage]


def is_tensor(thing: Any) -> bool:
    """Whether it stands for a tensor, perhaps for one that takes code to make."""
    return isinstance(thing, Placeholder) and _of_tensors(thing.name)


def refused(thing: Any) -> UserError:
    """Returns the error for a tensor that is made by what is not known here."""
    name = thing.name if isinstance(thing, Placeholder | Global) else f"a {type(thing).__name__}"
    kinds = {"qtensor": "quantized", "sparse": "sparse", "nested": "nested", "meta": "without data"}
    kind = next((f" ({text})" for part, text in kinds.items() if part in name), "")
    return UserError(
        f"it is made by {name}{kind}, which is refused: nothing in a file is run. Save plain "
        "tensors with PyTorch, such as those of model.state_dict()."
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Gives the reader of a file by `torch.save`, as long as the file is open.

    Raises:
      UserError: it is of another format.
      Exception: the file is damaged.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _read_zip(archive, size)
    else:
        with path.open("rb") as file:
            yield _read_legacy(file, size)


def _read_zip(archive: zipfile.ZipFile, size: int) -> Reader:
    names = archive.namelist()
    found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(found) != 1:
        raise UserError("it is a zip archive, but not one that torch.save wrote.")
    folder = found[0].removesuffix("data.pkl")

    def stored(name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise UserError("it is compressed, which torch.save never does.")
        # Reading checks the archive's own checksum.
        return archive.read(name)

    order = stored(f"{folder}byteorder").decode() if f"{folder}byteorder" in names else "little"
    machine = Machine(_persistent)
    content = machine.run(io.BytesIO(stored(found[0])))
    return Reader(
        content,
        list(machine.unknown),
        lambda storage: stored(f"{folder}data/{storage.key}"),
        order,
        size,
    )


def _read_legacy(file: BinaryIO, size: int) -> Reader:
    bounded: Any = _Bounded(file, size)
    try:
        magic = Machine(_persistent).run(bounded)
    except UserError:
        magic = None
    if magic != LEGACY_MAGIC:
        raise UserError("it is no file of torch.save, or it is cut short.")
    version, system = (Machine(_persistent).run(bounded) for _ in range(2))
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise UserError("it is of a version of torch.save that is not read here.")
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Any:
        found = _persistent(identity)
        if isinstance(found, Storage):
            return storages.setdefault(found.key, found)
        if isinstance(identity, tuple) and identity[:1] == ("storage",):
            # Its bytes are in the row, read or not.
            storages.setdefault(str(identity[2]), found)
        return found

    machine = Machine(persistent)
    content = machine.run(bounded)
    places: dict[str, int] = {}
    for key in Machine(_persistent).run(bounded):
        length = int.from_bytes(bounded.read(8), "little")
        storage = storages[key]
        if not isinstance(storage, Storage):
            raise UserError("it holds numbers of a kind that is not read here.")
        places[key] = file.tell()
        end = places[key] + length * storage.dtype.itemsize
        if length != storage.size or end > size:
            raise UserError(f"its storage {key} is cut short.")
        file.seek(end)

    def load(storage: Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.size * storage.dtype.itemsize)

    return Reader(content, list(machine.unknown), load, "little", size)


class _Bounded:
    """A file that is never asked for more than it has: the memory is taken before it is read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.readline = file.readline
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))


def _persistent(identity: Any) -> Any:
    """Returns the storage that an identity tells, or a placeholder for one not read here."""
    if not isinstance(identity, tuple) or not identity:
        raise UserError("its tensors are not kept as torch.save keeps them.")
    if identity[0] == "module" and len(identity) > 1:
        # Before 1.6: a class, with its source.
        return identity[1]
    kind, storage_type, key, _, size = identity[:5]
    name = _name(storage_type)
    module, _, last = name.rpartition(".")
    if kind != "storage" or type(size) is not int or size < 0 or not isinstance(key, str):
        raise UserError("its tensors are not kept as torch.save keeps them.")
    view_of_another = len(identity) == 6 and identity[5] is not None
    if module not in ("torch", "torch.storage") or last not in STORAGES or view_of_another:
        return Placeholder(f"a view of another {last}" if view_of_another else name)
    return Storage(key, STORAGES[last], size)


def _content(thing: Any) -> bytes:
    # A number would be so many zeros.
    if not isinstance(thing, bytes | bytearray):
        raise UserError("its bytes are none: it is damaged.")
    return bytes(thing)


def _numpy_dtype(thing: Any) -> np.dtype:
    """Returns the dtype that NumPy's pickle describes: its code, then its order of bytes."""
    if not isinstance(thing, Placeholder) or thing.name != "numpy.dtype":
        raise refused(thing)
    code = thing.arguments[0]
    order: Literal["<", ">"] = "<"
    if isinstance(thing.state, tuple) and thing.state[1] == ">":
        order = ">"
    dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 3 else np.dtype(object)
    if dtype.kind not in "fiub":
        raise UserError(f"NumPy's dtype {dtype} is not read here.")
    return dtype.newbyteorder(order)


def _name(thing: Any) -> str:
    return thing.name if isinstance(thing, Global) else ""


def _of_tensors(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return (
        name in TENSORS
        or name.startswith(REBUILD)
        or (module in ("torch", "torch.storage") and (last in DTYPES or last.endswith("Storage")))
        or name in ("numpy.dtype", "numpy.ndarray")
        or name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.device")
    )
