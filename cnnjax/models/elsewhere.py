"""What a name means: ours, or the one that another library gives to a network.

    resnet50             ours, which is torchvision's and timm's network
    ResNet50             keras.applications': `resnet50` with Keras's fields
    resnetv2_50          timm's, of `resnet50_v2`
    resnet50.a1_in1k     timm's, with the tag of published weights
    keras/ResNet50       the library chosen explicitly; so torchvision/resnet50 and timm/resnet50

A row's `also` has the names. Where a library's network computes otherwise than the row's, the
fields at which ours computes the same are here, by the name of the class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from cnnjax.errors import unknown_name
from cnnjax.models.rows import Row, module_rows

LIBRARIES = ("torchvision", "timm", "keras")
HUB_PREFIXES = ("hf-hub:", "hf_hub:")
# The epsilon of Keras's networks that were ported from Caffe and Torch.
CAFFE_EPSILON = 1.001e-5
SAME_PADDING = {"padding": "same", "norm_epsilon": 1e-3}
KERAS_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "ResNet": {"version": "v1", "conv_bias": True, "norm_epsilon": CAFFE_EPSILON},
    "ResNet v2": {"version": "v2_slim", "conv_bias": False, "norm_epsilon": CAFFE_EPSILON},
    "DenseNet": {"norm_epsilon": CAFFE_EPSILON},
    "InceptionV3": {"padding": "same", "norm_scale": False},
    "MobileNetV1": {"activation": "relu6", **SAME_PADDING},
    "MobileNetV2": SAME_PADDING,
    "MobileNetV3": SAME_PADDING,
    "EfficientNet": SAME_PADDING,
    "ConvNeXt": {"norm_epsilon": 1e-6},
}
TIMM_FIELDS: Mapping[str, Mapping[str, Any]] = {
    # The paper has ReLU.
    "MobileNetV1": {"activation": "relu6"},
    "MobileNetV3": {"norm_epsilon": 1e-5},
    "NFNet": {"activation": "gelu_exact"},
}
# timm's `tf_` networks have TensorFlow's weights, padding and epsilon; those of the same names
# without `tf_` have PyTorch's.
PYTORCH_FIELDS = {"EfficientNet": {"padding": "symmetric", "norm_epsilon": 1e-5}}
TENSORFLOW_FIELDS = {"EfficientNet": SAME_PADDING, "MobileNetV3": SAME_PADDING}


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a name means.

    Attributes:
      text: the name that was given.
      name: of the row.
      row: the network.
      library: whose name it is; "" for ours.
      tag: of published weights.
      arguments: fields at which our network computes what the library's does.
    """

    text: str
    name: str
    row: Row
    library: str = ""
    tag: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if not self.library:
            return f"{self.text} is the network of cnnjax"
        fields = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        weights = f", its weights {self.tag}" if self.tag else ""
        return f"{self.text} is {self.library}'s network{weights}: {self.name}({fields})"


def find(text: str, rows: Mapping[str, Row]) -> Meaning:
    """Returns what a name means: among `rows`, or in the module that it says.

    Raises:
      UserError: nothing; the nearest names of all libraries are in the text.
    """
    text = text.strip()
    for prefix in HUB_PREFIXES:
        text = text.removeprefix(prefix)
    if ":" in text:
        rows = module_rows(text.partition(":")[0])
    if text in rows:
        return Meaning(text, text, rows[text])
    library, slash, name = text.rpartition("/")
    if slash and library not in LIBRARIES:
        raise unknown_name("library of a model's name", library, LIBRARIES)
    name, _, tag = name.partition(".")
    if name.endswith("_Weights"):
        # torchvision's enumerations of weights, such as ResNet50_Weights.IMAGENET1K_V1.
        name, library = name.removesuffix("_Weights").lower(), library or "torchvision"
    library = library or ("timm" if tag else "")
    for each in (library,) if library else LIBRARIES:
        if meaning := _in_library(Meaning(text, name, next(iter(rows.values())), each, tag), rows):
            return meaning
    names = [f"{library}/{each}" for each in _names(library, rows)] if slash else [*rows]
    if not slash:
        names += [each for library in LIBRARIES for each in names_in(library, rows)]
    raise unknown_name("model", text, dict.fromkeys(names), listed_by="cnnjax models")


def names_in(library: str, rows: Mapping[str, Row]) -> dict[str, str]:
    """Returns `{name there: our name}` of the rows that a library calls otherwise."""
    return {row.also[library]: name for name, row in rows.items() if library in row.also}


def others(name: str, rows: Mapping[str, Row]) -> Iterator[str]:
    """Yields a text for each library that calls the network of a row otherwise."""
    for library, there in rows[name].also.items() if name in rows else ():
        fields = fields_in(library, rows[name])
        differing = ", ".join(f"{field}={value}" for field, value in fields.items())
        yield f"{library}/{there}" + (f" (with {differing})" if differing else "")


def differing(name: str, library: str, rows: Mapping[str, Row]) -> Iterator[str]:
    """Yields what libraries besides `library` call a network that computes otherwise than a row."""
    for other, there in rows[name].also.items() if name in rows else ():
        if other != library and fields_in(other, rows[name]):
            yield f"{other}/{there}"
        if other == "timm" and there.startswith("tf_"):
            yield f"timm/{there.removeprefix('tf_')}"


def fields_in(library: str, row: Row) -> Mapping[str, Any]:
    """Returns the fields at which our network of a row computes what the library's does."""
    family = row.network.__name__
    if family == "ResNet" and str(row.arguments.get("version", "")).startswith("v2"):
        family = "ResNet v2"
    if library == "timm" and row.also.get("timm", "").startswith("tf_"):
        return TENSORFLOW_FIELDS.get(family, {})
    return {"keras": KERAS_FIELDS, "timm": TIMM_FIELDS}.get(library, {}).get(family, {})


def _in_library(wanted: Meaning, rows: Mapping[str, Row]) -> Meaning | None:
    name, library = wanted.name, wanted.library
    found = _names(library, rows).get(name)
    if found:
        arguments = fields_in(library, rows[found])
        return dataclasses.replace(wanted, name=found, row=rows[found], arguments=arguments)
    if library == "timm" and (ours := _names(library, rows).get(f"tf_{name}")):
        row = rows[ours]
        known = PYTORCH_FIELDS.get(row.network.__name__)
        return dataclasses.replace(wanted, name=ours, row=row, arguments=known) if known else None
    if library == "timm" and name.startswith("tf_"):
        plain = _in_library(dataclasses.replace(wanted, name=name.removeprefix("tf_")), rows)
        fields = TENSORFLOW_FIELDS.get(plain.row.network.__name__) if plain else None
        return dataclasses.replace(plain, arguments=fields) if plain and fields else None
    return None


def _names(library: str, rows: Mapping[str, Row]) -> dict[str, str]:
    """Returns `{name there: our name}` of a library's networks: under ours, where not otherwise.

    Whether the library has a network at all that is called the same, a row does not say.
    """
    if library == "keras":
        return names_in(library, rows)
    same = {name: name for name, row in rows.items() if library not in row.also}
    return same | names_in(library, rows)
