"""keras.applications' names of layers, a table for each class of `cnnjax.models`.

Keras finds the layers of a file by their order, so a table lists every layer of a model, in the
order of `model.layers` over there: by depth, which puts a block's shortcut late. A table has

  layers: (our layer, Keras's), or for a single leaf its path.
  stages: our stages and the layers that end them, where these have names of their own.
  arguments: fields of ours at which the model computes what Keras's does.

It is None for a model that differs from Keras's in more than its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnnjax.convert.layouts import DEPTHWISE, KERNEL_1X1
from cnnjax.models.elsewhere import KERAS_FIELDS

Pairs = list[tuple[str, str]]
Table = Callable[[Any], dict[str, Any] | None]

# The order of layers in an Inception module, in that of `cnnjax.models.inception`, by class.
INCEPTION_MODULES = {
    "A": "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 "
    "branch_pool",
    "B": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "C": "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 "
    "branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool",
    "D": "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    "E": "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 "
    "branch3x3dbl_3a branch3x3dbl_3b branch_pool",
}
INCEPTION_ORDERS = {
    "A": (3, 1, 4, 0, 2, 5, 6),
    "B": (1, 2, 0, 3),
    "C": (4, 5, 1, 6, 2, 7, 0, 3, 8, 9),
    "D": (2, 3, 0, 4, 1, 5),
    "E": (4, 1, 5, 2, 3, 6, 7, 0, 8),
}
INCEPTION_NETWORK = (
    *(("A", f"mixed_5{letter}") for letter in "bcd"),
    ("B", "mixed_6a"),
    *(("C", f"mixed_6{letter}") for letter in "bcde"),
    ("D", "mixed_7a"),
    *(("E", f"mixed_7{letter}") for letter in "bc"),
)
CONVNEXTS = {
    ((3, 3, 9, 3), 96): "convnext_tiny",
    ((3, 3, 27, 3), 96): "convnext_small",
    ((3, 3, 27, 3), 128): "convnext_base",
    ((3, 3, 27, 3), 192): "convnext_large",
}


def conv_norm(ours: str, conv: str, norm: str) -> Pairs:
    """The two layers of a `blocks.ConvNorm`."""
    return [(f"{ours}/conv", conv), (f"{ours}/norm", norm)]


def numbered_blocks(stage_sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (stage, block) of each block, both from 1."""
    return [
        (stage, block)
        for stage, depth in enumerate(stage_sizes, 1)
        for block in range(1, depth + 1)
    ]


