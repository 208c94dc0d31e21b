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


def _residual(model: Any, *rules: tuple[str, str]) -> dict[str, Any] | None:
    """The table of a network with the blocks' own rules and timm's ResNet around them."""
    if model.shortcut == "pad":
        return None
    number = r"(?P<number>\d)"
    return {
        "rules": (
            *rules,
            *deep_stem(),
            ("stem/conv", "conv1"),
            ("stem/norm", "bn1"),
            (BLOCK + f"conv{number}", THEIR_BLOCK + "conv{number}"),
            (BLOCK + f"norm{number}", THEIR_BLOCK + "bn{number}"),
            *_shortcut(model.shortcut),
            ("head", "fc"),
        ),
        "stages": stages("layer{}", *range(1, len(model.stage_sizes) + 1)),
    }


def _sknet(model: Any) -> dict[str, Any] | None:
    unit = BLOCK + r"(?P<unit>conv\d)"
    theirs = THEIR_BLOCK + "{unit}."
    return _residual(
        model,
        *(
            rule
            for path in (1, 2)
            for rule in conv_norm(f"{unit}/path{path}", f"{theirs}paths.{path - 1}", "conv", "bn")
        ),
        (unit + "/reduce", theirs + "attn.fc_reduce"),
        (unit + "/select", theirs + "attn.fc_select"),
        # In the selective kernel alone: a norm behind a convolution is `bn` too.
        *((BLOCK + f"conv{i}/norm", _sk_norm(model, i)) for i in (1, 2, 3)),
        (unit + "/conv", theirs + "conv"),
    )


def _sk_norm(model: Any, number: int) -> str:
    selective = 1 if model.block == "basic" else 2
    return THEIR_BLOCK + f"conv{number}." + ("attn.bn" if number == selective else "bn")


def _resnest(model: Any) -> dict[str, Any] | None:
    theirs = THEIR_BLOCK + "conv2."
    return _residual(
        model,
        (BLOCK + "conv2/norm", theirs + "bn0"),
        (BLOCK + "conv2/fc_norm", theirs + "bn1"),
        (BLOCK + r"conv2/(?P<layer>conv|fc\d)", theirs + "{layer}"),
    )


def _res2net(model: Any) -> dict[str, Any] | None:
    rules: list[tuple[str, str]] = []
    for split in range(1, model.splits):
        rules.append((BLOCK + f"split{split}/conv", f"{THEIR_BLOCK}convs.{split - 1}"))
        rules.append((BLOCK + f"split{split}/norm", f"{THEIR_BLOCK}bns.{split - 1}"))
    return _residual(model, *rules)


