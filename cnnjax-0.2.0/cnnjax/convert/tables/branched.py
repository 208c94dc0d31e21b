"""timm's names of the layers of networks whose paths branch and join; see `torchvision`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cnnjax.convert.layouts import DENSE_AS_1X1
from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.torchvision import Table, conv_norm, stages

_HEAD_FC = ("head", "head.fc")


def named(ours: str, theirs: str) -> tuple:
    """The rules for a `conv` and its `norm` in timm's `ConvNormAct`."""
    return conv_norm(ours, theirs, "conv", "bn")


def _cross_stages(model: Any) -> dict[str, Any]:
    parts = {
        "downsample": "conv_down",
        "expand": "conv_exp",
        "branch": "conv_transition_b",
        "merge": "conv_transition",
    }
    rules: list[tuple[str, str]] = [*named("stem", "stem.conv1")]
    for stage in range(1, len(model.stage_sizes) + 1):
        for ours, theirs in parts.items():
            rules += named(f"stage{stage}/{ours}", f"stages.{stage - 1}.{theirs}")
    unit = BLOCK + r"(?P<unit>conv\d)"
    return {
        "rules": (*rules, *named(unit, "stages.{stage0}.blocks.{block0}.{unit}"), _HEAD_FC),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def _dla(model: Any) -> dict[str, Any]:
    rules: list[tuple[str, str]] = [*conv_norm("stem/base", "base_layer")]
    for level, depth in enumerate(model.stem_sizes):
        for number in range(depth):
            ours = f"stem/level{level}_{number + 1}"
            # A convolution, its norm and its activation are three modules of a list.
            rules += conv_norm(ours, f"level{level}", str(3 * number), str(3 * number + 1))
    for stage, levels in enumerate(model.levels, 1):
        for path in _trees(levels):
            ours = "/".join((f"stage{stage}/block1", *path))
            theirs = ".".join((f"level{stage + 1}", *path))
            rules += conv_norm(f"{ours}/project", f"{theirs}.project")
            rules += named(f"{ours}/root", f"{theirs}.root")
            rules += [
                (rf"{ours}/conv(?P<number>\d)", theirs + ".conv{number}"),
                (rf"{ours}/norm(?P<number>\d)", theirs + ".bn{number}"),
            ]
    return {
        "rules": (*rules, ("head", "fc")),
        "kinds": (("head/kernel", DENSE_AS_1X1),),
        "stages": stages("level{}", *range(2, len(model.levels) + 2)),
    }


def _trees(levels: int) -> Iterator[tuple[str, ...]]:
    """Paths of a tree, of the trees within, and of their blocks."""
    yield ()
    for half in ("tree1", "tree2"):
        if levels > 0:
            yield from ((half, *path) for path in _trees(levels - 1))


def _dpn(model: Any) -> dict[str, Any]:
    units = {"reduce": "c1x1_a", "spatial": "c3x3_b", "widen": "c1x1_c"}
    rules: list[tuple[str, str]] = [*named("stem", "features.conv1_1")]
    numbers = range(1, len(model.stage_sizes) + 1)
    for stage in numbers:
        block = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/"
        theirs = f"features.conv{stage + 1}_{{block}}."
        shortcut = {"shortcut": "c1x1_w_s1" if stage == 1 else "c1x1_w_s2"}
        for ours, name in (units | shortcut).items():
            rules += named(block + ours, theirs + name)
    ends = [f"conv{stage + 1}_{model.stage_sizes[stage - 1]}" for stage in numbers]
    return {
        "rules": (*rules, ("norm", "features.conv5_bn_ac.bn"), ("head", "classifier")),
        "kinds": (("head/kernel", DENSE_AS_1X1),),
        "stages": stages("features.{}", *ends),
    }


def _vovnet(model: Any) -> dict[str, Any]:
    block = "stages.{stage0}.blocks.{block0}."
    rules: list[tuple[str, str]] = []
    layers = {"depthwise": "conv_dw", "conv": "conv_pw" if model.depthwise else "conv"}
    for ours, theirs in (*layers.items(), ("norm", "bn")):
        for number in range(1, model.depth + 1):
            unit = f"conv_mid.{number - 1}.{theirs}"
            rules.append((f"{BLOCK}conv{number}/{ours}", block + unit))
        for number in (2, 3):
            rules.append((f"stem/conv{number}/{ours}", f"stem.{number - 1}.{theirs}"))
    return {
        "rules": (
            *named("stem/conv1", "stem.0"),
            *rules,
            *named(BLOCK + "reduce", block + "conv_reduction"),
            *named(BLOCK + "merge", block + "conv_concat"),
            (BLOCK + "gate", block + "attn.fc"),
            _HEAD_FC,
        ),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def _hrnet(model: Any) -> dict[str, Any]:
    first = r"stage(?P<stage>1)/block(?P<block>\d+)/"
    rules: list[tuple[str, str]] = [*_residual(first, "layer1.{block0}.")]
    branches = range(1, len(model.stage_sizes) + 2)
    for number in branches:
        at = number - 1
        rules += _residual(f"widen{number}/", f"incre_modules.{at}.0.")
        rules += conv_norm(f"shrink{number}", f"downsamp_modules.{at}")
        rules += conv_norm(f"transition{number}_{number + 1}", f"transition{number}.{number}.0")
        for index in range(model.depth):
            theirs = f"stage{{stage}}.{{block0}}.branches.{at}.{index}."
            rules += _residual(f"{BLOCK}branch{number}_{index + 1}/", theirs)
        for to in branches:
            ours = f"{BLOCK}fuse{number}_to_{to}"
            theirs = f"stage{{stage}}.{{block0}}.fuse_layers.{to - 1}.{at}"
            rules += conv_norm(ours, theirs)
            for step in range(to - number):
                rules += conv_norm(f"{ours}_{step + 1}", f"{theirs}.{step}")
    return {
        "rules": (
            *((f"stem{i}/conv", f"conv{i}") for i in (1, 2)),
            *((f"stem{i}/norm", f"bn{i}") for i in (1, 2)),
            *conv_norm("transition1_1", "transition1.0"),
            *rules,
            *conv_norm("last", "final_layer"),
            ("head", "classifier"),
        ),
        "stages": {"stage1": "layer1"} | {f"stage{n}": f"stage{n}" for n in branches[1:]},
    }


def _residual(ours: str, theirs: str) -> tuple:
    return (
        (ours + r"conv(?P<layer>\d)", theirs + "conv{layer}"),
        (ours + r"norm(?P<layer>\d)", theirs + "bn{layer}"),
        *conv_norm(ours + "downsample", theirs + "downsample"),
    )


TIMM: Mapping[str, Table] = {
    "DarkNet": _cross_stages,
    "CSPResNet": _cross_stages,
    "DLA": _dla,
    "DPN": _dpn,
    "VoVNet": _vovnet,
    "HRNet": _hrnet,
}
