"""Reads what `torch.save` wrote, without PyTorch and without executing anything.

Such a file is a pickle, that is, a program. `_Machine` runs the few instructions that build
tensors, dictionaries, lists, tuples, text and numbers, and refuses every other by name, so that no
function of the file's choice is ever called. The tensors' bytes stand next to the pickle: in a zip
archive since PyTorch 1.6, one after another in a row before.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cnnjax.errors import UserError

STORAGES: dict[str, np.dtype] = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}
# torch/serialization.py, `MAGIC_NUMBER` of the format before 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to; never the thing itself."""

    name: str


@dataclasses.dataclass
class _Storage:
    """The bytes that tensors are views of."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass
class _Tensor:
    """A view of a storage: elements at `offset + sum(index * stride)`."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> Any:
    """Returns the content of a file by `torch.save`, tensors as NumPy arrays.

    Raises:
      UserError: it holds anything but tensors and plain containers; the text names what.
      Exception: the file is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_zip(archive)
    with path.open("rb") as file:
        return _read_legacy(file)


def _read_zip(archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError("it is a zip archive, but not one that torch.save wrote.")
    folder = pickles[0].removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UserError("it is compressed, which torch.save never does.")
    order = "little"
    if f"{folder}byteorder" in names:
        order = archive.read(f"{folder}byteorder").decode()

    def load(storage: _Storage) -> np.ndarray:
        # Reading checks the archive's own checksum.
        content = archive.read(f"{folder}data/{storage.key}")
        return _numbers(content, storage, order)

    with archive.open(pickles[0]) as file:
        return _resolve(_Machine().run(file), load)


def _read_legacy(file: BinaryIO) -> Any:
    try:
        magic = _Machine().run(file)
    except UserError:
        magic = None
    if magic != LEGACY_MAGIC:
        raise UserError("it is no file of torch.save, or it is cut short.")
    version, system = _Machine().run(file), _Machine().run(file)
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise UserError("it is of a version of torch.save that is not read here.")
    machine = _Machine()
    content = machine.run(file)
    loaded: dict[str, np.ndarray] = {}
    for key in _Machine().run(file):
        storage = machine.storages[key]
        size = int.from_bytes(file.read(8), "little")
        length = size * storage.dtype.itemsize
        content_bytes = file.read(length) if size == storage.size else b""
        loaded[key] = _numbers(content_bytes, storage, "little")
    return _resolve(content, lambda storage: loaded[storage.key])


def _numbers(content: bytes, storage: _Storage, order: str) -> np.ndarray:
    if len(content) != storage.size * storage.dtype.itemsize:
        raise UserError(f"its storage {storage.key} is cut short.")
    numbers = np.frombuffer(content, storage.dtype)
    return numbers.byteswap() if order == "big" else numbers


def _resolve(content: Any, load: Callable[[_Storage], np.ndarray]) -> Any:
    """Replaces the tensors of nested dictionaries by arrays; other containers are left alone."""
    loaded: dict[str, np.ndarray] = {}

    def array(tensor: _Tensor) -> np.ndarray:
        storage = tensor.storage
        if storage.key not in loaded:
            loaded[storage.key] = load(storage)
        return _view(loaded[storage.key], tensor)

    def walk(value: Any, depth: int) -> Any:
        if isinstance(value, _Tensor):
            return array(value)
        # Deeper, no weights are found; and a pickle may hold itself.
        if isinstance(value, dict) and depth < 4:
            return {key: walk(item, depth + 1) for key, item in value.items()}
        return value

    return walk(content, 0)


def _view(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    shape, strides, size = tensor.shape, tensor.strides, math.prod(tensor.shape)
    whole = all(isinstance(n, int) and n >= 0 for n in (*shape, *strides, tensor.offset))
    if not whole or len(shape) != len(strides):
        raise UserError("one of its tensors has no proper shape: it is damaged.")
    if size == 0:
        return np.zeros(shape, numbers.dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # The second: a few bytes must not claim to be a huge tensor of repeated values.
    if last >= numbers.size or size > numbers.size:
        raise UserError("one of its tensors reaches beyond its storage: it is damaged.")
    steps = [step * numbers.itemsize for step in strides]
    view = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], shape, steps, writeable=False)
    return np.array(view, order="C")


class _Machine:
    """Runs the pickle instructions that containers of tensors need.

    Attributes:
      storages: those that the pickle referred to, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        """Returns what the pickle at the file's position builds."""
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._do(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"its pickle is damaged or cut short ({error}).") from None
        raise UserError("its pickle is cut short.")

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            size = _TUPLES[name]
            items = [stack.pop() for _ in range(size)]
            stack.append(tuple(reversed(items)))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self._since_mark()
            stack.append(_CONTAINERS[name](items))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [stack.pop()]
            _of_type(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = (
                self._since_mark()
                if name == "SETITEMS"
                else [*reversed((stack.pop(), stack.pop()))]
            )
            _of_type(stack[-1], dict).update(_pairs(items))
        elif name == "GLOBAL":
            stack.append(_Global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(_Global(f"{module}.{last}"))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif name == "BUILD":
            # Only a dictionary's attributes, such as the versions next to a state dict.
            stack.pop()
            _of_type(stack[-1], dict)
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            # What is known is built by REDUCE.
            raise _refused(stack[-2 if name == "NEWOBJ" else -3])
        else:
            raise UserError(f"it holds the pickle instruction {name}, which is refused. {_REMEDY}")

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _storage(self, identity: Any) -> _Storage:
        kind, storage_type, key, _, size = identity[:5]
        name = storage_type.name if isinstance(storage_type, _Global) else str(storage_type)
        module, _, last = name.rpartition(".")
        if kind != "storage" or module not in ("torch", "torch.storage") or last not in STORAGES:
            raise UserError(f"it holds a tensor of {name}, which is not read here.")
        if len(identity) == 6 and identity[5] is not None:
            raise UserError("it holds a view of another storage, which is not read here.")
        storage = _Storage(str(key), STORAGES[last], size)
        return self.storages.setdefault(storage.key, storage)


_REMEDY = "Save model.state_dict() alone, or convert the file to safetensors with PyTorch."
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise UserError("its pickle is damaged: it changes what is no container.")
    return value


def _call(function: Any, arguments: tuple) -> Any:
    """The constructors that are known, by name; nothing is looked up, let alone called."""
    name = function.name if isinstance(function, _Global) else ""
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, strides = arguments[:4]
        return _Tensor(_of_type(storage, _Storage), offset, tuple(shape), tuple(strides))
    if name == "torch._utils._rebuild_parameter":
        return _of_type(arguments[0], _Tensor)
    if name == "collections.OrderedDict":
        return dict(*arguments)
    if name == "torch.Size":
        return tuple(*arguments)
    raise _refused(function)


def _refused(thing: Any) -> UserError:
    name = thing.name if isinstance(thing, _Global) else type(thing).__name__
    return UserError(f"it refers to {name}, which is refused: nothing in a file is run. {_REMEDY}")
