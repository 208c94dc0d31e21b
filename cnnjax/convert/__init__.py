"""Weights from and to other frameworks, with neither of them installed.

    arrays = convert.read("resnet50.safetensors")
    variables = convert.to_cnnjax(arrays, model, (224, 224, 3), framework="torchvision")
    convert.write("back.safetensors", convert.from_cnnjax(variables, model, (224, 224, 3)))

`cnnjax convert` does the same for files and runs. Conversion is strict: every tensor is
used once, every leaf filled once, every shape checked, and all problems are reported together.
"""

from cnnjax.convert.files import read, write
from cnnjax.convert.mapping import find_names, frameworks_for, from_cnnjax, to_cnnjax
from cnnjax.convert.names import Entry, Names, entries

__all__ = [
    "Entry",
    "Names",
    "entries",
    "find_names",
    "frameworks_for",
    "from_cnnjax",
    "read",
    "to_cnnjax",
    "write",
]
