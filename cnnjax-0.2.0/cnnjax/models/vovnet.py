"""VoVNet v1 and v2: one-shot aggregation, all layers of a block gathered once at its end.

- v1: Lee et al. 2019, "An Energy and GPU-Computation Efficient Backbone Network for Real-Time
  Object Detection" (arXiv 1904.09730): 39 and 57.
- v2: Lee & Park 2019, "CenterMask" (arXiv 1911.06667), section 3.3: shortcuts around blocks, and
  the effective squeeze-and-excite gate, one dense layer, in the last block of each stage (timm's
  names begin with `ese`).

As in timm: a shortcut stands around each block of a stage but the first.

Names: timm's `stages.1.blocks.0.conv_mid.0` is `stage2/block1/conv1`; `conv_reduction`,
`conv_concat` and `attn.fc` are `reduce`, `merge` and `gate`; `stem.0` is `stem/conv1`;
`head.fc` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import max_pool_ceil, require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import TIMM, row


class SeparableConvNorm(nn.Module):
    """3x3 convolution of each channel, 1x1 convolution, normalization, activation."""

    features: int
    layers: Factories
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, channels = self.layers, x.shape[-1]
        x = layers.conv(channels, 3, self.strides, groups=channels, name="depthwise")(x)
        x = layers.conv(self.features, 1, name="conv")(x)
        return layers.activation(layers.norm(name="norm")(x))


class AggregationBlock(nn.Module):
    """Convolutions one behind the other; a 1x1 convolution of the input and all of them.

    Attributes:
      features: of the output.
      hidden_features: of each convolution.
      depth: how many there are.
      depthwise: whether they are separable; then a 1x1 convolution first narrows the input.
      residual: whether the input is added.
      gated: whether the output is gated.
      pools: whether the input's resolution is halved by a max pool.
    """

    features: int
    hidden_features: int
    depth: int
    depthwise: bool
    residual: bool
    gated: bool
    pools: bool
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, hidden = self.layers, self.hidden_features
        conv_norm = functools.partial(blocks.ConvNorm, layers=layers)
        if self.pools:
            x = max_pool_ceil(x, 3, 2)
        gathered, y = [x], x
        if self.depthwise and input_width(x) != hidden:
            y = conv_norm(hidden, 1, name="reduce")(x)
        for number in range(1, self.depth + 1):
            if self.depthwise:
                y = SeparableConvNorm(hidden, layers, name=f"conv{number}")(y)
            else:
                y = conv_norm(hidden, 3, name=f"conv{number}")(y)
            gathered.append(y)
        y = conv_norm(self.features, 1, name="merge")(jnp.concatenate(gathered, axis=-1))
        if self.gated:
            means = jnp.mean(y, axis=(1, 2), keepdims=True)
            gates = layers.conv(self.features, 1, use_bias=True, name="gate")(means)
            y = y * nn.hard_sigmoid(gates)
        y = blocks.drop_branch(self, y)
        return x + y if self.residual else y


class Stem(nn.Module):
    """Three 3x3 convolutions, the first and the last at stride 2; `"cifar"`: all at stride 1."""

    kind: str
    features: Sequence[int]
    depthwise: bool
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        first, _, last = strides_for(self.kind, (2, 1, 2))
        layers = self.layers
        x = blocks.ConvNorm(self.features[0], 3, layers, first, name="conv1")(image)
        for number, strides in ((2, 1), (3, last)):
            features, name = self.features[number - 1], f"conv{number}"
            if self.depthwise:
                x = SeparableConvNorm(features, layers, strides, name=name)(x)
            else:
                x = blocks.ConvNorm(features, 3, layers, strides, name=name)(x)
        return x


class VoVNet(nn.Module):
    """VoVNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage; each stage but the first halves the resolution.
      depth: convolutions that a block gathers.
      num_classes: of the head; `None` returns the pooled features.
      stage_features: channels of each stage.
      hidden_features: channels of the convolutions of each stage's blocks.
      effective: whether blocks have shortcuts and gates (v2).
      depthwise: whether convolutions are separable.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features: channels of the stem's convolutions.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    depth: int = 5
    num_classes: int | None = 1000
    stage_features: Sequence[int] = (256, 512, 768, 1024)
    hidden_features: Sequence[int] = (128, 160, 192, 224)
    effective: bool = True
    depthwise: bool = False
    stem: str = "imagenet"
    stem_features: Sequence[int] = (64, 64, 128)
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "VoVNet")
        layers = self.layers.factories(train=train)
        x = Stem(self.stem, self.stem_features, self.depthwise, layers, name="stem")(image)
        stages = [
            [
                functools.partial(
                    AggregationBlock,
                    features,
                    hidden,
                    self.depth,
                    self.depthwise,
                    residual=self.effective and index > 0,
                    gated=self.effective and index == size - 1,
                    pools=stage > 0 and index == 0,
                )
                for index in range(size)
            ]
            for stage, (size, features, hidden) in enumerate(
                zip(self.stage_sizes, self.stage_features, self.hidden_features, strict=True)
            )
        ]
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


vovnet = functools.partial(row, VoVNet, source=TIMM)

# parameters, running statistics, multiply-accumulates
ROWS = {
    "vovnet39a": vovnet(
        22_600_296, 20_416, 7_072_227_328, stage_sizes=(1, 1, 2, 2), effective=False
    ),
    "vovnet57a": vovnet(
        36_640_296, 31_616, 8_930_144_256, stage_sizes=(1, 1, 4, 3), effective=False
    ),
    "ese_vovnet19b_dw": vovnet(
        6_543_080,
        11_136,
        1_333_489_824,
        stage_sizes=(1, 1, 1, 1),
        depth=3,
        depthwise=True,
        stem_features=(64, 64, 64),
    ),
    "ese_vovnet39b": vovnet(24_568_936, 20_416, 7_074_193_408, stage_sizes=(1, 1, 2, 2)),
}
