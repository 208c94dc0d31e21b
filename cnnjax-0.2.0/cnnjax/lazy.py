"""Names of a package that are imported when they are first used.

`import cnnjax` and every `--help` cost about what importing nothing costs. A room's `__init__`
imports its names under `if TYPE_CHECKING` as well, so that type checkers see what they are; they do
not see the package's `__getattr__`, so that a name it does not have is an error for them too.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def attach(
    package: str, modules: Sequence[str], names: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Gives a package its `__getattr__`, `__dir__` and `__all__`.

    Args:
      package: its `__name__`.
      modules: its modules that are attributes.
      names: module -> the names that the package has of it.
    """
    module_of = {name: module for module, of_it in (names or {}).items() for name in of_it}
    known = sorted({*modules, *module_of})

    def getattr_(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    vars(sys.modules[package]).update(
        __getattr__=getattr_, __dir__=lambda: list(known), __all__=known
    )
