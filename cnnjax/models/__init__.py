"""The networks, by name and by class.

    model = create("lenet5", num_classes=10)
    variables = model.init(jax.random.key(0), image)
    logits = model.apply(variables, image, train=False)

Every model is a Linen module from `image [batch, height, width, channels]` to logits
`[batch, num_classes]`, or `[batch, height, width, num_classes]` of each pixel. Its last Dense is
named `head`; `num_classes=None` returns what would enter
it. `train` is keyword-only; dropout draws from the random stream `dropout`; models with BatchNorm
keep `batch_stats` and take `axis_name` for statistics over a mapped axis. What all layers share is
one field, `layers: Layers`; `create`, `fields` and `with_fields` name its parts as if they were the
model's own. Each stage's output is passed through `stage_output`, which sows it into
`intermediates`: `features` returns it.

A file of this package holds a family of networks and, as its `ROWS`, what was published of them:
`{name: row(...)}`. `MODELS` has the rows of all files. A network of yours is one file here; or one
anywhere else, and its name is then `MODULE:NAME`. Names of torchvision, timm and keras.applications
are taken too, and `timm/resnet50` chooses a library: see `elsewhere`. `create("ResNet50")` is
Keras's network, with biases and its stride elsewhere; `create("resnet50")` is torchvision's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.models import elsewhere
from cnnjax.models.elsewhere import Meaning
from cnnjax.models.features import features, stage_names
from cnnjax.models.fields import build, fields, with_fields
from cnnjax.models.layers import Layers
from cnnjax.models.reshaped import ARGUMENT, reshaped
from cnnjax.models.rows import Row, module_rows, package_rows, row
from cnnjax.models.stages import changed_stages, stage_output
from cnnjax.models.summary import Summary, format_summary, summary
from cnnjax.signatures import keywords

__all__ = [
    "MODELS",
    "Layers",
    "Meaning",
    "Row",
    "Summary",
    "build",
    "canonical_classes",
    "changed_stages",
    "check_sizes",
    "create",
    "features",
    "fields",
    "find",
    "format_summary",
    "input_shape",
    "list_models",
    "model_fields",
    "presets",
    "read_model",
    "row",
    "stage_names",
    "stage_output",
    "summary",
    "with_fields",
]

MODELS: dict[str, Row] = package_rows(__name__)
# A dense layer of 512 features for them has 51 GB.
MOST_CLASSES = 25_000_000


def create(name: str, *, num_classes: int | None, **overrides: Any) -> nn.Module:
    """Returns the model called `name`, not yet initialized.

    >>> from cnnjax.models.summary import summary
    >>> summary(create("lenet5", num_classes=10), (28, 28, 1)).parameters
    44426
    >>> create("lenet5", num_classes=10, activation="tanh").activation
    'tanh'

    Args:
      name: a key of `MODELS`, or what another library calls the network (see `find`), which then is
        that library's; or `MODULE:NAME` for a row of another module's `ROWS`. Perhaps with fields,
        such as `lenet5(activation=tanh)`.
      num_classes: the logits (1 for a binary classifier), or None for the features before them.
      **overrides: `model_fields(name)` that differ from their defaults, such as `dtype`; also
        `layer_changes`, a table of narrower, skipped or factored layers: see `reshaped`.

    Raises:
      UserError: unknown model or field, a value of another kind than the field's default, or
        `num_classes` below 1.
    """
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"num_classes must be a whole number from 1 on or None, got {num_classes}.")
    if num_classes is not None and num_classes > MOST_CLASSES:
        raise UserError(f"num_classes is {num_classes:,}: at most {MOST_CLASSES:,} fit a network.")
    changes = overrides.pop(ARGUMENT, {})
    name, overrides = read_model(name, overrides)
    found = find(name).row
    network = build(found.network, num_classes=num_classes, **{**found.arguments, **overrides})
    return reshaped(network, changes) if changes else network


def read_model(
    text: str, further: Iterable[str] | Mapping[str, Any] = ()
) -> tuple[str, dict[str, Any]]:
    """Returns our name and the fields that a text such as `lenet5(activation=tanh)` gives.

    Of another library's name, the fields at which our network computes the same are among them.

    Args:
      text: a name as for `create`, perhaps with fields.
      further: more fields: by name, or texts such as `pool=average`.

    Raises:
      UserError: as for `create`.
    """
    more = further if isinstance(further, Mapping) else spec.arguments(further, "model arguments")
    item = spec.extend(spec.parse_one(text, "model", short=False), more, "model")
    meaning = find(item.name)
    given = spec.checked(item, keywords(model_fields(item.name)), "model")
    return meaning.name, {**meaning.arguments, **given}


def find(name: str) -> Meaning:
    """Returns what a name means: a key of `MODELS`, `MODULE:NAME`, or another library's.

    Names of other libraries are such as timm's `resnetv2_50` and Keras's `ResNet50`; perhaps with
    the library before them, as in `timm/resnet50`, or with a tag of weights, `resnet50.a1_in1k`.

    Raises:
      UserError: nothing is called so.
    """
    return elsewhere.find(name, MODELS)


def list_models(pattern: str = "*") -> list[str]:
    """Returns the sorted names that match a shell pattern such as `vgg*_bn`; maybe none.

    `MODULE:*` lists those of another module.
    """
    module, colon, _ = pattern.partition(":")
    return sorted(fnmatch.filter(module_rows(module) if colon else MODELS, pattern))


def input_shape(name: str) -> tuple[int, int, int]:
    """Returns the canonical image `[height, width, channels]` of a model.

    Raises:
      UserError: unknown model.
    """
    return find(name).row.image


def canonical_classes(name: str) -> int:
    """Returns the number of classes with which a model was published.

    Raises:
      UserError: unknown model.
    """
    return find(name).row.num_classes


def model_fields(name: str) -> dict[str, Any]:
    """Returns the arguments that `create(name)` takes beside `num_classes`, with their defaults.

    Raises:
      UserError: unknown model.
    """
    found = find(name)
    defaults = fields(found.row.network) | {**found.row.arguments, **found.arguments}
    del defaults["num_classes"]
    return defaults


def presets(name: str) -> dict[str, Any]:
    """Returns the arguments by which a model differs from the defaults of its class.

    Raises:
      UserError: unknown model.
    """
    found = find(name)
    return {**found.row.arguments, **found.arguments}


def check_sizes(name: str) -> Summary:
    """Returns the summary of a model as published; computes nothing.

    Another library's network of other fields has other sizes than the row.

    Raises:
      UserError: unknown model, or one of other sizes than its row says.
    """
    meaning = find(name)
    found = meaning.row
    result = summary(create(name, num_classes=found.num_classes), found.image)
    wrong = [
        f"{size} {getattr(found, size):,} in its row, {getattr(result, size):,} in the network"
        for size in ("parameters", "statistics", "macs")
        if getattr(found, size) not in (None, getattr(result, size))
    ]
    if wrong and not meaning.arguments:
        raise UserError(f"sizes of model {name}: {'; '.join(wrong)}.")
    return result
