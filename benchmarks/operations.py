"""The distinct layers of a network, as `zoo.py --operations` times them; imports no framework."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One kind of layer call with its inputs.

    Attributes:
      kind: such as "convolution", "batch norm", "activation", "concatenation".
      shapes: of the inputs, `[batch, height, width, channels]` or `[batch, channels]`.
      settings: what else it depends on, by name, in values of JSON.
      first: whether its input is the network's, which has no gradient.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    settings: Mapping[str, Any]
    first: bool = False

    @property
    def key(self) -> str:
        """A text that two operations share if they are the same."""
        return json.dumps(self)

    @property
    def label(self) -> str:
        """The kind, with that of a convolution: its sums by kind are of interest."""
        if self.kind != "convolution":
            return self.kind
        groups = self.settings["groups"]
        if groups > 1:
            depthwise = groups == self.shapes[0][-1]
            return "depthwise convolution" if depthwise else "grouped convolution"
        return "1x1 convolution" if math.prod(self.settings["kernel"]) == 1 else "convolution"

    @property
    def details(self) -> str:
        """The settings in a few words."""
        words = []
        for name, value in self.settings.items():
            if isinstance(value, bool):
                words += [name] if value else []
            elif name in ("kernel", "window"):
                words.append("x".join(map(str, value)))
            elif name == "strides":
                words += [] if max(value) == 1 else [f"stride {value[0]}"]
            elif name == "pads":
                words += [f"pads {value}"] if len({tuple(pair) for pair in value}) > 1 else []
            elif name == "groups":
                words += [f"{value} groups"] if 1 < value != self.shapes[0][-1] else []
            elif name == "features":
                words.append(f"to {value}")
            elif name != "dilation":
                words.append(str(value))
        return ", ".join(words)


def read_operation(key: str) -> Operation:
    """Returns the operation of which `key` is the key."""
    kind, shapes, settings, first = json.loads(key)
    return Operation(kind, tuple(map(tuple, shapes)), settings, first)


def mode_of(operation: Operation, mode: str) -> str:
    """Returns the worker's name of an operation in a mode, "train" or "infer"."""
    return json.dumps([operation.key, mode])


def read_mode(text: str) -> tuple[Operation, str]:
    """Returns what `mode_of` was given."""
    key, mode = json.loads(text)
    return read_operation(key), mode


class OnDemand(dict):
    """A dict whose missing values a function of the key makes; they are not kept."""

    def __init__(self, make: Any):
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> Any:
        return self._make(key)