def _resnet_v2(model: Any) -> dict[str, Any] | None:
    if model.se_reduction or model.shortcut == "pad" or model.stem != "imagenet":
        return None
    if model.attention != "none" or model.stem_pool == "conv":
        return None
    block = "stages.{stage0}.blocks.{block0}."
    return {
        "rules": (
            (r"stem/(?P<layer>(conv|norm)\d?)", "stem.{layer}"),
            (BLOCK + r"(?P<layer>(conv|norm)\d)", block + "{layer}"),
            (BLOCK + "downsample", block + "downsample.conv"),
            ("norm", "norm"),
            ("head", "head.fc"),
        ),
        "kinds": (("head/kernel", DENSE_AS_1X1),),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def _xception(model: Any) -> dict[str, Any]:
    rules: list[tuple[str, str]] = []
    # The first convolution of the first block stands behind no activation.
    for stage, first in (("1", 0), (r"\d", 1)):
        block = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/"
        for number in (1, 2, 3):
            at = first + 3 * (number - 1)
            unit = f"block{{index}}.rep.{at}."
            rules.append((f"{block}separable{number}/depthwise", unit + "conv1"))
            rules.append((f"{block}separable{number}/pointwise", unit + "pointwise"))
            rules.append((f"{block}norm{number}", f"block{{index}}.rep.{at + 1}"))
    entry = len(model.entry_features)
    last = entry + model.middle_blocks
    for number in (1, 2):
        rules.append((f"last{number}/depthwise", f"conv{number + 2}.conv1"))
        rules.append((f"last{number}/pointwise", f"conv{number + 2}.pointwise"))
        rules.append((f"last_norm{number}", f"bn{number + 2}"))
    return {
        "rules": (
            *((f"stem{i}/conv", f"conv{i}") for i in (1, 2)),
            *((f"stem{i}/norm", f"bn{i}") for i in (1, 2)),
            *rules,
            (BLOCK + "downsample/conv", "block{index}.skip"),
            (BLOCK + "downsample/norm", "block{index}.skipbn"),
            ("head", "fc"),
        ),
        "stages": stages("block{}", *range(1, entry), last, last + 1),
    }


# The convolutions of `inception_v4.Branches`: those in a sequence, those alone.
BRANCHES = (
    (r"(?P<branch>branch\d)_(?P<at>\d)", "{branch}.{at}"),
    (r"(?P<branch>branch\d)", "{branch}"),
)


def _branches(ours: str, theirs: str) -> list[tuple[str, str]]:
    """Rules for the convolutions in the branches of a module."""
    return [
        rule
        for unit, name in BRANCHES
        for rule in conv_norm(f"{ours}/{unit}", f"{theirs}.{name}", "conv", "bn")
    ]


def _inception_v4(model: Any) -> dict[str, Any]:
    del model
    units = {"conv1": "0", "conv2": "1", "conv3": "2", "conv4": "3.conv", "conv5": "5.conv"}
    modules = ["mixed_4a", *(f"inception_a{i}" for i in range(1, 5)), "reduction_a"]
    modules += [*(f"inception_b{i}" for i in range(1, 8)), "reduction_b"]
    rules: list[tuple[str, str]] = []
    for ours, theirs in units.items():
        rules += conv_norm(ours, f"features.{theirs}", "conv", "bn")
    for ours, at in zip(modules, (4, *range(6, 19)), strict=True):
        rules += _branches(ours, f"features.{at}")
    for number, at in ((1, 19), (2, 20), (3, 21)):
        # Here branches 1 and 2 fork, and are no sequences.
        unit = rf"inception_c{number}/(?P<unit>branch[12]_\d[ab]?)"
        rules += conv_norm(unit, f"features.{at}.{{unit}}", "conv", "bn")
        rules += _branches(f"inception_c{number}", f"features.{at}")
    return {
        "rules": (*rules, ("head", "last_linear")),
        "stages": stages("features.{}", 2, 3, 9, 17, 21),
    }


def _inception_resnet(model: Any) -> dict[str, Any]:
    del model
    rules = [*conv_norm(r"(?P<unit>conv2d_\w+)", "{unit}", "conv", "bn")]
    rules += _branches(r"(?P<module>mixed_\w+)", "{module}")
    blocks = [(f"block35_{i}", f"repeat.{i - 1}") for i in range(1, 11)]
    blocks += [(f"block17_{i}", f"repeat_1.{i - 1}") for i in range(1, 21)]
    blocks += [(f"block8_{i}", f"repeat_2.{i - 1}") for i in range(1, 10)]
    for ours, theirs in (*blocks, ("block8_10", "block8")):
        rules += _branches(f"{ours}/branches", theirs)
        rules.append((f"{ours}/conv", f"{theirs}.conv2d"))
    return {
        "rules": (*rules, ("head", "classif")),
        "stages": stages("{}", "conv2d_2b", "conv2d_4a", "repeat", "repeat_1", "conv2d_7b"),
    }


TORCHVISION: Mapping[str, Table] = {}
TIMM: Mapping[str, Table] = {
    "ResNet": _resnet,
    "SKNet": _sknet,
    "ResNeSt": _resnest,
    "Res2Net": _res2net,
    "Xception": _xception,
    "InceptionV4": _inception_v4,
    "InceptionResNetV2": _inception_resnet,
}