def _vgg(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "none":
        return None
    numbers = range(1, len(model.dense_widths) + 1)
    return {
        "layers": [
            *(
                (f"stage{stage}/conv{number}", f"block{stage}_conv{number}")
                for stage, number in numbered_blocks(model.stage_sizes)
            ),
            *((f"dense{number}", f"fc{number}") for number in numbers),
            ("head", "predictions"),
        ],
        "stages": {f"stage{stage}": f"block{stage}_pool" for stage in range(1, 6)},
    }


def _resnet(model: Any) -> dict[str, Any] | None:
    published = model.block == "bottleneck" and model.stem == "imagenet" and model.groups == 1
    if not published or model.se_reduction or model.shortcut != "projection":
        return None
    if model.attention != "none" or model.stem_widths or model.stem_pool != "max":
        return None
    if model.layers.norm != "batch" or model.weight_standardization:
        return None
    return _resnet_v2(model) if model.version.startswith("v2") else _resnet_v1(model)


def _resnet_v1(model: Any) -> dict[str, Any]:
    layers = conv_norm("stem", "conv1_conv", "conv1_bn")
    for stage, block in numbered_blocks(model.stage_sizes):
        ours, theirs = f"stage{stage}/block{block}", f"conv{stage + 1}_block{block}"
        for number in (1, 2):
            layers.append((f"{ours}/conv{number}", f"{theirs}_{number}_conv"))
            layers.append((f"{ours}/norm{number}", f"{theirs}_{number}_bn"))
        shortcut = conv_norm(f"{ours}/downsample", f"{theirs}_0_conv", f"{theirs}_0_bn")
        last = [(f"{ours}/conv3", f"{theirs}_3_conv"), (f"{ours}/norm3", f"{theirs}_3_bn")]
        layers += [*shortcut, *last] if block == 1 else last
    return {
        "layers": [*layers, ("head", "predictions")],
        "stages": _residual_stages(model),
        "arguments": KERAS_FIELDS["ResNet"],
    }


def _resnet_v2(model: Any) -> dict[str, Any]:
    layers = [("stem/conv", "conv1_conv")]
    for stage, block in numbered_blocks(model.stage_sizes):
        ours, theirs = f"stage{stage}/block{block}", f"conv{stage + 1}_block{block}"
        layers.append((f"{ours}/norm1", f"{theirs}_preact_bn"))
        for number in (1, 2):
            layers.append((f"{ours}/conv{number}", f"{theirs}_{number}_conv"))
            layers.append((f"{ours}/norm{number + 1}", f"{theirs}_{number}_bn"))
        if block == 1:
            layers.append((f"{ours}/downsample", f"{theirs}_0_conv"))
        layers.append((f"{ours}/conv3", f"{theirs}_3_conv"))
    return {
        "layers": [*layers, ("norm", "post_bn"), ("head", "predictions")],
        "stages": _residual_stages(model),
        "arguments": KERAS_FIELDS["ResNet v2"],
    }


def _residual_stages(model: Any) -> dict[str, str]:
    return {
        f"stage{stage}": f"conv{stage + 1}_block{depth}_out"
        for stage, depth in enumerate(model.stage_sizes, 1)
    }


def _densenet(model: Any) -> dict[str, Any] | None:
    if model.stem != "imagenet" or model.growth != 32 or model.layers.norm != "batch":
        return None
    layers = conv_norm("stem", "conv1_conv", "conv1_bn")
    for stage, block in numbered_blocks(model.stage_sizes):
        if block == 1 and stage > 1:
            layers += conv_norm(f"transition{stage - 1}", f"pool{stage}_conv", f"pool{stage}_bn")
        ours, theirs = f"stage{stage}/block{block}", f"conv{stage + 1}_block{block}"
        for number in (1, 2):
            layers.append((f"{ours}/norm{number}", f"{theirs}_{number - 1}_bn"))
            layers.append((f"{ours}/conv{number}", f"{theirs}_{number}_conv"))
    return {
        "layers": [*layers, ("norm", "bn"), ("head", "predictions")],
        "stages": {
            f"stage{stage}": f"conv{stage + 1}_block{depth}_concat"
            for stage, depth in enumerate(model.stage_sizes, 1)
        },
        "arguments": KERAS_FIELDS["DenseNet"],
    }


def _inception(model: Any) -> dict[str, Any] | None:
    if model.auxiliary_head or model.layers.norm != "batch":
        return None
    # Keras gives the names: the number is that of creation, the place another.
    units = [
        (f"conv2d_{name}", number) for number, name in enumerate(("1a", "2a", "2b", "3b", "4a"))
    ]
    for kind, module in INCEPTION_NETWORK:
        first, parts = len(units), INCEPTION_MODULES[kind].split()
        units += [(f"{module}/{parts[at]}", first + at) for at in INCEPTION_ORDERS[kind]]
    layers: Pairs = []
    for unit, number in units:
        suffix = f"_{number}" if number else ""
        layers += conv_norm(unit, f"conv2d{suffix}", f"batch_normalization{suffix}")
    return {
        "layers": [*layers, ("head", "predictions")],
        "stages": {"stage3": "mixed2", "stage4": "mixed7", "stage5": "mixed10"},
        "arguments": KERAS_FIELDS["InceptionV3"],
    }


def _mobilenet_v1(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    # Keras pads below and at the right at stride 2: as "same" does, where sides stay even.
    layers = conv_norm("stem", "conv1", "conv1_bn")
    depths = [depth for _, depth, _ in model.stages]
    ends = {}
    for index, (stage, block) in enumerate(numbered_blocks(depths), 1):
        ours = f"stage{stage}/block{block}"
        layers += conv_norm(f"{ours}/depthwise", f"conv_dw_{index}", f"conv_dw_{index}_bn")
        layers += conv_norm(f"{ours}/pointwise", f"conv_pw_{index}", f"conv_pw_{index}_bn")
        ends[f"stage{stage}"] = f"conv_pw_{index}_relu"
    return {
        "layers": [*layers, ("head", "conv_preds")],
        "kinds": ((".*/depthwise/conv/kernel", DEPTHWISE), ("head/kernel", KERNEL_1X1)),
        "stages": ends,
        "arguments": KERAS_FIELDS["MobileNetV1"],
    }


def _mobilenet_v2(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    layers = conv_norm("stem", "Conv1", "bn_Conv1")
    depths = [row[2] for row in model.stages]
    ends = {}
    for index, (stage, block) in enumerate(numbered_blocks(depths)):
        theirs = f"block_{index}_" if index else "expanded_conv_"
        for part in ("expand", "depthwise", "project") if index else ("depthwise", "project"):
            ours = f"stage{stage}/block{block}/{part}"
            layers += conv_norm(ours, f"{theirs}{part}", f"{theirs}{part}_BN")
        ends[f"stage{stage}"] = theirs + ("add" if block > 1 else "project_BN")
    return {
        "layers": [*layers, *conv_norm("last", "Conv_1", "Conv_1_bn"), ("head", "predictions")],
        "kinds": ((".*/depthwise/conv/kernel", DEPTHWISE),),
        "stages": ends,
        "arguments": KERAS_FIELDS["MobileNetV2"],
    }


def _mobilenet_v3(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    layers = conv_norm("stem", "conv", "conv_bn")
    rows = [row for stage in model.stages for row in stage]
    numbers = numbered_blocks([len(stage) for stage in model.stages])
    ends = {}
    for index, ((stage, block), row) in enumerate(zip(numbers, rows, strict=True)):
        ours = f"stage{stage}/block{block}/"
        theirs = f"expanded_conv_{index}_" if index else "expanded_conv_"
        if index:
            layers += conv_norm(f"{ours}expand", f"{theirs}expand", f"{theirs}expand_bn")
        layers += conv_norm(f"{ours}depthwise", f"{theirs}depthwise", f"{theirs}depthwise_bn")
        if row[3]:
            layers.append((f"{ours}se/fc1", f"{theirs}squeeze_excite_conv"))
            layers.append((f"{ours}se/fc2", f"{theirs}squeeze_excite_conv_1"))
        layers += conv_norm(f"{ours}project", f"{theirs}project", f"{theirs}project_bn")
        ends[f"stage{stage}"] = theirs + ("add" if block > 1 else "project_bn")
    last = conv_norm("last", "conv_1", "conv_1_bn")
    return {
        "layers": [*layers, *last, ("dense", "conv_2"), ("head", "logits")],
        "kinds": (
            (".*/depthwise/conv/kernel", DEPTHWISE),
            ("(dense|head)/kernel", KERNEL_1X1),
        ),
        "stages": ends,
        "arguments": KERAS_FIELDS["MobileNetV3"],
    }


def _efficientnet(model: Any) -> dict[str, Any] | None:
    plain = model.gated and model.scaled_ends and not model.fused_stages
    if model.layers.norm != "batch" or not plain:
        return None
    layers = [*conv_norm("stem", "stem_conv", "stem_bn")]
    ends = {}
    for stage, block in numbered_blocks(model.depths()):
        ours, theirs = f"stage{stage}/block{block}/", f"block{stage}{chr(96 + block)}_"
        if model.stages[stage - 1][0] != 1:
            layers += conv_norm(f"{ours}expand", f"{theirs}expand_conv", f"{theirs}expand_bn")
        layers += conv_norm(f"{ours}depthwise", f"{theirs}dwconv", f"{theirs}bn")
        layers.append((f"{ours}se/fc1", f"{theirs}se_reduce"))
        layers.append((f"{ours}se/fc2", f"{theirs}se_expand"))
        layers += conv_norm(f"{ours}project", f"{theirs}project_conv", f"{theirs}project_bn")
        ends[f"stage{stage}"] = theirs + ("add" if block > 1 else "project_bn")
    return {
        "layers": [*layers, *conv_norm("last", "top_conv", "top_bn"), ("head", "predictions")],
        "kinds": ((".*/depthwise/conv/kernel", DEPTHWISE),),
        "stages": ends,
        "arguments": KERAS_FIELDS["EfficientNet"],
    }


def _convnext(model: Any) -> dict[str, Any] | None:
    name = CONVNEXTS.get((tuple(model.stage_sizes), model.stage_features[0]))
    published = name is not None and not model.response_norm
    if model.layers.norm != "layer" or model.stem != "imagenet" or not published:
        return None
    stem = f"{name}_stem/{name}_stem"
    layers = conv_norm("stem", f"{stem}_conv", f"{stem}_layernorm")
    for stage, block in numbered_blocks(model.stage_sizes):
        before = stage - 2
        if block == 1 and stage > 1:
            down = f"{name}_downsampling_block_{before}/{name}_downsampling_"
            layers.append((f"downsample{stage - 1}/norm", f"{down}layernorm_{before}"))
            layers.append((f"downsample{stage - 1}/conv", f"{down}conv_{before}"))
        ours = f"stage{stage}/block{block}/"
        theirs = f"{name}_stage_{stage - 1}_block_{block - 1}_"
        layers += [
            (f"{ours}depthwise", f"{theirs}depthwise_conv"),
            (f"{ours}norm", f"{theirs}layernorm"),
            (f"{ours}expand", f"{theirs}pointwise_conv_1"),
            (f"{ours}project", f"{theirs}pointwise_conv_2"),
            (f"{ours}layer_scale", f"{theirs}layer_scale"),
        ]
    last = [("norm", f"{name}_head_layernorm"), ("head", f"{name}_head_dense")]
    return {"layers": [*layers, *last], "arguments": KERAS_FIELDS["ConvNeXt"]}


KERAS: Mapping[str, Table] = {
    "VGG": _vgg,
    "ResNet": _resnet,
    "DenseNet": _densenet,
    "InceptionV3": _inception,
    "MobileNetV1": _mobilenet_v1,
    "MobileNetV2": _mobilenet_v2,
    "MobileNetV3": _mobilenet_v3,
    "EfficientNet": _efficientnet,
    "ConvNeXt": _convnext,
}
