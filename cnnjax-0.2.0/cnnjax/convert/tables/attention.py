"""torchvision's and timm's names of the layers of transformers; see `torchvision`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.torchvision import Table, conv_norm, stages
from cnnjax.models.attention import relative_positions
from cnnjax.models.swin import log_distances


def _vit_torchvision(model: Any) -> dict[str, Any] | None:
    # Small and tiny ones, whose features are fewer, are timm's alone.
    if model.distilled or model.features < 768:
        return None
    block = "encoder.layers.encoder_layer_{index0}."
    ends = [end - 1 for end in accumulate(model.stage_sizes)]
    return {
        "rules": (
            ("stem/class_token", "class_token"),
            ("stem/positions", "encoder.pos_embedding"),
            ("stem/conv", "conv_proj"),
            (BLOCK + r"norm(?P<number>\d)", block + "ln_{number}"),
            (BLOCK + "attention/qkv/kernel", block + "self_attention.in_proj_weight"),
            (BLOCK + "attention/qkv/bias", block + "self_attention.in_proj_bias"),
            (BLOCK + "attention/out", block + "self_attention.out_proj"),
            (BLOCK + "mlp/expand", block + "mlp.0"),
            (BLOCK + "mlp/project", block + "mlp.3"),
            ("norm", "encoder.ln"),
            ("head", "heads.head"),
        ),
        "stages": stages("encoder.layers.encoder_layer_{}", *ends),
    }


def _vit_timm(model: Any) -> dict[str, Any]:
    block = "blocks.{index0}."
    ends = [end - 1 for end in accumulate(model.stage_sizes)]
    return {
        "rules": (
            ("stem/class_token", "cls_token"),
            ("stem/distillation_token", "dist_token"),
            ("stem/positions", "pos_embed"),
            ("stem/conv", "patch_embed.proj"),
            (BLOCK + r"(?P<norm>norm\d)", block + "{norm}"),
            (BLOCK + "attention/qkv", block + "attn.qkv"),
            (BLOCK + "attention/out", block + "attn.proj"),
            (BLOCK + "mlp/expand", block + "mlp.fc1"),
            (BLOCK + "mlp/project", block + "mlp.fc2"),
            ("norm", "norm"),
            ("head", "head"),
            ("head_distilled", "head_dist"),
        ),
        "stages": stages("blocks.{}", *ends),
    }


def _swin(model: Any) -> dict[str, Any] | None:
    if model.layers.norm != "layer":
        return None
    # Stem, stage, merging, stage and so on share one list.
    rules: list[tuple[str, str]] = [*conv_norm("stem", "features.0", "0", "2")]
    numbers = range(1, len(model.stage_sizes) + 1)
    for stage in numbers:
        block = rf"stage(?P<stage>{stage})/block(?P<block>\d+)/"
        theirs = f"features.{2 * stage - 1}.{{block0}}."
        attention = theirs + "attn."
        rules += [
            (block + "windows/attention/qkv_bias", attention + "qkv.bias"),
            (block + "windows/attention/logit_scale", attention + "logit_scale"),
            (block + "windows/attention/qkv", attention + "qkv"),
            (block + "windows/attention/out", attention + "proj"),
            (block + "windows/position_bias", attention + "relative_position_bias_table"),
            (block + "windows/position1", attention + "cpb_mlp.0"),
            (block + "windows/position2", attention + "cpb_mlp.2"),
            (block + r"(?P<norm>norm\d)", theirs + "{norm}"),
            (block + "mlp/expand", theirs + "mlp.0"),
            (block + "mlp/project", theirs + "mlp.3"),
            (f"downsample{stage}/norm", f"features.{2 * stage}.norm"),
            (f"downsample{stage}/dense", f"features.{2 * stage}.reduction"),
        ]
    return {
        "rules": (*rules, ("norm", "norm"), ("head", "head")),
        "ignored": r".*\.(relative_position_index|relative_coords_table)",
        "constants": dict(_swin_constants(model)),
        "stages": stages("features.{}", *(2 * stage - 1 for stage in numbers)),
    }


def _swin_constants(model: Any) -> Iterator[tuple[str, Any]]:
    index = relative_positions(model.window).reshape(-1)
    distances = log_distances(model.window).astype(np.float32)
    for stage, depth in enumerate(model.stage_sizes):
        for block in range(depth):
            attention = f"features.{2 * stage + 1}.{block}.attn."
            yield attention + "relative_position_index", lambda channels: index
            if model.version == "v2":
                yield attention + "relative_coords_table", lambda channels: distances


def _maxvit(model: Any) -> dict[str, Any]:
    block = "blocks.{stage0}.layers.{block0}.layers."
    conv = block + "MBconv.layers."
    rules: list[tuple[str, str]] = []
    for ours, theirs in (("expand", "conv_a"), ("depthwise", "conv_b")):
        rules += conv_norm(BLOCK + "conv/" + ours, conv + theirs)
    part, theirs = BLOCK + "(?P<part_name>window|grid)/", block + "{part_name}_attention."
    attention = theirs + "attn_layer.1."
    return {
        "rules": (
            ("stem/conv1", "stem.0.0"),
            ("stem/norm1", "stem.0.1"),
            ("stem/conv2", "stem.1.0"),
            (BLOCK + "conv/norm", conv + "pre_norm"),
            *rules,
            (BLOCK + r"conv/se/(?P<layer>fc\d)", conv + "squeeze_excitation.{layer}"),
            (BLOCK + "conv/project", conv + "conv_c"),
            # Behind a pool, which is a module there.
            (
                r"stage(?P<stage>\d)/block(?P<block>1)/conv/shortcut",
                block + "MBconv.proj.1",
            ),
            (part + "position_bias", attention + "relative_position_bias_table"),
            (part + "attention/qkv", attention + "to_qkv"),
            (part + "attention/out", attention + "merge"),
            (part + "norm1", theirs + "attn_layer.0"),
            (part + "norm2", theirs + "mlp_layer.0"),
            (part + "mlp/expand", theirs + "mlp_layer.1"),
            (part + "mlp/project", theirs + "mlp_layer.3"),
            ("norm", "classifier.2"),
            ("dense", "classifier.3"),
            ("head", "classifier.5"),
        ),
        "ignored": r".*\.(relative_position_index|num_batches_tracked)",
        "constants": dict(_maxvit_constants(model)),
        "stages": stages("blocks.{}", *range(len(model.stage_sizes))),
    }


def _maxvit_constants(model: Any) -> Iterator[tuple[str, Any]]:
    index = relative_positions(model.side)
    for stage, depth in enumerate(model.stage_sizes):
        for block in range(depth):
            for part in ("window", "grid"):
                layer = f"blocks.{stage}.layers.{block}.layers.{part}_attention.attn_layer.1."
                yield layer + "relative_position_index", lambda channels: index


TORCHVISION: Mapping[str, Table] = {
    "ViT": _vit_torchvision,
    "Swin": _swin,
    "MaxViT": _maxvit,
}
TIMM: Mapping[str, Table] = {"ViT": _vit_timm}
