"""A published network as a row: its class, its arguments, its sizes, and their source."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from cnnjax.errors import UserError, unknown_name

# Sources of sizes that many families have.
TORCHVISION = "torchvision's table of weights: num_params and _ops"
TIMM = "timm's network, counted"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a module's `ROWS`: see `row`."""

    network: type[nn.Module]
    parameters: int
    statistics: int
    macs: int
    source: str
    image: tuple[int, int, int]
    num_classes: int
    arguments: Mapping[str, Any]


def row(
    network: type[nn.Module],
    parameters: int,
    statistics: int,
    macs: int,
    *,
    source: str,
    image: tuple[int, int, int] = (224, 224, 3),
    num_classes: int = 1000,
    **arguments: Any,
) -> Row:
    """Returns the row of a network.

    Args:
      network: the class.
      parameters: trainable ones.
      statistics: running values of BatchNorm.
      macs: multiply-accumulates of convolutions and dense layers for one image.
      source: where these three come from.
      image: `[height, width, channels]` that it was published for.
      num_classes: that it was published for.
      **arguments: its `fields` that differ from their defaults.
    """
    return Row(network, parameters, statistics, macs, source, image, num_classes, arguments)


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
    """Returns the `ROWS` of a module anywhere, by names such as `my_networks:tiny`.

    Raises:
      UserError: there is no such module, or it has no `ROWS`.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{module!r} is no module's name: models of your own are MODULE:NAME.")
    try:
        rows = getattr(importlib.import_module(module), "ROWS", {})
    except ModuleNotFoundError as error:
        raise UserError(
            f"no module {error.name!r}: a model of your own is MODULE:NAME, where Python can "
            "import MODULE (PYTHONPATH)."
        ) from error
    if not rows:
        raise UserError(f"module {module} has no ROWS: give it a dict of `models.row`s.")
    return {f"{module}:{name}": row for name, row in rows.items()}


def find_row(name: str, rows: Mapping[str, Row]) -> Row:
    """Returns the row called `name`: among `rows`, or in the module that it says.

    Raises:
      UserError: there is none.
    """
    if ":" in name:
        rows = module_rows(name.partition(":")[0])
    if name not in rows:
        raise unknown_name("model", name, rows)
    return rows[name]
