"""Names of mobile networks and of those near them in torchvision and timm; see `torchvision`.

Where a table goes from block to block, it is the layers' `exact` names instead of rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cnnjax.convert.layouts import CHANNEL_11, DENSE_AS_1X1
from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.torchvision import Table, conv_norm, stages

# timm's names of the parts of its blocks, in the order of computation: (ours, convolution, norm).
CONV = (("expand", "conv", "bn1"),)
FUSED = (("expand", "conv_exp", "bn1"), ("project", "conv_pwl", "bn2"))
SEPARABLE = (("depthwise", "conv_dw", "bn1"), ("project", "conv_pw", "bn2"))
INVERTED = (
    ("expand", "conv_pw", "bn1"),
    ("depthwise", "conv_dw", "bn2"),
    ("project", "conv_pwl", "bn3"),
)
UNIVERSAL = tuple(
    (ours, f"{theirs}.conv", f"{theirs}.bn")
    for ours, theirs in (
        ("start", "dw_start"),
        ("expand", "pw_exp"),
        ("depthwise", "dw_mid"),
        ("project", "pw_proj"),
    )
)
Parts = Sequence[tuple[str, str, str]]


def _block(ours: str, theirs: str, parts: Parts) -> dict[str, str]:
    """The names of a block of timm's mobile networks, with its gate."""
    found = {
        f"{ours}/se/fc1": f"{theirs}.se.conv_reduce",
        f"{ours}/se/fc2": f"{theirs}.se.conv_expand",
    }
    for part, conv, norm in parts:
        found |= {
            f"{ours}/{part}/conv": f"{theirs}.{conv}",
            f"{ours}/{part}/norm": f"{theirs}.{norm}",
        }
    return found


def _path(stage: int, block: int) -> str:
    return f"stage{stage}/block{block}"


def _unit(ours: str, theirs: str, conv: str, norm: str) -> dict[str, str]:
    """The names of a `blocks.ConvNorm`."""
    return dict(conv_norm(ours, theirs, conv, norm))


STEM = (("stem/conv", "conv_stem"), ("stem/norm", "bn1"))


def _mnasnet(model: Any) -> dict[str, Any]:
    # torchvision has stem, first stage and last convolution without modules of their own.
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
            *conv_norm("stage1/block1/depthwise", "layers", "3", "4"),
            *conv_norm("stage1/block1/project", "layers", "6", "7"),
            *rules,
            *conv_norm("last", "layers", str(last), str(last + 1)),
            ("head", "classifier.1"),
        ),
        "stages": stages("layers.{}", *range(7, last)),
    }


def _timm_efficientnet(depths: Sequence[int], fused: int = 0) -> dict[str, Any]:
    """timm's EfficientNet, of which MobileNet v2 and MNASNet are cases."""
    exact: dict[str, str] = {}
    for stage, depth in enumerate(depths, 1):
        parts: Parts = FUSED if stage <= fused else INVERTED
        if stage == 1:
            parts = CONV if fused else SEPARABLE
        for block in range(1, depth + 1):
            exact |= _block(_path(stage, block), f"blocks.{stage - 1}.{block - 1}", parts)
    return {
        "rules": (
            *STEM,
            ("last/conv", "conv_head"),
            ("last/norm", "bn2"),
            ("head", "classifier"),
        ),
        "exact": exact,
        "stages": stages("blocks.{}", *range(len(depths))),
    }


