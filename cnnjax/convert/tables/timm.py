"""timm's names of layers, a table for each class of `cnnjax.models`; see `torchvision`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnjax.convert.layouts import CHANNEL_111, DENSE_AS_1X1
from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.torchvision import TORCHVISION, Table, conv_norm, residual, stages


def _resnet(model: Any) -> dict[str, Any] | None:
    if model.version == "v2":
        return _resnet_v2(model)
    table = residual(model)
    if table:
        gate = (BLOCK + r"se/(?P<layer>fc\d)", "layer{stage}.{block0}.se.{layer}")
        table["rules"] = (gate, *table["rules"])
    return table


def _resnet_v2(model: Any) -> dict[str, Any] | None:
    if model.se_reduction or model.shortcut != "projection" or model.stem != "imagenet":
        return None
    block = "stages.{stage0}.blocks.{block0}."
    return {
        "rules": (
            ("stem/conv", "stem.conv"),
            (BLOCK + r"(?P<layer>(conv|norm)\d)", block + "{layer}"),
            (BLOCK + "downsample", block + "downsample.conv"),
            ("norm", "norm"),
            ("head", "head.fc"),
        ),
        "kinds": (("head/kernel", DENSE_AS_1X1),),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def _mobilenet_v1(model: Any) -> dict[str, Any]:
    block = "blocks.{stage0}.{block0}."
    return {
        "rules": (
            ("stem/conv", "conv_stem"),
            ("stem/norm", "bn1"),
            (BLOCK + "depthwise/conv", block + "conv_dw"),
            (BLOCK + "depthwise/norm", block + "bn1"),
            (BLOCK + "pointwise/conv", block + "conv_pw"),
            (BLOCK + "pointwise/norm", block + "bn2"),
            ("head", "classifier"),
        ),
        # The paper has ReLU.
        "requires": {"activation": "relu6"},
        "stages": stages("blocks.{}", *range(len(model.stages))),
    }


def _efficientnet(model: Any) -> dict[str, Any] | None:
    if model.gated != model.scaled_ends:
        return None
    block = "blocks.{stage0}.{block0}."
    rules: list[tuple[str, str]] = []
    for stage, row in enumerate(model.stages, 1):
        # A block that does not widen counts its layers from the depthwise convolution.
        parts = ("depthwise", "project") if row[0] == 1 else ("expand", "depthwise", "project")
        theirs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
        if row[0] == 1:
            theirs["project"] = "conv_pw"
        for number, part in enumerate(parts, 1):
            ours = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/{part}"
            rules += conv_norm(ours, block[:-1], theirs[part], f"bn{number}")
    return {
        "rules": (
            ("stem/conv", "conv_stem"),
            ("stem/norm", "bn1"),
            *rules,
            (BLOCK + "se/fc1", block + "se.conv_reduce"),
            (BLOCK + "se/fc2", block + "se.conv_expand"),
            ("last/conv", "conv_head"),
            ("last/norm", "bn2"),
            ("head", "classifier"),
        ),
        "requires": efficientnet_requires(model),
        "stages": stages("blocks.{}", *range(len(model.stages))),
    }


def efficientnet_requires(model: Any) -> dict[str, Any]:
    """What the weights of PyTorch's EfficientNets need that their names do not tell.

    Networks trained by TensorFlow, Lite among them, have its padding and its epsilon; timm has
    others too, with PyTorch's.
    """
    if not model.gated:
        return {"activation": "relu6", "padding": "same", "norm_epsilon": 1e-3}
    return {"norm_epsilon": 1e-3 if model.padding == "same" else 1e-5}


def _nfnet(model: Any) -> dict[str, Any]:
    # timm adds 1e-6 to the variance of a kernel, the authors (and we) take a floor instead: outputs
    # differ by about 1e-3 where a kernel's variance is 1e-3.
    block = "stages.{stage0}.{block0}."
    convolutions = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv2b", "conv4": "conv3"}
    return {
        "rules": (
            (r"stem/(?P<layer>conv\d)", "stem.{layer}"),
            *((BLOCK + ours, block + theirs) for ours, theirs in convolutions.items()),
            (BLOCK + r"se/(?P<layer>fc\d)", block + "attn_last.{layer}"),
            (BLOCK + "downsample", block + "downsample.conv"),
            (BLOCK + "skip_gain", block + "skipinit_gain"),
            ("last", "final_conv"),
            ("head", "head.fc"),
        ),
        "kinds": ((r".*/gain", CHANNEL_111),),
        "requires": {"activation": "gelu_exact"},
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


TIMM: Mapping[str, Table] = {
    "ResNet": _resnet,
    "DenseNet": TORCHVISION["DenseNet"],
    "MobileNetV1": _mobilenet_v1,
    "EfficientNet": _efficientnet,
    "NFNet": _nfnet,
}
