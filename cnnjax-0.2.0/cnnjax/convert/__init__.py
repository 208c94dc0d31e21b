"""Weights from and to other frameworks, with neither of them installed.

    arrays = convert.read("resnet50.safetensors")
    variables = convert.to_cnnjax(arrays, model, (224, 224, 3), framework="torchvision")
    convert.write("back.safetensors", convert.from_cnnjax(variables, model, (224, 224, 3)))

`cnnjax convert` does the same for files and runs. Conversion is strict: every tensor is
used once, every leaf filled once, every shape checked, and all problems are reported together.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "advice",
        "files",
        "folders",
        "identify",
        "mapping",
        "names",
        "names_keras",
        "parity",
        "preprocessing",
    ),
    {
        "files": (
            "read",
            "write",
        ),
        "mapping": (
            "Mismatch",
            "find_names",
            "frameworks_for",
            "from_cnnjax",
            "to_cnnjax",
        ),
        "names": (
            "Entry",
            "Names",
            "entries",
        ),
    },
)

if TYPE_CHECKING:
    from cnnjax.convert import advice as advice
    from cnnjax.convert import files as files
    from cnnjax.convert import folders as folders
    from cnnjax.convert import identify as identify
    from cnnjax.convert import mapping as mapping
    from cnnjax.convert import names as names
    from cnnjax.convert import names_keras as names_keras
    from cnnjax.convert import parity as parity
    from cnnjax.convert import preprocessing as preprocessing
    from cnnjax.convert.files import read as read
    from cnnjax.convert.files import write as write
    from cnnjax.convert.mapping import Mismatch as Mismatch
    from cnnjax.convert.mapping import find_names as find_names
    from cnnjax.convert.mapping import frameworks_for as frameworks_for
    from cnnjax.convert.mapping import from_cnnjax as from_cnnjax
    from cnnjax.convert.mapping import to_cnnjax as to_cnnjax
    from cnnjax.convert.names import Entry as Entry
    from cnnjax.convert.names import Names as Names
    from cnnjax.convert.names import entries as entries
