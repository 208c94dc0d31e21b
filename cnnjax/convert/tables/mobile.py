"""Names of mobile networks and of those near them in torchvision and timm; see `torchvision`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cnnjax.convert.layouts import DENSE_AS_1X1
from cnnjax.convert.names import BLOCK
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


def _repvgg(model: Any) -> dict[str, Any]:
    rules: list[tuple[str, str]] = []
    places = (("stem/", "stem."), (BLOCK, "stages.{stage0}.{block0}."))
    for ours, theirs in places:
        rules += conv_norm(f"{ours}conv/branch1", f"{theirs}conv_kxk", "conv", "bn")
        rules += conv_norm(f"{ours}conv/branch2", f"{theirs}conv_1x1", "conv", "bn")
        rules.append((f"{ours}conv/identity", f"{theirs}identity"))
        rules.append((f"{ours}conv/conv", f"{theirs}reparam_conv"))
    return {
        "rules": (*rules, ("head", "head.fc")),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def _mobileone(model: Any) -> dict[str, Any]:
    rules = _mobileone_conv("stem", "stem", 3, 1)
    for stage, depth in enumerate(model.stage_sizes):
        for block in range(depth):
            ours, theirs = f"stage{stage + 1}/block{block + 1}/", f"stages.{stage}."
            for part, at, kernel_size in (("depthwise", 0, 3), ("pointwise", 1, 1)):
                names = ours + part, f"{theirs}{2 * block + at}"
                rules += _mobileone_conv(*names, kernel_size, model.num_branches)
    return {
        "rules": (*rules, ("head", "head.fc")),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def _mobileone_conv(ours: str, theirs: str, kernel_size: int, num_branches: int) -> list:
    rules: list[tuple[str, str]] = []
    for number in range(num_branches):
        branch = f"{ours}/conv/branch{number + 1}"
        rules += conv_norm(branch, f"{theirs}.conv_kxk.{number}", "conv", "bn")
    if kernel_size > 1:
        branch = f"{ours}/conv/branch{num_branches + 1}"
        rules += conv_norm(branch, f"{theirs}.conv_scale", "conv", "bn")
    return [
        *rules,
        (f"{ours}/conv/identity", f"{theirs}.identity"),
        (f"{ours}/conv/conv", f"{theirs}.reparam_conv"),
        (rf"{ours}/se/(?P<layer>fc\d)", f"{theirs}.attn.{{layer}}"),
    ]


def _ghostnet(model: Any) -> dict[str, Any]:
    # timm has the blocks behind the first of a stage in a list of their own.
    ghost = r"(?P<ghost>ghost\d)/"
    gates = (("pointwise", 0), ("horizontal", 2), ("vertical", 4))
    shortcuts = (("depthwise", 0), ("pointwise", 2))
    rules: list[tuple[str, str]] = []
    last = 2 * len(model.stages) - 1
    for stage, rows in enumerate(model.stages):
        for block in range(len(rows)):
            ours = f"stage{stage + 1}/block{block + 1}/"
            at = f"{max(0, 2 * stage - 1)}.0" if block == 0 else f"{2 * stage}.{block - 1}"
            theirs = f"blocks.{at}."
            rules += conv_norm(ours + ghost + "primary", theirs + "{ghost}.primary_conv")
            rules += conv_norm(ours + ghost + "cheap", theirs + "{ghost}.cheap_operation")
            for name, number in gates:
                place = str(number), str(number + 1)
                rules += conv_norm(
                    f"{ours}ghost1/gate/{name}", theirs + "ghost1.short_conv", *place
                )
            for name, number in shortcuts:
                place = str(number), str(number + 1)
                rules += conv_norm(f"{ours}shortcut_{name}", theirs + "shortcut", *place)
            rules.append((ours + "depthwise/conv", theirs + "conv_dw"))
            rules.append((ours + "depthwise/norm", theirs + "bn_dw"))
            rules += _gate(ours, theirs)
    return {
        "rules": (
            ("stem/conv", "conv_stem"),
            ("stem/norm", "bn1"),
            *rules,
            *conv_norm("last", f"blocks.{last}.0", "conv", "bn1"),
            ("dense", "conv_head"),
            ("head", "classifier"),
        ),
        "kinds": (("dense/kernel", DENSE_AS_1X1),),
        "stages": stages("blocks.{}", *range(0, last, 2)),
    }


def _gate(ours: str, theirs: str) -> tuple:
    """timm's squeeze-and-excite of mobile networks."""
    return (
        (f"{ours}se/fc1", f"{theirs}se.conv_reduce"),
        (f"{ours}se/fc2", f"{theirs}se.conv_expand"),
    )


TORCHVISION: Mapping[str, Table] = {
    "MNASNet": _mnasnet,
}
TIMM: Mapping[str, Table] = {
    "RepVGG": _repvgg,
    "MobileOne": _mobileone,
    "GhostNet": _ghostnet,
}
