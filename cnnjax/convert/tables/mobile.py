"""Names of mobile networks and of those near them in torchvision and timm; see `torchvision`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnjax.convert.tables.torchvision import Table, conv_norm, stages


def _mnasnet(model: Any) -> dict[str, Any]:
    # torchvision has stem, first stage and last convolution without modules of their own.
    first = r"stage(?P<stage>1)/block(?P<block>1)/"
    last = len(model.stages) + 7
    rules: list[tuple[str, str]] = []
    for stage in range(2, len(model.stages) + 1):
        ours = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/"
        block = f"layers.{stage + 6}.{{block0}}.layers"
        for part, at in (("expand", 0), ("depthwise", 3), ("project", 6)):
            rules += conv_norm(ours + part, block, str(at), str(at + 1))
    return {
        "rules": (
            *conv_norm("stem", "layers"),
            *conv_norm(first + "depthwise", "layers", "3", "4"),
            *conv_norm(first + "project", "layers", "6", "7"),
            *rules,
            *conv_norm("last", "layers", str(last), str(last + 1)),
            ("head", "classifier.1"),
        ),
        "stages": stages("layers.{}", *range(7, last)),
    }


TORCHVISION: Mapping[str, Table] = {
    "MNASNet": _mnasnet,
}
TIMM: Mapping[str, Table] = {}
