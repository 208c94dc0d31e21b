"""Keras's names: those of the networks of keras.applications, as Keras 3 has them.

A tensor is called after its layer and variable, such as `conv1_bn/moving_mean`: see `keras_files`.
The tables of layers are in `tables.keras`.

Keras's networks differ from PyTorch's in padding, epsilons and biases. Our models compute either by
their arguments, which `arguments_for` gives; with others conversion is refused. MobileNets are the
same at sizes that the strides divide, EfficientNet and V3 at all: Keras's MobileNet v1 pads images
with odd sides otherwise.

EfficientNet, MobileNet v3 and ConvNeXt prepare their images within the model over there. Here the
images are normalized before the model; the numbers of EfficientNet's `normalization` are no leaves
of ours, and `from_cnnjax` writes the identity for them. The command reads them into the metadata
(`preprocessing.moments_within`) and writes them from it (`normalization`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from cnnjax.convert.layouts import DEPTHWISE
from cnnjax.convert.names import Names
from cnnjax.convert.tables import KERAS
from cnnjax.errors import UserError
from cnnjax.models.fields import fields

FRAMEWORK = "keras"


def names_for(model: nn.Module) -> Names:
    """Returns the names of a model's leaves in keras.applications.

    Raises:
      UserError: Keras has no such network.
    """
    table = _table(model)
    if table is None:
        raise UserError(
            f"keras has no network like this {type(model).__name__}: it has those of "
            "keras.applications, which are here ResNet-50 to 152 (v1 and v2) and "
            f"{', '.join(sorted(KERAS.keys() - {'ResNet'}))}, with the norm and stem that they "
            "were published with."
        )
    normalizes = type(model).__name__ == "EfficientNet"
    return Names(
        framework=FRAMEWORK,
        rules=(),
        exact=dict(rule for pair in table["layers"] for rule in _rules(*pair)),
        leaves={"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"},
        kinds=(*table.get("kinds", ()), (".*/depthwise/conv/kernel", DEPTHWISE)),
        stages=table.get("stages", {}),
        ignored="normalization/(mean|variance|count)",
        constants=dict(NORMALIZATION) if normalizes else {},
        separator="/",
        requires={"activation": fields(type(model))["activation"], **table.get("arguments", {})},
        layers=[*(["normalization"] if normalizes else ()), *(pair[1] for pair in table["layers"])],
    )


def has(model: nn.Module) -> bool:
    """Whether keras.applications has a network like `model`."""
    return _table(model) is not None


# What `keras.layers.Normalization` keeps, for a number of channels: mean 0 and variance 1.
NORMALIZATION: dict[str, Callable[[int], np.ndarray]] = {
    "normalization/mean": lambda channels: np.zeros(channels, np.float32),
    "normalization/variance": lambda channels: np.ones(channels, np.float32),
    "normalization/count": lambda channels: np.zeros((), np.int64),
}


def normalization(
    arrays: Mapping[str, np.ndarray], mean: Sequence[float], std: Sequence[float]
) -> dict[str, np.ndarray]:
    """Returns the arrays by which Keras's network normalizes images as our metadata says.

    Args:
      arrays: of `from_cnnjax`; `{}` is returned where they have no normalization of images.
      mean, std: one number, or one per channel, in units where white is 1.
    """
    if "normalization/mean" not in arrays:
        return {}
    shape = arrays["normalization/mean"].shape
    return {
        "normalization/mean": np.broadcast_to(np.asarray(mean, np.float32), shape),
        "normalization/variance": np.broadcast_to(np.asarray(std, np.float32) ** 2, shape),
    }


def _table(model: Any) -> dict[str, Any] | None:
    make = KERAS.get(type(model).__name__)
    return make(model) if make else None


def _rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Returns the names of one layer and of those of its leaves that have others over there."""
    if re.fullmatch(r"(.*/)?norm\d?", ours):
        return [(f"{ours}/bias", f"{theirs}/beta"), (ours, theirs)]
    if ours.endswith("/depthwise/conv"):
        return [(f"{ours}/kernel", f"{theirs}/depthwise_kernel"), (ours, theirs)]
    if ours.endswith("/layer_scale"):
        return [(ours, f"{theirs}/gamma")]
    return [(ours, theirs)]
