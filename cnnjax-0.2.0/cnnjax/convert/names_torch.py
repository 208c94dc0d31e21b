"""PyTorch's names: torchvision's, timm's, and our own paths in PyTorch's manner.

`torchvision` and `timm` are the state dicts of the networks of those libraries, `lukemelas` those
of the package `efficientnet-pytorch`. `pytorch` is for a
module of your own: our path with dots, PyTorch's names of leaves and its layouts, so that LeNet's
`conv1/kernel` is `conv1.weight`.

The tables of rules are in `tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from cnnjax.convert.layouts import DENSE, OIHW
from cnnjax.convert.names import IMAGE, Names
from cnnjax.convert.tables import LUKEMELAS, TIMM, TORCHVISION, Table
from cnnjax.errors import UserError, unknown_name
from cnnjax.models.fields import fields

FRAMEWORKS = ("torchvision", "timm", "lukemelas", "pytorch")
TABLES: Mapping[str, Mapping[str, Table]] = {
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "lukemelas": LUKEMELAS,
}


def names_for(model: nn.Module, framework: str) -> Names:
    """Returns the names of a model's leaves in one of `FRAMEWORKS`.

    Args:
      model: of a class of `cnnjax.models`; for `pytorch` of any class.
      framework: one of `FRAMEWORKS`.

    Raises:
      UserError: unknown framework, or it has no such network.
    """
    if framework not in FRAMEWORKS:
        raise unknown_name("framework", framework, FRAMEWORKS)
    family = type(model).__name__
    if framework == "pytorch":
        table: dict[str, Any] | None = {"rules": (), "own_paths": True}
    else:
        make = TABLES[framework].get(family)
        table = make(model) if make else None
    if table is None:
        raise UserError(_no_counterpart(model, framework))
    requires = {}
    defaults = fields(type(model))
    if framework != "pytorch" and "activation" in defaults:
        requires = {"activation": defaults["activation"], **table.pop("requires", {})}
    return Names(
        framework=framework,
        requires=requires,
        leaves={
            "kernel": "weight",
            "scale": "weight",
            "mean": "running_mean",
            "var": "running_var",
        },
        by_rank={("kernel", 4): OIHW, ("kernel", 2): DENSE},
        flattened=_flattened(model),
        counters=("running_mean", "num_batches_tracked"),
        channels_first=True,
        **{"ignored": r".*\.num_batches_tracked", **table},
    )


def frameworks_for(model: nn.Module) -> list[str]:
    """Returns the frameworks among `FRAMEWORKS` that have the network of `model`."""
    family = type(model).__name__
    has = [name for name, table in TABLES.items() if family in table and table[family](model)]
    return [*has, "pytorch"]


def _no_counterpart(model: nn.Module, framework: str) -> str:
    others = " or ".join(frameworks_for(model))
    return (
        f"{framework} has no network like this {type(model).__name__}: choose the framework "
        f"{others} (pytorch: a module of your own whose layers have the names of ours)."
    )


def _flattened(model: Any) -> dict[str, str]:
    """PyTorch flattens images channels first: the dense layers that this concerns."""
    family = type(model).__name__
    if family == "LeNet5":
        return {"dense1": "conv2"}
    if family in ("AlexNet", "AlexNet2012"):
        return {"dense1": "conv5"}
    if family == "GoogLeNet":
        return {f"{aux}/dense": f"{aux}/conv/conv" for aux in ("aux1", "aux2")}
    if family in ("VGG", "SimpleCNN", "MLP"):
        first = "dense1" if model.dense_widths else "head"
        last = {
            "VGG": lambda: f"stage5/conv{model.stage_sizes[-1]}",
            "SimpleCNN": lambda: f"conv{len(model.widths)}",
            "MLP": lambda: IMAGE,
        }[family]
        return {first: last()}
    return {}
