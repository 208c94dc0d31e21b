"""What to do about weights that do not fit: the command that takes them, as the end of an error."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnjax import models
from cnnjax.convert import identify
from cnnjax.convert.mapping import Mismatch

Arrays = Mapping[str, np.ndarray]


def for_mismatch(asked: Any, model: str, arrays: Arrays, error: Mismatch) -> str:
    """Returns the text of the error with lines that end in commands, where some are known.

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
            f"{error}\nTake its head of {error.classes} classes:\n  {same}\n"
            f"or a new one for yours:\n  {new_head}"
        )
    if error.no_head:
        return f"{error}\nIt has no head, as backbones have none. Initialize one:\n  {new_head}"
    other = next((fit for fit in identify.fitting(arrays) if fit.name != model), None)
    if other is None:
        return str(error)
    # All that is missing and left over tells no more.
    return str(error).partition(":\n")[0] + "." + _fits(asked, other)


def for_no_model(asked: Any, arrays: Arrays) -> str:
    """Returns lines with the commands for each network that the arrays fit, or ""."""
    return "".join(_fits(asked, fit) for fit in identify.fitting(arrays))


def other_definitions(model: str, framework: str) -> list[str]:
    """Returns the names of networks of a model's name that compute otherwise than a library's."""
    if framework not in models.elsewhere.LIBRARIES:
        return []
    return list(models.elsewhere.differing(model, framework, models.MODELS))


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


def _fits(asked: Any, fit: identify.Fit) -> str:
    changes: dict[str, Any] = {"model": fit.name, "framework": fit.framework}
    if fit.classes is None:
        changes["new_head"] = True
    elif not asked.new_head:
        published = models.canonical_classes(fit.name)
        changes["num_classes"] = 0 if fit.classes == published else fit.classes
    changed = command_line(asked, **changes)
    return f"\nIts tensors fit {fit.name} under {fit.framework}'s names:\n  {changed}"
