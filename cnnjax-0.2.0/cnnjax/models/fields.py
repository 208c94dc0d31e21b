"""The hyperparameters of a model by name, whether they are its own or in its `layers`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from flax import linen as nn

from cnnjax.errors import unknown_name
from cnnjax.models.layers import Layers

Model = TypeVar("Model")


def fields(model: Any) -> dict[str, Any]:
    """Returns the hyperparameters of a model and their values, by name.

    Those of its `layers` (see `Layers`), or of a model that it wraps, stand among its own.

    Args:
      model: a Linen module or another dataclass; or a class of such, for the defaults. `{}` is
        returned for anything else.
    """
    found: dict[str, Any] = {}
    for name, value in _own(model).items():
        inner = fields(value) if isinstance(value, Layers | nn.Module) else {name: value}
        found = inner | found
    if isinstance(model, Layers) and model.remat is None:
        del found["remat"]
    return found


def with_fields(model: Model, **values: Any) -> Model:
    """Returns the model with other values of its `fields`.

    Raises:
      UserError: it has no such field.
    """
    known = fields(model)
    for name in values:
        if name not in known:
            raise unknown_name(f"field of {type(model).__name__}", name, known)
    own = _own(model)
    changes = {name: value for name, value in values.items() if name in own}
    for name, value in own.items():
        if isinstance(value, Layers | nn.Module):
            names = (values.keys() - changes.keys()) & fields(value).keys()
            if names:
                changes[name] = with_fields(value, **{inner: values[inner] for inner in names})
    if isinstance(model, nn.Module):
        return model.clone(**changes)
    return dataclasses.replace(model, **changes)  # type: ignore[type-var]


def build(network: type[nn.Module], **values: Any) -> nn.Module:
    """Returns a network whose `fields` have these values, and its defaults where none is given."""
    own = _own(network)
    model = network(**{name: value for name, value in values.items() if name in own})
    return with_fields(model, **{name: values[name] for name in values.keys() - own.keys()})


def _own(model: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(model):
        return {}
    names = [field for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    if isinstance(model, type):
        return {field.name: field.default for field in names}
    return {field.name: getattr(model, field.name) for field in names}
