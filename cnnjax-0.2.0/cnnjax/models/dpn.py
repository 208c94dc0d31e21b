"""DPN: dual path networks, a residual path and a densely connected one side by side.

Chen et al. 2017, "Dual Path Networks" (arXiv 1707.01629), Figure 2d and Table 1. As in timm, whose
weights are the authors'; its configuration asks for ELU as the last activation, but version 1.0.31
computes ReLU there, which is followed.

Names: timm's `features.conv2_1` is `stage1/block1`; its `c1x1_w_s1` (or `s2`), `c1x1_a`, `c3x3_b`
and `c1x1_c` are `shortcut`, `reduce`, `spatial` and `widen`, each with `norm` and `conv`;
`features.conv1_1` is `stem`, `features.conv5_bn_ac.bn` is `norm`, `classifier` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TIMM, Row, row


class NormConv(nn.Module):
    """Normalization, activation, convolution."""

    features: int
    kernel_size: int
    layers: Factories
    strides: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        x = layers.activation(layers.norm(name="norm")(x))
        return layers.conv(
            self.features, self.kernel_size, self.strides, groups=self.groups, name="conv"
        )(x)


class DualPathBlock(nn.Module):
    """Adds to the first `features` channels and appends `growth` ones (Figure 2d).

    Attributes:
      features: channels of the residual path.
      growth: channels that the dense path gains.
      hidden_features: of the convolutions between.
      groups, strides: of the 3x3 convolution.
      projects: whether the input is projected first, as in the first block of each stage.
    """

    features: int
    growth: int
    hidden_features: int
    groups: int
    strides: int
    projects: bool
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(NormConv, layers=self.layers)
        features, growth, hidden = self.features, self.growth, self.hidden_features
        y = conv(hidden, 1, name="reduce")(x)
        y = conv(hidden, 3, strides=self.strides, groups=self.groups, name="spatial")(y)
        y = conv(features + growth, 1, name="widen")(y)
        if self.projects:
            x = conv(features + 2 * growth, 1, strides=self.strides, name="shortcut")(x)
        added, kept = x[..., :features], x[..., features:]
        return jnp.concatenate([added + y[..., :features], kept, y[..., features:]], axis=-1)


class DPN(nn.Module):
    """DPN: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage; each but the first halves the resolution.
      growth: channels that the dense path gains in a block of each stage.
      hidden_features: between the convolutions of the first stage; doubled in each further one.
      num_classes: of the head; `None` returns the pooled features.
      features: of the first stage's residual path; doubled in each further one.
      groups: of the 3x3 convolutions.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features, stem_kernel_size: of the stem; its kernel is 3x3 with `"cifar"`.
      dropout_rate: before the head.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    growth: Sequence[int]
    hidden_features: int
    num_classes: int | None = 1000
    features: int = 256
    groups: int = 32
    stem: str = "imagenet"
    stem_features: int = 64
    stem_kernel_size: int = 7
    dropout_rate: float = 0.0
    layers: Layers = Layers(norm_epsilon=1e-3)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "DPN")
        layers = self.layers.factories(train=train)
        stem_strides, pool_strides = strides_for(self.stem, (2, 2))
        size = self.stem_kernel_size if stem_strides == 2 else 3
        x = blocks.ConvNorm(self.stem_features, size, layers, stem_strides, name="stem")(image)
        if pool_strides == 2:
            x = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        stages = [
            [
                functools.partial(
                    DualPathBlock,
                    self.features * 2**stage,
                    growth,
                    self.hidden_features * 2**stage,
                    self.groups,
                    strides=2 if stage and index == 0 else 1,
                    projects=index == 0,
                )
                for index in range(depth)
            ]
            for stage, (depth, growth) in enumerate(zip(self.stage_sizes, self.growth, strict=True))
        ]
        x = blocks.run_stages(x, stages, layers)
        x = layers.activation(layers.norm(name="norm")(x))
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


def dpn(stage_sizes: tuple[int, ...], growth: tuple[int, ...], *sizes: int, **options: Any) -> Row:
    """Returns a row of Table 1."""
    return row(DPN, *sizes, source=TIMM, stage_sizes=stage_sizes, growth=growth, **options)


# blocks, growth; parameters, running statistics, multiply-accumulates
ROWS = {
    "dpn68": dpn(
        (3, 4, 12, 3),
        (16, 32, 32, 64),
        12_611_602,
        65_116,
        2_326_163_456,
        features=64,
        hidden_features=128,
        stem_features=10,
        stem_kernel_size=3,
    ),
    "dpn92": dpn(
        (3, 4, 20, 3),
        (16, 32, 24, 128),
        37_668_392,
        125_216,
        6_501_684_224,
        hidden_features=96,
    ),
    "dpn98": dpn(
        (3, 6, 20, 3),
        (16, 32, 32, 128),
        61_570_728,
        164_896,
        11_671_217_152,
        hidden_features=160,
        groups=40,
        stem_features=96,
    ),
    "dpn131": dpn(
        (4, 8, 28, 3),
        (16, 32, 32, 128),
        79_254_504,
        223_360,
        16_013_648_896,
        hidden_features=160,
        groups=40,
        stem_features=128,
    ),
    "dpn107": dpn(
        (4, 8, 20, 3),
        (20, 64, 64, 128),
        86_917_800,
        213_824,
        18_298_764_288,
        hidden_features=200,
        groups=50,
        stem_features=128,
    ),
}
