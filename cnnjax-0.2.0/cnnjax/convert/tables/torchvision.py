"""torchvision's names of layers, a table for each class of `cnnjax.models`.

The language of the rules is described in `cnnjax.convert.names`. A table is None for a model that
differs from torchvision's in more than its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cnnjax.convert.layouts import CHANNEL_11, DENSE_AS_1X1
from cnnjax.convert.names import BLOCK

Table = Callable[[Any], dict[str, Any] | None]


def conv_norm(ours: str, theirs: str, conv: str = "0", norm: str = "1") -> tuple:
    """The two rules for a `conv` and the `norm` behind it."""
    return ((f"{ours}/conv", f"{theirs}.{conv}"), (f"{ours}/norm", f"{theirs}.{norm}"))


def stages(template: str, *numbers: Any) -> dict[str, str]:
    """Our stages, in order, and the modules that end them, one for each of the numbers."""
    return {f"stage{i}": template.format(number) for i, number in enumerate(numbers, 1)}


def _alexnet(model: Any) -> dict[str, Any]:
    convolutions = enumerate((0, 3, 6, 8, 10), 1)
    return {
        "rules": (
            *((f"conv{ours}", f"features.{theirs}") for ours, theirs in convolutions),
            ("dense1", "classifier.1"),
            ("dense2", "classifier.4"),
            ("head", "classifier.6"),
        ),
        "stages": stages("features.{}", 2, 5, 7, 9, 12),
    }


def _vgg(model: Any) -> dict[str, Any]:
    # A convolution, perhaps its norm, and its activation, one after another; a pool ends a stage.
    rules, ends, position = [], [], 0
    for stage, depth in enumerate(model.stage_sizes, 1):
        for number in range(1, depth + 1):
            rules.append((f"stage{stage}/conv{number}", f"features.{position}"))
            rules.append((f"stage{stage}/norm{number}", f"features.{position + 1}"))
            position += 2 if model.layers.norm == "none" else 3
        ends.append(position)
        position += 1
    # A dense layer, its activation, its dropout.
    widths = len(model.dense_widths)
    rules += [(f"dense{number + 1}", f"classifier.{3 * number}") for number in range(widths)]
    return {
        "rules": (*rules, ("head", f"classifier.{3 * widths}")),
        "stages": stages("features.{}", *ends),
    }


def _googlenet(model: Any) -> dict[str, Any]:
    module, unit = r"(?P<module>inception\w+)/", r"(?P<unit>conv\d)"
    units = (
        (unit, "{unit}"),
        (r"(?P<unit>aux\d)/conv", "{unit}.conv"),
        (module + "branch1", "{module}.branch1"),
        *((f"{module}branch{b}_1", f"{{module}}.branch{b}.0") for b in (2, 3)),
        *((f"{module}branch{b}_2", f"{{module}}.branch{b}.1") for b in (2, 3)),
        # Over there the pool is the branch's first module.
        (module + "branch4", "{module}.branch4.1"),
    )
    return {
        "rules": (
            *(rule for ours, theirs in units for rule in conv_norm(ours, theirs, "conv", "bn")),
            (r"(?P<aux>aux\d)/dense", "{aux}.fc1"),
            (r"(?P<aux>aux\d)/head", "{aux}.fc2"),
            ("head", "fc"),
        ),
        "stages": stages("{}", "maxpool1", "maxpool2", "inception3b", "inception4e", "inception5b"),
    }


def _inception(model: Any) -> dict[str, Any]:
    kernels = {"1a": "3x3", "2a": "3x3", "2b": "3x3", "3b": "1x1", "4a": "3x3"}
    units = (
        *((f"conv2d_{name}", f"Conv2d_{name}_{kernel}") for name, kernel in kernels.items()),
        (r"mixed_(?P<name>\w+)/(?P<unit>\w+)", "Mixed_{name}.{unit}"),
        (r"aux/(?P<unit>\w+)", "AuxLogits.{unit}"),
    )
    return {
        "rules": (
            *(rule for ours, theirs in units for rule in conv_norm(ours, theirs, "conv", "bn")),
            ("aux/head", "AuxLogits.fc"),
            ("head", "fc"),
        ),
        "stages": stages(
            "{}", "Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"
        ),
    }


def _squeezenet(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "none":
        return None
    # The convolution and its activation, then fires and pools.
    position, places = 2, {}
    for fire in range(2, len(model.fires) + 2):
        position += fire in model.pools_before
        places[fire] = position
        position += 1
    ends = [fire - 1 for fire in model.pools_before if fire > 2] + [len(model.fires) + 1]
    return {
        "rules": (
            ("conv1", "features.0"),
            *((rf"fire{i}/(?P<part>\w+)", f"features.{at}.{{part}}") for i, at in places.items()),
            ("head", "classifier.1"),
        ),
        "kinds": (("head/kernel", DENSE_AS_1X1),),
        "stages": stages("features.{}", 1, *(places[fire] for fire in ends)),
    }


def residual(model: Any) -> dict[str, Any] | None:
    """The names of ResNet, Wide ResNet and ResNeXt, which timm has too."""
    if model.version != "v1.5" or model.shortcut == "pad" or model.weight_standardization:
        return None
    return {
        "rules": (
            ("stem/conv", "conv1"),
            ("stem/norm", "bn1"),
            (BLOCK + r"conv(?P<number>\d)", "layer{stage}.{block0}.conv{number}"),
            (BLOCK + r"norm(?P<number>\d)", "layer{stage}.{block0}.bn{number}"),
            *conv_norm(BLOCK + "downsample", "layer{stage}.{block0}.downsample"),
            ("head", "fc"),
        ),
        "stages": stages("layer{}", *range(1, len(model.stage_sizes) + 1)),
    }


def _resnet(model: Any) -> dict[str, Any] | None:
    plain = not model.se_reduction and model.attention == "none" and model.stem_pool == "max"
    if not plain or model.stem_widths or model.shortcut != "projection":
        return None
    return residual(model)


def _densenet(model: Any) -> dict[str, Any] | None:
    if model.stem != "imagenet":
        return None
    layer = "features.denseblock{stage}.denselayer{block}."
    return {
        "rules": (
            *conv_norm("stem", "features", "conv0", "norm0"),
            (BLOCK + r"(?P<layer>(conv|norm)\d)", layer + "{layer}"),
            *conv_norm(r"(?P<name>transition\d)", "features.{name}", "conv", "norm"),
            ("norm", "features.norm5"),
            ("head", "classifier"),
        ),
        "stages": stages("features.denseblock{}", *range(1, len(model.stage_sizes) + 1)),
    }


def _mobilenet_v2(model: Any) -> dict[str, Any]:
    block, ends = "features.{index}.conv", _cumulative(row[2] for row in model.stages)
    return {
        "rules": (
            *conv_norm("stem", "features.0"),
            *conv_norm(BLOCK + "(expand|depthwise)", block + ".{part}"),
            *conv_norm(BLOCK + "project", block, "{part}", "{part1}"),
            *conv_norm("last", "features.{after}"),
            ("head", "classifier.1"),
        ),
        "stages": stages("features.{}", *ends),
    }


def _mobilenet_v3(model: Any) -> dict[str, Any]:
    return {
        "rules": (
            *conv_norm("stem", "features.0"),
            *_gated_block("features.{index}.block.{part}"),
            *conv_norm("last", "features.{after}"),
            ("dense", "classifier.0"),
            ("head", "classifier.3"),
        ),
        "stages": stages("features.{}", *_cumulative(len(rows) for rows in model.stages)),
    }


def _efficientnet(model: Any) -> dict[str, Any] | None:
    if not (model.gated and model.scaled_ends):
        return None
    depth = len(model.stages)
    return {
        "rules": (
            *conv_norm("stem", "features.0"),
            *_gated_block("features.{stage}.{block0}.block.{part}"),
            *conv_norm("last", f"features.{depth + 1}"),
            ("head", "classifier.1"),
        ),
        "stages": stages("features.{}", *range(1, depth + 1)),
    }


def _gated_block(theirs: str) -> tuple:
    return (
        *conv_norm(BLOCK + "(expand|depthwise|project)", theirs),
        (BLOCK + r"se/(?P<layer>fc\d)", theirs + ".{layer}"),
    )


def _cumulative(depths: Any) -> list[int]:
    ends = [0]
    for depth in depths:
        ends.append(ends[-1] + depth)
    return ends[1:]


def _shufflenet(model: Any) -> dict[str, Any]:
    # torchvision counts the stem's pool as stage 1.
    rules: list[tuple[str, str]] = []
    numbers = range(1, len(model.stage_sizes) + 1)
    for stage in numbers:
        block = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/"
        for part, branch, at in (
            ("shortcut_depthwise", 1, 0),
            ("shortcut_pointwise", 1, 2),
            ("pointwise1", 2, 0),
            ("depthwise", 2, 3),
            ("pointwise2", 2, 5),
        ):
            theirs = f"stage{stage + 1}.{{block0}}.branch{branch}"
            rules += conv_norm(block + part, theirs, str(at), str(at + 1))
    return {
        "rules": (
            *conv_norm("stem", "conv1"),
            *rules,
            *conv_norm("last", "conv5"),
            ("head", "fc"),
        ),
        "stages": stages("stage{}", *(stage + 1 for stage in numbers)),
    }


def _regnet(model: Any) -> dict[str, Any]:
    block = "trunk_output.block{stage}.block{stage}-{block0}."
    units = {"conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "downsample": "proj"}
    rules: list[tuple[str, str]] = []
    for ours, theirs in units.items():
        rules += conv_norm(BLOCK + ours, block + theirs)
    return {
        "rules": (
            *conv_norm("stem", "stem"),
            *rules,
            (BLOCK + r"se/(?P<layer>fc\d)", block + "f.se.{layer}"),
            ("head", "fc"),
        ),
        "stages": stages("trunk_output.block{}", 1, 2, 3, 4),
    }


def _convnext(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "layer" or model.response_norm:
        return None
    # Stem, stage, downsampling, stage and so on share one list.
    rules: list[tuple[str, str]] = [*conv_norm("stem", "features.0")]
    numbers = range(1, len(model.stage_sizes) + 1)
    for stage in numbers:
        block = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/"
        theirs = f"features.{2 * stage - 1}.{{block0}}."
        rules += conv_norm(f"downsample{stage}", f"features.{2 * stage}", "1", "0")
        rules.append((block + "layer_scale", theirs + "layer_scale"))
        for ours, at in (("depthwise", 0), ("norm", 2), ("expand", 3), ("project", 5)):
            rules.append((block + ours, f"{theirs}block.{at}"))
    return {
        "rules": (*rules, ("norm", "classifier.0"), ("head", "classifier.2")),
        "kinds": ((BLOCK + "layer_scale", CHANNEL_11),),
        "stages": stages("features.{}", *(2 * stage - 1 for stage in numbers)),
    }


TORCHVISION: Mapping[str, Table] = {
    "AlexNet": _alexnet,
    "VGG": _vgg,
    "GoogLeNet": _googlenet,
    "InceptionV3": _inception,
    "SqueezeNet": _squeezenet,
    "ResNet": _resnet,
    "DenseNet": _densenet,
    "MobileNetV2": _mobilenet_v2,
    "MobileNetV3": _mobilenet_v3,
    "ShuffleNetV2": _shufflenet,
    "EfficientNet": _efficientnet,
    "RegNet": _regnet,
    "ConvNeXt": _convnext,
}
