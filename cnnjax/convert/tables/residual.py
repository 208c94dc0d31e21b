"""Names of layers of residual networks and their kin; see `torchvision`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnjax.convert.layouts import DENSE_AS_1X1, WINDOW
from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.torchvision import Table, conv_norm, residual, stages

THEIR_BLOCK = "layer{stage}.{block0}."
# ECA's convolution over neighboring channels is one-dimensional over there.
ECA_KERNEL = (".*/eca/conv/kernel", WINDOW)


def _resnet(model: Any) -> dict[str, Any] | None:
    if model.version == "v2":
        return _resnet_v2(model)
    table = residual(model)
    if table is None or model.attention == "bam":
        return None
    gate = BLOCK + r"(se|eca|cbam)/"
    table["rules"] = (
        (gate + r"(?P<layer>fc\d)", THEIR_BLOCK + _gate(model) + "{layer}"),
        (gate + "conv", THEIR_BLOCK + _gate(model, spatial=True) + "conv"),
        (gate + "norm", THEIR_BLOCK + _gate(model, spatial=True) + "bn"),
        *deep_stem(),
        *_shortcut(model.shortcut),
        *table["rules"],
    )
    table["kinds"] = (ECA_KERNEL,)
    return table


def _gate(model: Any, *, spatial: bool = False) -> str:
    if model.attention == "cbam":
        return "se.spatial.conv." if spatial else "se.channel."
    return "se."


def deep_stem() -> tuple:
    """Rules for the convolutions of `resnet.Stem` where it has several, and for its pool."""
    return (
        *((f"stem/conv{number}", f"conv1.{at}") for number, at in ((1, 0), (2, 3), (3, 6))),
        *((f"stem/norm{number}", f"conv1.{at}") for number, at in ((1, 1), (2, 4))),
        ("stem/norm3", "bn1"),
        *conv_norm("stem/pool", "maxpool"),
    )


def _shortcut(kind: str) -> tuple:
    """Rules for the projection: behind a pool it is the second module of three."""
    at = ("1", "2") if kind == "average" else ("0", "1")
    return conv_norm(BLOCK + "downsample", THEIR_BLOCK + "downsample", *at)


def _resnet_v2(model: Any) -> dict[str, Any] | None:
    if model.se_reduction or model.shortcut != "projection" or model.stem != "imagenet":
        return None
    if model.attention != "none" or model.stem_widths:
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


TORCHVISION: Mapping[str, Table] = {}
TIMM: Mapping[str, Table] = {
    "ResNet": _resnet,
}
