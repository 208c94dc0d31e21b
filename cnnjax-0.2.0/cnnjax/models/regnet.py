"""RegNet: bottlenecks whose widths follow a quantized linear function of depth.

Radosavovic et al. 2020, "Designing Network Design Spaces" (arXiv 2003.13678): X in section 4, Y
(with squeeze-and-excite) in section 5. Four numbers and a group width define a network.

Names: torchvision's `trunk_output.block2.block2-0` is `stage2/block1`; its `f.a`, `f.b`, `f.c` and
`proj` are `conv1`, `conv2`, `conv3` and `downsample`, each with `conv` and `norm`; `f.se` is `se`,
`fc` is `head`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import TORCHVISION, Row, also_called, row

STEM_FEATURES = 32


def stage_table(
    depth: int, initial_width: int, slope: float, width_multiplier: float, group_width: int
) -> list[tuple[int, int, int]]:
    """Returns (blocks, features, group width) of each stage: the paper's equations 2 to 4.

    Block `j` has the linear width `u = initial_width + slope * j`; `u` is rounded to the nearest
    `initial_width * width_multiplier ** k`, and that to a multiple of 8. A run of equal widths is
    a stage. At last each width is rounded to a multiple of its group width.
    """
    linear = initial_width + slope * np.arange(depth)
    exponents = np.round(np.log(linear / initial_width) / np.log(width_multiplier))
    quantized = np.round(initial_width * width_multiplier**exponents / 8).astype(int) * 8
    widths, depths = np.unique(quantized, return_counts=True)
    table = []
    for width, count in zip(widths.tolist(), depths.tolist(), strict=True):
        group = min(group_width, width)
        table.append((count, blocks.make_divisible(width, group), group))
    return table


class RegNetBlock(nn.Module):
    """`activation(shortcut(x) + branch(x))`: 1x1, grouped 3x3, gate (Y), 1x1; no bottleneck."""

    features: int
    strides: int
    group_width: int
    se_ratio: float
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, self.features, layers=self.layers)
        groups = self.features // self.group_width
        y = conv_norm(1, name="conv1")(x)
        y = conv_norm(3, strides=self.strides, groups=groups, name="conv2")(y)
        if self.se_ratio:
            # The gate's width follows the block's input (torchvision; the authors' code).
            width = round(self.se_ratio * x.shape[-1])
            gate = blocks.SqueezeExcite(width, self.layers.conv, self.layers.activation, name="se")
            y = gate(y)
        y = conv_norm(1, linear=True, name="conv3")(y)
        if self.strides != 1 or input_width(x) != self.features:
            x = conv_norm(1, strides=self.strides, linear=True, name="downsample")(x)
        return self.layers.activation(x + blocks.drop_branch(self, y))


class RegNet(nn.Module):
    """RegNet X or Y: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      depth, initial_width, slope, width_multiplier, group_width: the network; see `stage_table`.
      se_ratio: channels inside the gate per channel of the block's input; 0 for X, 0.25 for Y.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    depth: int
    initial_width: int
    slope: float
    width_multiplier: float
    group_width: int
    se_ratio: float = 0.0
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "RegNet")
        layers = self.layers.factories(train=train)
        table = stage_table(
            self.depth, self.initial_width, self.slope, self.width_multiplier, self.group_width
        )
        stem_strides, *strides = strides_for(self.stem, [2] * (1 + len(table)))
        x = blocks.ConvNorm(STEM_FEATURES, 3, layers, stem_strides, name="stem")(image)
        stages = [
            [
                functools.partial(
                    RegNetBlock, features, stride if index == 0 else 1, group_width, self.se_ratio
                )
                for index in range(depth)
            ]
            for (depth, features, group_width), stride in zip(table, strides, strict=True)
        ]
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        return blocks.classify(
            x,
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=nn.initializers.normal(0.01),
        )


def published(numbers: tuple[int, int, float, float, int], *sizes: int, **options: Any) -> Row:
    """Returns a row of the authors' table."""
    names = ("depth", "initial_width", "slope", "width_multiplier", "group_width")
    options |= dict(zip(names, numbers, strict=True))
    return row(RegNet, *sizes, source=TORCHVISION, **options)


x = published
y = functools.partial(published, se_ratio=0.25)

# depth, initial width, slope, multiplier, group width; parameters, running statistics,
# multiply-accumulates
ROWS = {
    "regnet_x_400mf": x((22, 24, 24.48, 2.54, 16), 5_495_976, 37_856, 413_812_608),
    "regnet_x_800mf": x((16, 56, 35.73, 2.28, 16), 7_259_656, 37_312, 799_699_712),
    "regnet_x_1_6gf": x((18, 80, 34.01, 2.25, 24), 9_190_136, 43_504, 1_602_849_792),
    "regnet_x_3_2gf": x((25, 88, 26.31, 2.25, 48), 15_296_552, 62_560, 3_176_621_952),
    "regnet_x_8gf": x((23, 80, 49.56, 2.88, 120), 39_572_648, 90_464, 7_995_132_416),
    "regnet_x_16gf": x((22, 216, 55.59, 2.1, 128), 54_278_536, 111_168, 15_940_755_456),
    "regnet_x_32gf": x((23, 320, 69.86, 2.0, 168), 107_811_560, 162_016, 31_735_929_792),
    "regnet_y_400mf": y((16, 48, 27.89, 2.09, 8), 4_344_144, 27_152, 401_842_848),
    "regnet_y_800mf": y((14, 56, 38.84, 2.4, 16), 6_432_512, 30_432, 833_856_256),
    "regnet_y_1_6gf": y((27, 48, 20.71, 2.65, 24), 11_202_430, 52_672, 1_612_076_160),
    "regnet_y_3_2gf": y((21, 80, 42.63, 2.66, 24), 19_436_338, 66_160, 3_176_482_752),
    "regnet_y_8gf": y((17, 192, 76.82, 2.19, 56), 39_381_472, 86_528, 8_473_070_592),
    "regnet_y_16gf": y((18, 200, 106.23, 2.48, 112), 83_590_140, 122_816, 15_911_510_272),
    "regnet_y_32gf": y((20, 232, 115.89, 2.53, 232), 145_046_770, 158_288, 32_279_552_832),
    # Published at 384 pixels, where those are: at 224 it has the 128 GF.
    "regnet_y_128gf": y(
        (27, 456, 160.83, 2.52, 264),
        644_812_894,
        415_072,
        374_570_006_400,
        image=(384, 384, 3),
    ),
}
# timm counts in hundreds of MFLOPs. Three of its own have other widths than torchvision's.
TIMM_NAMES = {
    **{"x_400mf": "x_004_tv", "x_800mf": "x_008", "x_1_6gf": "x_016", "x_3_2gf": "x_032"},
    **{"x_8gf": "x_080", "x_16gf": "x_160", "x_32gf": "x_320"},
    **{"y_400mf": "y_004", "y_800mf": "y_008_tv", "y_1_6gf": "y_016", "y_3_2gf": "y_032"},
    **{"y_8gf": "y_080_tv", "y_16gf": "y_160", "y_32gf": "y_320"},
}
ROWS |= also_called(
    ROWS,
    "timm",
    {f"regnet_{ours}": f"regnet{theirs}" for ours, theirs in TIMM_NAMES.items()},
)
