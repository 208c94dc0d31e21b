"""TensorFlow-Slim's names of layers, a table for each class of `cnnjax.models`.

As in the tables of Keras: (our layer, Slim's), without the scope of the network. Its ResNets are
not here: v1 has its strides in other units than ours, and the pool of v2 pads otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cnnjax.convert.layouts import DEPTHWISE, KERNEL_1X1
from cnnjax.convert.tables.keras import numbered_blocks
from cnnjax.models.elsewhere import KERAS_FIELDS

Table = Callable[[Any], dict[str, Any] | None]

# The convolutions of each branch of an Inception module, in the order of `models.inception`.
INCEPTION_A = {
    "branch1x1": "Branch_0/Conv2d_0a_1x1",
    "branch5x5_1": "Branch_1/Conv2d_0a_1x1",
    "branch5x5_2": "Branch_1/Conv2d_0b_5x5",
    "branch3x3dbl_1": "Branch_2/Conv2d_0a_1x1",
    "branch3x3dbl_2": "Branch_2/Conv2d_0b_3x3",
    "branch3x3dbl_3": "Branch_2/Conv2d_0c_3x3",
    "branch_pool": "Branch_3/Conv2d_0b_1x1",
}
# Two names that nobody meant, and that all files have.
INCEPTION_5C = {
    **INCEPTION_A,
    "branch5x5_1": "Branch_1/Conv2d_0b_1x1",
    "branch5x5_2": "Branch_1/Conv_1_0c_5x5",
}
INCEPTION_B = {
    "branch3x3": "Branch_0/Conv2d_1a_1x1",
    "branch3x3dbl_1": "Branch_1/Conv2d_0a_1x1",
    "branch3x3dbl_2": "Branch_1/Conv2d_0b_3x3",
    "branch3x3dbl_3": "Branch_1/Conv2d_1a_1x1",
}
INCEPTION_C = {
    "branch1x1": "Branch_0/Conv2d_0a_1x1",
    "branch7x7_1": "Branch_1/Conv2d_0a_1x1",
    "branch7x7_2": "Branch_1/Conv2d_0b_1x7",
    "branch7x7_3": "Branch_1/Conv2d_0c_7x1",
    "branch7x7dbl_1": "Branch_2/Conv2d_0a_1x1",
    "branch7x7dbl_2": "Branch_2/Conv2d_0b_7x1",
    "branch7x7dbl_3": "Branch_2/Conv2d_0c_1x7",
    "branch7x7dbl_4": "Branch_2/Conv2d_0d_7x1",
    "branch7x7dbl_5": "Branch_2/Conv2d_0e_1x7",
    "branch_pool": "Branch_3/Conv2d_0b_1x1",
}
INCEPTION_D = {
    "branch3x3_1": "Branch_0/Conv2d_0a_1x1",
    "branch3x3_2": "Branch_0/Conv2d_1a_3x3",
    "branch7x7x3_1": "Branch_1/Conv2d_0a_1x1",
    "branch7x7x3_2": "Branch_1/Conv2d_0b_1x7",
    "branch7x7x3_3": "Branch_1/Conv2d_0c_7x1",
    "branch7x7x3_4": "Branch_1/Conv2d_1a_3x3",
}
INCEPTION_7B = {
    "branch1x1": "Branch_0/Conv2d_0a_1x1",
    "branch3x3_1": "Branch_1/Conv2d_0a_1x1",
    "branch3x3_2a": "Branch_1/Conv2d_0b_1x3",
    "branch3x3_2b": "Branch_1/Conv2d_0b_3x1",
    "branch3x3dbl_1": "Branch_2/Conv2d_0a_1x1",
    "branch3x3dbl_2": "Branch_2/Conv2d_0b_3x3",
    "branch3x3dbl_3a": "Branch_2/Conv2d_0c_1x3",
    "branch3x3dbl_3b": "Branch_2/Conv2d_0d_3x1",
    "branch_pool": "Branch_3/Conv2d_0b_1x1",
}
INCEPTION_7C = {**INCEPTION_7B, "branch3x3_2b": "Branch_1/Conv2d_0c_3x1"}
INCEPTION = {
    "5b": INCEPTION_A,
    "5c": INCEPTION_5C,
    "5d": INCEPTION_A,
    "6a": INCEPTION_B,
    **dict.fromkeys(("6b", "6c", "6d", "6e"), INCEPTION_C),
    "7a": INCEPTION_D,
    "7b": INCEPTION_7B,
    "7c": INCEPTION_7C,
}
INCEPTION_STEM = {"1a": "3x3", "2a": "3x3", "2b": "3x3", "3b": "1x1", "4a": "3x3"}


def conv_norm(ours: str, theirs: str) -> list[tuple[str, str]]:
    """The layers of a `blocks.ConvNorm`: the norm is within the convolution's scope."""
    return [(f"{ours}/conv", theirs), (f"{ours}/norm", f"{theirs}/BatchNorm")]


def _mobilenet_v1(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    layers = conv_norm("stem", "Conv2d_0")
    blocks = numbered_blocks([depth for _, depth, _ in model.stages])
    for index, (stage, block) in enumerate(blocks, 1):
        for part in ("depthwise", "pointwise"):
            layers += conv_norm(f"stage{stage}/block{block}/{part}", f"Conv2d_{index}_{part}")
    return {
        "layers": [*layers, ("head", "Logits/Conv2d_1c_1x1")],
        "arguments": KERAS_FIELDS["MobileNetV1"],
    }


def _mobilenet_v2(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    layers = conv_norm("stem", "Conv")
    blocks = numbered_blocks([row[2] for row in model.stages])
    for index, (stage, block) in enumerate(blocks):
        theirs = f"expanded_conv_{index}" if index else "expanded_conv"
        for part in ("expand", "depthwise", "project") if index else ("depthwise", "project"):
            layers += conv_norm(f"stage{stage}/block{block}/{part}", f"{theirs}/{part}")
    return {
        "layers": [*layers, *conv_norm("last", "Conv_1"), ("head", "Logits/Conv2d_1c_1x1")],
        "arguments": KERAS_FIELDS["MobileNetV2"],
    }


def _inception(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    layers = []
    for name, kernel in INCEPTION_STEM.items():
        layers += conv_norm(f"conv2d_{name}", f"Conv2d_{name}_{kernel}")
    for module, branches in INCEPTION.items():
        for ours, theirs in branches.items():
            layers += conv_norm(f"mixed_{module}/{ours}", f"Mixed_{module}/{theirs}")
    if model.auxiliary_head:
        layers += conv_norm("aux/conv0", "AuxLogits/Conv2d_1b_1x1")
        layers += conv_norm("aux/conv1", "AuxLogits/Conv2d_2a_5x5")
        layers.append(("aux/head", "AuxLogits/Conv2d_2b_1x1"))
    return {
        "layers": [*layers, ("head", "Logits/Conv2d_1c_1x1")],
        "arguments": KERAS_FIELDS["InceptionV3"],
    }


# Kernels of depthwise convolutions have the channels before the multiplier, heads are 1x1.
KINDS = ((".*/depthwise/conv/kernel", DEPTHWISE), ("(.*/)?head/kernel", KERNEL_1X1))
SLIM: Mapping[str, Table] = {
    "MobileNetV1": _mobilenet_v1,
    "MobileNetV2": _mobilenet_v2,
    "InceptionV3": _inception,
}
