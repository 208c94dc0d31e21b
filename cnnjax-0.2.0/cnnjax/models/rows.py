"""A published network as a row: its class, its arguments, its sizes, and their source."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from cnnjax.errors import UserError

# Sources of sizes that many families have.
TORCHVISION = "torchvision's table of weights: num_params and _ops"
TIMM = "timm's network, counted"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a module's `ROWS`: see `row`."""

    network: type[nn.Module]
    parameters: int | None
    statistics: int | None
    macs: int | None
    source: str
    image: tuple[int, int, int]
    num_classes: int
    also: Mapping[str, str]
    arguments: Mapping[str, Any]


def row(
    network: type[nn.Module],
    parameters: int | None = None,
    statistics: int | None = None,
    macs: int | None = None,
    *,
    source: str = "",
    image: tuple[int, int, int] = (224, 224, 3),
    num_classes: int = 1000,
    also: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Row:
    """Returns the row of a network.

    Args:
      network: the class.
      parameters: trainable ones; None, as of the next two, where nobody published them.
      statistics: running values of BatchNorm.
      macs: multiply-accumulates of convolutions and dense layers for one image.
      source: where these three come from.
      image: `[height, width, channels]` that it was published for.
      num_classes: that it was published for.
      also: library, such as timm -> its name there, where that is another.
      **arguments: its `fields` that differ from their defaults.
    """
    sizes = parameters, statistics, macs
    return Row(network, *sizes, source, image, num_classes, also or {}, arguments)


def also_called(rows: Mapping[str, Row], library: str, names: Mapping[str, str]) -> dict[str, Row]:
    """Returns the rows that `names` has (ours -> the library's), with that name in their `also`."""
    return {
        ours: dataclasses.replace(rows[ours], also={**rows[ours].also, library: theirs})
        for ours, theirs in names.items()
    }


def package_rows(package: str) -> dict[str, Row]:
    """Returns the rows of all modules of a package.

    Raises:
      UserError: two modules have a row of the same name.
    """
    found: dict[str, Row] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__"):
            rows = getattr(importlib.import_module(module.name), "ROWS", {})
            if twice := sorted(found.keys() & rows.keys()):
                raise UserError(f"{module.name} has a model {twice[0]!r}, which exists already.")
            found |= rows
    return found


def module_rows(module: str) -> dict[str, Row]:
    """Returns the networks of a module anywhere, by names such as `my_networks:tiny`.

    They are its `ROWS`, and its Linen modules with a field `num_classes`, by the name of the class.

    Raises:
      UserError: there is no such module, or it has neither.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{module!r} is no module's name: models of your own are MODULE:NAME.")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"no module {error.name!r}: a model of your own is MODULE:NAME, where Python can "
            "import MODULE (PYTHONPATH)."
        ) from error
    own = {
        name: row(each)
        for name, each in vars(found).items()
        if isinstance(each, type)
        and issubclass(each, nn.Module)
        and each.__module__ == module
        and "num_classes" in {field.name for field in dataclasses.fields(each)}
    }
    rows = own | getattr(found, "ROWS", {})
    if not rows:
        raise UserError(
            f"module {module} has no network: give it a Linen module with a field num_classes, or "
            "ROWS, a dict of `models.rows.row`s."
        )
    return {f"{module}:{name}": row for name, row in rows.items()}