def _efficientnet(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "batch":
        return None
    if model.gated != model.scaled_ends:
        return None
    table = _timm_efficientnet(model.depths(), model.fused_stages)
    return {**table, "requires": efficientnet_requires(model)}


def efficientnet_requires(model: Any) -> dict[str, Any]:
    """What the weights of EfficientNets need that their names do not tell."""
    # Those with this epsilon are TensorFlow's, timm's `tf_` networks.
    padding = {"padding": "same" if model.layers.norm_epsilon == 1e-3 else "symmetric"}
    return padding if model.gated else {"activation": "relu6", **padding}


def _mobilenet_v3(model: Any) -> dict[str, Any]:
    # timm ends a stage where the features change, too, and the last convolution is one.
    exact: dict[str, str] = {}
    ends: list[int] = []
    group, before = -1, None
    for stage, rows in enumerate(model.stages, 1):
        for block, (_, _, features, *_) in enumerate(rows, 1):
            if block == 1 or features != before:
                group, number, before = group + 1, 0, features
            parts = SEPARABLE if (stage, block) == (1, 1) else INVERTED
            exact |= _block(_path(stage, block), f"blocks.{group}.{number}", parts)
            number += 1
        ends.append(group)
    return {
        "rules": (
            *STEM,
            *conv_norm("last", f"blocks.{group + 1}.0", "conv", "bn1"),
            ("dense", "conv_head"),
            ("head", "classifier"),
        ),
        "exact": exact,
        "kinds": (("dense/kernel", DENSE_AS_1X1),),
        # Those with this padding are timm's `tf_` networks.
        "requires": {"norm_epsilon": 1e-3 if model.padding == "same" else 1e-5},
        "stages": stages("blocks.{}", *ends),
    }


def _mobilenet_v4(model: Any) -> dict[str, Any]:
    exact: dict[str, str] = {}
    for stage, rows in enumerate(model.stages, 1):
        for block, (kind, *_) in enumerate(rows, 1):
            ours, theirs = _path(stage, block), f"blocks.{stage - 1}.{block - 1}"
            exact |= {f"{ours}/conv": f"{theirs}.conv", f"{ours}/norm": f"{theirs}.bn1"}
            exact |= _block(ours, theirs, FUSED if kind == "fused" else UNIVERSAL)
    return {
        "rules": (
            *STEM,
            ("last/conv", "conv_head"),
            ("last/norm", "norm_head"),
            ("head", "classifier"),
        ),
        "exact": exact,
        "requires": {"padding": "symmetric"},
        "stages": stages("blocks.{}", *range(len(model.stages))),
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
    exact = branched("stem/conv", "stem", 1, "conv_scale")
    for stage, depth in enumerate(model.stage_sizes, 1):
        for block in range(1, depth + 1):
            for part, number, scale in (("depthwise", 0, "conv_scale"), ("pointwise", 1, None)):
                ours = f"{_path(stage, block)}/{part}"
                theirs = f"stages.{stage - 1}.{2 * (block - 1) + number}"
                exact |= branched(f"{ours}/conv", theirs, model.num_branches, scale)
                for layer in ("fc1", "fc2"):
                    exact[f"{ours}/se/{layer}"] = f"{theirs}.attn.{layer}"
    return {
        "rules": (("head", "head.fc"),),
        "exact": exact,
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


def branched(ours: str, theirs: str, num_branches: int, scale: str | None) -> dict[str, str]:
    """The names of a `reparametrize.BranchedConv` that is a MobileOneBlock over there.

    Args:
      ours: its path.
      theirs: its name there.
      num_branches: of the kernel's size.
      scale: name of the 1x1 branch, if there is one.
    """
    names = [f"conv_kxk.{number}" for number in range(num_branches)] + ([scale] if scale else [])
    found = {f"{ours}/identity": f"{theirs}.identity", f"{ours}/conv": f"{theirs}.reparam_conv"}
    for number, name in enumerate(names, 1):
        found |= _unit(f"{ours}/branch{number}", f"{theirs}.{name}", "conv", "bn")
    return found


def _ghostnet(model: Any) -> dict[str, Any]:
    # timm has the blocks behind the first of a stage in a list of their own.
    gates = (("pointwise", 0), ("horizontal", 2), ("vertical", 4))
    shortcuts = (("depthwise", 0), ("pointwise", 2))
    last = 2 * len(model.stages) - 1
    exact: dict[str, str] = {}
    for stage, rows in enumerate(model.stages):
        for block in range(len(rows)):
            ours = _path(stage + 1, block + 1)
            at = f"{max(0, 2 * stage - 1)}.0" if block == 0 else f"{2 * stage}.{block - 1}"
            theirs = f"blocks.{at}"
            exact |= _block(ours, theirs, (("depthwise", "conv_dw", "bn_dw"),))
            for ghost in ("ghost1", "ghost2"):
                for part, name in (("primary", "primary_conv"), ("cheap", "cheap_operation")):
                    exact |= _unit(f"{ours}/{ghost}/{part}", f"{theirs}.{ghost}.{name}", "0", "1")
            for name, number in gates:
                place = f"{theirs}.ghost1.short_conv", str(number), str(number + 1)
                exact |= _unit(f"{ours}/ghost1/gate/{name}", *place)
            for name, number in shortcuts:
                place = f"{theirs}.shortcut", str(number), str(number + 1)
                exact |= _unit(f"{ours}/shortcut_{name}", *place)
    return {
        "rules": (
            *STEM,
            *conv_norm("last", f"blocks.{last}.0", "conv", "bn1"),
            ("dense", "conv_head"),
            ("head", "classifier"),
        ),
        "exact": exact,
        "kinds": (("dense/kernel", DENSE_AS_1X1),),
        "stages": stages("blocks.{}", *range(0, last, 2)),
    }


def _regnet(model: Any) -> dict[str, Any]:
    block = "s{stage}.b{block}."
    return {
        "rules": (
            *conv_norm("stem", "stem", "conv", "bn"),
            *conv_norm(BLOCK + r"(?P<layer>conv\d|downsample)", block + "{layer}", "conv", "bn"),
            (BLOCK + r"se/(?P<layer>fc\d)", block + "se.{layer}"),
            ("head", "head.fc"),
        ),
        "stages": stages("s{}", 1, 2, 3, 4),
    }


def _convnext(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "layer" or model.stem != "imagenet":
        return None
    block = "stages.{stage0}.blocks.{block0}."
    layers = {
        "depthwise": "conv_dw",
        "norm": "norm",
        "expand": "mlp.fc1",
        "response_norm": "mlp.grn",
        "project": "mlp.fc2",
    }
    depth = len(model.stage_sizes)
    downsamples = [
        rule
        for stage in range(1, depth)
        for rule in conv_norm(f"downsample{stage}", f"stages.{stage}.downsample", "1", "0")
    ]
    # timm's narrow networks have 1x1 convolutions for dense layers.
    dense = (BLOCK + "(expand|project)/kernel", DENSE_AS_1X1)
    return {
        "rules": (
            *conv_norm("stem", "stem"),
            *((BLOCK + ours, block + theirs) for ours, theirs in layers.items()),
            (BLOCK + "layer_scale", block + "gamma"),
            *downsamples,
            ("norm", "head.norm"),
            ("head", "head.fc"),
        ),
        "kinds": (dense,) if model.stage_features[0] < 96 else (),
        "stages": stages("stages.{}", *range(depth)),
    }


def _convmixer(model: Any) -> dict[str, Any]:
    block = "blocks.{block0}."
    layers = {"depthwise": "0.fn.0", "norm1": "0.fn.2", "pointwise": "1", "norm2": "3"}
    return {
        "rules": (
            *conv_norm("stem", "stem", "0", "2"),
            *((BLOCK + ours, block + theirs) for ours, theirs in layers.items()),
            ("head", "head"),
        ),
        "requires": {"activation": "relu" if model.features == 768 else "gelu"},
        "stages": {"stage1": "blocks"},
    }


def _fastvit(model: Any) -> dict[str, Any]:
    exact: dict[str, str] = {}
    for number in (1, 2, 3):
        scale = "conv_scale" if number < 3 else None
        exact |= branched(f"stem{number}/conv", f"stem.{number - 1}", 1, scale)
    exact |= branched("last/conv", "final_conv", 1, "conv_scale")
    for stage, depth in enumerate(model.stage_sizes):
        ours, theirs = f"downsample{stage}", f"stages.{stage}.downsample.proj"
        exact |= _unit(f"{ours}/large/branch1", f"{theirs}.0.large_conv", "conv", "bn")
        exact |= _unit(f"{ours}/large/branch2", f"{theirs}.0.small_conv", "conv", "bn")
        exact[f"{ours}/large/conv"] = f"{theirs}.0.reparam_conv"
        exact |= branched(f"{ours}/pointwise/conv", f"{theirs}.1", 1, None)
        for block in range(depth):
            ours, theirs = _path(stage + 1, block + 1), f"stages.{stage}.blocks.{block}"
            mixer = f"{theirs}.token_mixer"
            exact |= branched(f"{ours}/mixer/mixer", f"{mixer}.mixer", 1, "conv_scale")
            exact[f"{ours}/mixer/norm/identity"] = f"{mixer}.norm.identity"
            exact[f"{ours}/mixer/layer_scale"] = f"{mixer}.layer_scale.gamma"
            exact[f"{ours}/mixer/conv"] = f"{mixer}.reparam_conv"
            exact |= _unit(f"{ours}/depthwise", f"{theirs}.mlp.conv", "conv", "bn")
            exact[f"{ours}/expand"] = f"{theirs}.mlp.fc1"
            exact[f"{ours}/project"] = f"{theirs}.mlp.fc2"
            exact[f"{ours}/layer_scale"] = f"{theirs}.layer_scale.gamma"
    return {
        "rules": ((r"last/se/(?P<layer>fc\d)", "final_conv.se.{layer}"), ("head", "head.fc")),
        "exact": exact,
        "kinds": (
            (r".*/layer_scale", CHANNEL_11),
            (BLOCK + "(expand|project)/kernel", DENSE_AS_1X1),
        ),
        "stages": stages("stages.{}", *range(len(model.stage_sizes))),
    }


TORCHVISION: Mapping[str, Table] = {
    "MNASNet": _mnasnet,
}
TIMM: Mapping[str, Table] = {
    "MNASNet": lambda model: _timm_efficientnet([row[4] for row in model.stages]),
    "MobileNetV2": lambda model: _timm_efficientnet([row[2] for row in model.stages]),
    "MobileNetV3": _mobilenet_v3,
    "MobileNetV4": _mobilenet_v4,
    "EfficientNet": _efficientnet,
    "RepVGG": _repvgg,
    "MobileOne": _mobileone,
    "GhostNet": _ghostnet,
    "RegNet": _regnet,
    "ConvNeXt": _convnext,
    "ConvMixer": _convmixer,
    "FastViT": _fastvit,
}
