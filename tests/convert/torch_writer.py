"""Writes what `torch.save` would, without PyTorch: the zip format since 1.6."""

import collections
import io
import pickle
import types
import zipfile
from unittest import mock

import numpy as np


def save(path, content):
    """Writes a file of `torch.save`; arrays in the content are tensors there."""
    names = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("only its name is written")

    class FloatStorage:
        pass

    class LongStorage:
        pass

    for thing, module in ((_rebuild_tensor_v2, 1), (FloatStorage, 0), (LongStorage, 0)):
        thing.__module__, thing.__qualname__ = names[module].__name__, thing.__name__
        setattr(names[module], thing.__name__, thing)
    names[0]._utils = names[1]
    storages: list[bytes] = []

    class Storage(tuple):
        """What `persistent_id` finds."""

        __slots__ = ()

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return tuple(thing) if isinstance(thing, Storage) else None

        def reducer_override(self, thing):
            if not isinstance(thing, np.ndarray):
                return NotImplemented
            kind = LongStorage if thing.dtype.kind == "i" else FloatStorage
            storages.append(np.ascontiguousarray(thing).tobytes())
            storage = Storage(("storage", kind, str(len(storages) - 1), "cpu", thing.size))
            strides = tuple(step // thing.itemsize for step in np.ascontiguousarray(thing).strides)
            shape = thing.shape
            hooks = collections.OrderedDict()
            return _rebuild_tensor_v2, (storage, 0, shape, strides[: len(shape)], False, hooks)

    written = io.BytesIO()
    with mock.patch.dict("sys.modules", {module.__name__: module for module in names}):
        Pickler(written, protocol=2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", written.getvalue())
        archive.writestr("archive/version", "3\n")
        for number, numbers in enumerate(storages):
            archive.writestr(f"archive/data/{number}", numbers)
