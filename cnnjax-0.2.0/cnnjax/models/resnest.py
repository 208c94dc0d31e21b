"""ResNeSt: residual networks with attention over splits of the channels.

Zhang et al. 2020, "ResNeSt: Split-Attention Networks" (arXiv 2004.08955), section 3: ResNet-D whose
3x3 convolution is a `SplitAttention`, and whose strides are average pools (section 4.1). d and e
are stems of 64 and 128 channels. `4s2x40d` has radix 4, cardinality 2, 40 channels a group.

Names: timm's `layer1.0.conv2` is `stage1/block1/conv2`, in which `bn0` is `norm` and `bn1` is
`fc_norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.resnet import run_in_frame, shortcut
from cnnjax.models.rows import TIMM, row

# Fewer channels are not inside a gate.
MINIMUM_GATE = 32


class SplitAttention(nn.Module):
    """A 3x3 convolution to `radix` times the channels; then a weighted sum of the `radix` splits.

    The weights of each channel are a softmax over the splits (a sigmoid where there is one), by two
    1x1 convolutions of the means of their sum; all is grouped (Figure 2, and algorithm 1's layout).
    """

    features: int
    layers: Factories
    radix: int
    groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, radix, groups, features = self.layers, self.radix, self.groups, self.features
        width = blocks.make_divisible(max(MINIMUM_GATE, x.shape[-1] * radix / 4))
        conv = layers.conv(features * radix, 3, groups=groups * radix, name="conv")
        x = layers.activation(layers.norm(name="norm")(conv(x)))
        splits = x.reshape(*x.shape[:-1], radix, features)
        means = jnp.mean(jnp.sum(splits, axis=3), axis=(1, 2), keepdims=True)
        grouped = functools.partial(layers.conv, groups=groups, use_bias=True)
        hidden = layers.norm(name="fc_norm")(grouped(width, 1, name="fc1")(means))
        gates = grouped(features * radix, 1, name="fc2")(layers.activation(hidden))
        if radix == 1:
            return x * nn.sigmoid(gates)
        # The convolution's channels are sorted by group, the splits by radix.
        gates = gates.reshape(-1, groups, radix, features // groups).swapaxes(1, 2)
        gates = nn.softmax(gates, axis=1).reshape(-1, 1, 1, radix, features)
        return jnp.sum(splits * gates, axis=3)


class SplitAttentionBlock(nn.Module):
    """`activation(shortcut(x) + branch(x))`: 1x1, split attention, 1x1; an average pool halves.

    Attributes:
      features: channels of the output.
      width: of the convolutions between.
      strides: of the 3x3 average pool.
      pool_first: whether it stands before the split attention.
      radix, groups: see `SplitAttention`.
      shortcut: see `resnet.shortcut`.
    """

    features: int
    width: int
    strides: int
    pool_first: bool
    radix: int
    groups: int
    shortcut: str
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        y = layers.conv(self.width, 1, name="conv1")(x)
        y = layers.activation(layers.norm(name="norm1")(y))
        y = self._halved(y, here=self.pool_first)
        y = SplitAttention(self.width, layers, self.radix, self.groups, name="conv2")(y)
        y = self._halved(y, here=not self.pool_first)
        y = layers.norm(name="norm3")(layers.conv(self.features, 1, name="conv3")(y))
        x = shortcut(x, self.features, self.strides, layers, self.shortcut)
        return layers.activation(x + blocks.drop_branch(self, y))

    def _halved(self, y: Array, *, here: bool) -> Array:
        if self.strides == 1 or not here:
            return y
        return ops.avg_pool(y, (3, 3), (self.strides, self.strides), ((1, 1), (1, 1)))


class ResNeSt(nn.Module):
    """ResNeSt: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: number of blocks of each stage; each stage but the first halves the resolution
        and doubles the features.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features, stem_widths: see `resnet.Stem`.
      features: width of the first stage; a block's output is four times as wide.
      radix: splits of each group.
      groups: the cardinality.
      width_per_group: as in `resnet.bottleneck_branch`.
      pool_first: whether a block's average pool stands before its 3x3 convolution.
      shortcut: `"average"`, `"projection"` or `"pad"`; see `resnet.shortcut`.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image is not four-dimensional.
    """

    stage_sizes: Sequence[int]
    num_classes: int | None = 1000
    stem: str = "imagenet"
    stem_features: int = 64
    stem_widths: Sequence[int] = (32, 32)
    features: int = 64
    radix: int = 2
    groups: int = 1
    width_per_group: int = 64
    pool_first: bool = False
    shortcut: str = "average"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        return run_in_frame(self, image, train=train)

    def _block(self, factor: int, strides: int, index: int) -> Factory:
        del index
        features = self.features * factor
        return functools.partial(
            SplitAttentionBlock,
            4 * features,
            int(features * self.width_per_group / 64) * self.groups,
            strides,
            self.pool_first,
            self.radix,
            self.groups,
            self.shortcut,
        )


timm = functools.partial(row, ResNeSt, source=TIMM)
e = functools.partial(timm, stem_features=128, stem_widths=(64, 64))
resnet50 = functools.partial(timm, stage_sizes=(3, 4, 6, 3))

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "resnest14d": timm(10_611_688, 22_336, 2_749_405_184, stage_sizes=(1, 1, 1, 1)),
    "resnest26d": timm(17_069_448, 36_736, 3_623_391_232, stage_sizes=(2, 2, 2, 2)),
    "resnest50d": resnet50(27_483_240, 64_576, 5_371_160_576),
    "resnest50d_1s4x24d": resnet50(
        25_677_000, 63_680, 4_399_827_456, radix=1, groups=4, width_per_group=24, pool_first=True
    ),
    "resnest50d_4s2x40d": resnet50(
        30_417_592, 94_784, 4_369_060_736, radix=4, groups=2, width_per_group=40, pool_first=True
    ),
    "resnest101e": e(
        48_275_016, 130_112, 13_321_472_000, image=(256, 256, 3), stage_sizes=(3, 4, 23, 3)
    ),
    "resnest200e": e(
        70_201_544, 218_432, 35_519_694_848, image=(320, 320, 3), stage_sizes=(3, 24, 36, 3)
    ),
    "resnest269e": e(
        110_929_480, 314_432, 77_348_702_208, image=(416, 416, 3), stage_sizes=(3, 30, 48, 8)
    ),
}
