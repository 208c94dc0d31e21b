"""Res2Net: residual networks whose 3x3 convolutions see each other's outputs.

Gao et al. 2019, "Res2Net: A New Multi-scale Backbone Architecture" (arXiv 1904.01169), section 3.
A row's `26w_4s` says 26 channels (of the first stage) in each of 4 splits; Res2NeXt has groups. The
first block of a stage is the authors' code's: its splits are not added up, and the last is pooled.

Names: timm's `layer1.0.convs.0` and `bns.0` are `stage1/block1/split1/conv` and `norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models import blocks
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.resnet import run_in_frame, shortcut
from cnnjax.models.rows import TIMM, row


class Res2Block(nn.Module):
    """`activation(shortcut(x) + branch(x))`: 1x1, a 3x3 for each split but the last, 1x1.

    Each 3x3 takes its split plus the output of the one before (Figure 2b, equation 1).

    Attributes:
      features: channels of the output.
      width: of a split.
      splits: the paper's scale; at least 2.
      strides, groups: of the 3x3 convolutions.
      first: whether the block begins a stage.
      shortcut: see `resnet.shortcut`.
    """

    features: int
    width: int
    splits: int
    strides: int
    groups: int
    first: bool
    shortcut: str
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, strides = self.layers, self.strides
        y = layers.conv(self.width * self.splits, 1, name="conv1")(x)
        y = layers.activation(layers.norm(name="norm1")(y))
        *parts, last = jnp.split(y, self.splits, axis=-1)
        outputs: list[Array] = []
        for number, part in enumerate(parts, 1):
            if outputs and not self.first:
                part = part + outputs[-1]
            conv = blocks.ConvNorm(
                self.width, 3, layers, strides, self.groups, name=f"split{number}"
            )
            outputs.append(conv(part))
        if self.first:
            last = ops.avg_pool(last, (3, 3), (strides, strides), ((1, 1), (1, 1)))
        y = jnp.concatenate([*outputs, last], axis=-1)
        y = layers.norm(name="norm3")(layers.conv(self.features, 1, name="conv3")(y))
        x = shortcut(x, self.features, strides, layers, self.shortcut)
        return layers.activation(x + blocks.drop_branch(self, y))


class Res2Net(nn.Module):
    """Res2Net: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: number of blocks of each stage; each stage but the first halves the resolution
        and doubles the features.
      width: channels of a split in the first stage; with groups, of a group of a split.
      splits: of the channels of a block.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features, stem_widths: see `resnet.Stem`.
      features: a quarter of the channels of the first stage's output.
      groups: of the 3x3 convolutions.
      shortcut: `"projection"`, `"average"` or `"pad"`; see `resnet.shortcut`.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: fewer than two splits, a name among these is unknown, or the image is not
        four-dimensional.
    """

    stage_sizes: Sequence[int]
    width: int = 26
    splits: int = 4
    num_classes: int | None = 1000
    stem: str = "imagenet"
    stem_features: int = 64
    stem_widths: Sequence[int] = ()
    features: int = 64
    groups: int = 1
    shortcut: str = "projection"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        if self.splits < 2:
            raise UserError(f"splits is {self.splits}: Res2Net has at least 2, else it is ResNet.")
        return run_in_frame(self, image, train=train)

    def _block(self, factor: int, strides: int, index: int) -> Factory:
        return functools.partial(
            Res2Block,
            4 * self.features * factor,
            self.width * factor * self.groups,
            self.splits,
            strides,
            self.groups,
            index == 0,
            self.shortcut,
        )


timm = functools.partial(row, Res2Net, source=TIMM)
resnet50 = functools.partial(timm, stage_sizes=(3, 4, 6, 3))
resnet101 = functools.partial(timm, stage_sizes=(3, 4, 23, 3))

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "res2net50_26w_4s": resnet50(25_699_120, 59_492, 4_255_166_464),
    "res2net50_26w_6s": resnet50(37_051_448, 71_764, 6_295_523_328, splits=6),
    "res2net50_26w_8s": resnet50(48_403_776, 84_036, 8_335_880_192, splits=8),
    "res2net50_48w_2s": resnet50(25_287_304, 55_008, 4_159_832_064, width=48, splits=2),
    "res2net50_14w_8s": resnet50(25_059_816, 62_796, 4_178_898_944, width=14, splits=8),
    "res2net101_26w_4s": resnet101(45_206_688, 119_060, 8_066_974_464),
    "res2next50": resnet50(24_671_464, 64_448, 4_172_677_120, width=4, groups=8),
    "res2net50d": resnet50(
        25_718_352, 59_620, 4_494_807_040, stem_widths=(32, 32), shortcut="average"
    ),
    "res2net101d": resnet101(
        45_225_920, 119_188, 8_306_615_040, stem_widths=(32, 32), shortcut="average"
    ),
}
