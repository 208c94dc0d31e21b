"""RegNet: bottlenecks whose widths follow a quantised linear function of depth.

Radosavovic et al. 2020, "Designing Network Design Spaces" (arXiv 2003.13678): X in section 4, Y
(with squeeze-and-excite) in section 5. Four numbers and a group width define a network.

Names: torchvision's `trunk_output.block2.block2-0` is `stage2/block1`; its `f.a`, `f.b`, `f.c` and
`proj` are `conv1`, `conv2`, `conv3` and `downsample`, each with `conv` and `norm`; `f.se` is `se`,
`fc` is `head`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.blocks import Activation, Array, Factory
from cnnjax.models.layers import require_image

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
    quantised = np.round(initial_width * width_multiplier**exponents / 8).astype(int) * 8
    widths, depths = np.unique(quantised, return_counts=True)
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
    conv: Factory
    norm: Factory
    activation: Activation
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv_norm = functools.partial(
            blocks.ConvNorm, self.features, conv=self.conv, norm=self.norm
        )
        groups = self.features // self.group_width
        y = conv_norm(1, activation=self.activation, name="conv1")(x)
        y = conv_norm(
            3, strides=self.strides, groups=groups, activation=self.activation, name="conv2"
        )(y)
        if self.se_ratio:
            # The gate's width follows the block's input (torchvision; the authors' code).
            y = blocks.SqueezeExcite(
                round(self.se_ratio * x.shape[-1]), self.conv, self.activation, name="se"
            )(y)
        y = conv_norm(1, activation=None, name="conv3")(y)
        if self.strides != 1 or x.shape[-1] != self.features:
            x = conv_norm(1, strides=self.strides, activation=None, name="downsample")(x)
        y = blocks.StochasticDepth(self.stochastic_depth_rate, name="drop")(y, train=train)
        return self.activation(x + y)


class RegNet(nn.Module):
    """RegNet X or Y: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      depth, initial_width, slope, width_multiplier, group_width: the network; see `stage_table`.
      se_ratio: channels inside the gate per channel of the block's input; 0 for X, 0.25 for Y.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: mapped axis for the statistics of batch norm; `None` outside `pmap`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

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
    norm: str = "batch"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "RegNet")
        layers = blocks.layers_of(self, train=train)
        table = stage_table(
            self.depth, self.initial_width, self.slope, self.width_multiplier, self.group_width
        )
        stem_strides, *strides = blocks.strides_for(self.stem, [2] * (1 + len(table)))
        rates = iter(blocks.stochastic_depth_rates(self.stochastic_depth_rate, self.depth))
        x = blocks.ConvNorm(STEM_FEATURES, 3, strides=stem_strides, name="stem", **layers)(image)
        for stage, (depth, features, group_width) in enumerate(table, 1):
            stage_blocks = [
                functools.partial(
                    RegNetBlock,
                    features,
                    strides[stage - 1] if index == 0 else 1,
                    group_width,
                    self.se_ratio,
                    stochastic_depth_rate=next(rates),
                    **layers,
                )
                for index in range(depth)
            ]
            x = blocks.Stage(stage_blocks, self.remat, name=f"stage{stage}")(x, train=train)
        return blocks.classify(
            jnp.mean(x, axis=(1, 2)),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.01),
        )


def _x(*numbers: Any) -> functools.partial[RegNet]:
    names = ("depth", "initial_width", "slope", "width_multiplier", "group_width")
    return functools.partial(RegNet, **dict(zip(names, numbers, strict=True)))


def _y(*numbers: Any) -> functools.partial[RegNet]:
    return functools.partial(_x(*numbers), se_ratio=0.25)


# The authors' published configurations: depth, initial width, slope, multiplier, group width.
regnet_x_400mf = _x(22, 24, 24.48, 2.54, 16)
regnet_x_800mf = _x(16, 56, 35.73, 2.28, 16)
regnet_x_1_6gf = _x(18, 80, 34.01, 2.25, 24)
regnet_x_3_2gf = _x(25, 88, 26.31, 2.25, 48)
regnet_x_8gf = _x(23, 80, 49.56, 2.88, 120)
regnet_x_16gf = _x(22, 216, 55.59, 2.1, 128)
regnet_x_32gf = _x(23, 320, 69.86, 2.0, 168)

regnet_y_400mf = _y(16, 48, 27.89, 2.09, 8)
regnet_y_800mf = _y(14, 56, 38.84, 2.4, 16)
regnet_y_1_6gf = _y(27, 48, 20.71, 2.65, 24)
regnet_y_3_2gf = _y(21, 80, 42.63, 2.66, 24)
regnet_y_8gf = _y(17, 192, 76.82, 2.19, 56)
regnet_y_16gf = _y(18, 200, 106.23, 2.48, 112)
regnet_y_32gf = _y(20, 232, 115.89, 2.53, 232)
