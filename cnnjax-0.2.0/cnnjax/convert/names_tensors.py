"""Names in TensorFlow's and Flax's files: those of TensorFlow-Slim's networks, and our own paths.

`tf_slim` is for the checkpoints of TensorFlow-Slim: names begin with the network's scope, such as
`MobilenetV1/`, which is dropped as any prefix is. Published ones have 1001 classes, of which the
first is none. `flax` is for trees of variables whose paths are those of our networks.
"""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn

from cnnjax.convert import flax_files
from cnnjax.convert.names import Names
from cnnjax.convert.tables import SLIM
from cnnjax.convert.tables.slim import KINDS
from cnnjax.errors import UserError
from cnnjax.models.fields import fields

SLIM_FRAMEWORK = "tf_slim"
FRAMEWORKS = (SLIM_FRAMEWORK, flax_files.FRAMEWORK)


def names_for(model: nn.Module, framework: str) -> Names:
    """Returns the names of a model's leaves in `tf_slim` or `flax`.

    Raises:
      UserError: TensorFlow-Slim has no such network, or none that computes the same.
    """
    if framework == flax_files.FRAMEWORK:
        return Names(framework=framework, rules=(), leaves={}, separator="/", own_paths=True)
    table = _table(model)
    if table is None:
        raise UserError(
            f"{SLIM_FRAMEWORK} has no network that computes what this {type(model).__name__} "
            f"does: it has {', '.join(sorted(SLIM))}."
        )
    return Names(
        framework=framework,
        rules=(),
        exact=dict(rule for pair in table["layers"] for rule in _rules(*pair)),
        leaves={
            **{"kernel": "weights", "bias": "biases", "scale": "gamma"},
            **{"mean": "moving_mean", "var": "moving_variance"},
        },
        kinds=KINDS,
        separator="/",
        requires={"activation": fields(type(model))["activation"], **table["arguments"]},
    )


def has(model: nn.Module) -> bool:
    """Whether TensorFlow-Slim has a network that computes what `model` does, with arguments."""
    return _table(model) is not None


def _table(model: Any) -> dict[str, Any] | None:
    make = SLIM.get(type(model).__name__)
    return make(model) if make else None


def _rules(ours: str, theirs: str) -> list[tuple[str, str]]:
    if re.fullmatch(r"(.*/)?norm", ours):
        return [(f"{ours}/bias", f"{theirs}/beta"), (ours, theirs)]
    if ours.endswith("/depthwise/conv"):
        return [(f"{ours}/kernel", f"{theirs}/depthwise_weights"), (ours, theirs)]
    return [(ours, theirs)]
