"""timm's names of layers, a table for each class of `cnnjax.models`; see `torchvision`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnjax.convert.layouts import CHANNEL_111
from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.torchvision import TORCHVISION, Table, stages
from cnnjax.models.elsewhere import TIMM_FIELDS


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
        "requires": TIMM_FIELDS["MobileNetV1"],
        "stages": stages("blocks.{}", *range(len(model.stages))),
    }


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
        "requires": TIMM_FIELDS["NFNet"],
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


TIMM: Mapping[str, Table] = {
    "DenseNet": TORCHVISION["DenseNet"],
    "MobileNetV1": _mobilenet_v1,
    "NFNet": _nfnet,
}
