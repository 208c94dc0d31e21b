"""What to do about weights that do not fit: the command that takes them, as the end of an error."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnjax.convert import identify
from cnnjax.convert.mapping import Mismatch

Arrays = Mapping[str, np.ndarray]


def for_mismatch(asked: Any, model: str, arrays: Arrays, error: Mismatch) -> str:
    """Returns lines that end in commands, or "" where none is known.

    Args:
      asked: the settings of `cnnjax convert` as they were given.
      model: our name of the network.
      arrays: of the file.
      error: of `mapping.to_cnnjax`.
    """
    new_head = command_line(asked, new_head=True)
    if error.classes:
        same = command_line(asked, num_classes=error.classes)
        return (
            f"\nTake its head of {error.classes} classes:\n  {same}\n"
            f"or a new one for yours:\n  {new_head}"
        )
    if error.no_head:
        return f"\nIt has no head, as backbones have none. Initialize one:\n  {new_head}"
    others = (pair for pair in identify.fitting(arrays) if pair[0] != model)
    return "".join(_fits(asked, *pair) for pair in itertools.islice(others, 1))


def for_no_model(asked: Any, arrays: Arrays) -> str:
    """Returns lines with the commands for each network that the arrays fit, or ""."""
    return "".join(_fits(asked, *pair) for pair in identify.fitting(arrays))


def command_line(config: Any, **changes: Any) -> str:
    """Returns the command line of `cnnjax convert` for its settings with some changed."""
    config = dataclasses.replace(config, **changes)
    words = ["cnnjax", "convert", str(config.source)]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "source" or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if isinstance(value, tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def _fits(asked: Any, name: str, framework: str) -> str:
    changed = command_line(asked, model=name, framework=framework)
    return f"\nIts tensors fit {name} under {framework}'s names:\n  {changed}"
