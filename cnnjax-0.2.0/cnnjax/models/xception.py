"""Xception: residual blocks of separable convolutions.

Chollet 2017, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv 1610.02357),
Figure 5. Padding is symmetric at every stride, as in timm's `legacy_xception`; no activation stands
between the two parts of a separable convolution (section 4.7).

Names: timm's `block1` to `block12` are the blocks of the stages in their order; in them `skip` and
`skipbn` are `downsample`, and the convolutions and norms of `rep` are numbered.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import TIMM, row


class SeparableConv(nn.Module):
    """A 3x3 convolution of each channel, then a 1x1 convolution; neither normalized."""

    features: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        x = self.layers.conv(channels, 3, groups=channels, name="depthwise")(x)
        return self.layers.conv(self.features, 1, name="pointwise")(x)


class XceptionBlock(nn.Module):
    """`shortcut(x) + branch(x)`; each separable convolution stands behind an activation.

    Attributes:
      widths: channels of the convolutions.
      strides: of the 3x3 max pool behind them; 1 for none.
      activate_first: whether an activation stands before the first convolution, too.
    """

    widths: Sequence[int]
    strides: int
    activate_first: bool
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, features = self.layers, self.widths[-1]
        y = x
        for number, width in enumerate(self.widths, 1):
            if number > 1 or self.activate_first:
                y = layers.activation(y)
            y = SeparableConv(width, layers, name=f"separable{number}")(y)
            y = layers.norm(name=f"norm{number}")(y)
        if self.strides != 1:
            y = ops.max_pool(y, (3, 3), (self.strides, self.strides), ((1, 1), (1, 1)))
        if self.strides != 1 or input_width(x) != features:
            conv_norm = functools.partial(blocks.ConvNorm, linear=True, name="downsample")
            x = conv_norm(features, 1, layers, self.strides)(x)
        return x + blocks.drop_branch(self, y)


class Xception(nn.Module):
    """Xception: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      entry_features: channels of the first blocks, each of which halves the resolution; the last
        one's go through the middle flow.
      middle_blocks: number of blocks of three convolutions.
      exit_features: of the last block, which halves the resolution, and the two convolutions
        behind it.
      num_classes: of the head; `None` returns the pooled features.
      dropout_rate: before the head; the paper's is 0.5 (section 4.2).
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: the image does not fit.
    """

    entry_features: Sequence[int] = (128, 256, 728)
    middle_blocks: int = 8
    exit_features: Sequence[int] = (1024, 1536, 2048)
    num_classes: int | None = 1000
    dropout_rate: float = 0.5
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "Xception", minimum=32)
        layers = self.layers.factories(train=train)
        x = blocks.ConvNorm(32, 3, layers, 2, valid=True, name="stem1")(image)
        x = blocks.ConvNorm(64, 3, layers, valid=True, name="stem2")(x)
        x = blocks.run_stages(
            x, self._stages(), layers, stochastic_depth_rate=self.stochastic_depth_rate
        )
        for number, features in enumerate(self.exit_features[1:], 1):
            x = SeparableConv(features, layers, name=f"last{number}")(x)
            x = layers.activation(layers.norm(name=f"last_norm{number}")(x))
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def _stages(self) -> list[list[Factory]]:
        width = self.entry_features[-1]
        stages: list[list[Factory]] = [
            [functools.partial(XceptionBlock, (features, features), 2, number > 0)]
            for number, features in enumerate(self.entry_features)
        ]
        middle = functools.partial(XceptionBlock, (width,) * 3, 1, True)
        stages[-1] += [middle] * self.middle_blocks
        last = functools.partial(XceptionBlock, (width, self.exit_features[0]), 2, True)
        return [*stages, [last]]


ROWS = {
    "xception": row(
        Xception,
        22_855_952,
        54_528,
        8_357_403_496,
        source=TIMM,
        image=(299, 299, 3),
        also={"timm": "legacy_xception"},
    ),
}
