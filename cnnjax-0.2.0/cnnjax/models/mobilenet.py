"""MobileNet v1, v2 and v3: networks of depthwise convolutions.

- v1: Howard et al. 2017, "MobileNets" (arXiv 1704.04861), Table 1. (The table's last stride of 2 is
  a misprint: the resolution stays 7x7.)
- v2: Sandler et al. 2018, "Inverted Residuals and Linear Bottlenecks" (arXiv 1801.04381), Table 2.
- v3: Howard et al. 2019, "Searching for MobileNetV3" (arXiv 1905.02244), Tables 1 and 2, with
  torchvision's epsilon and momentum.

A stage is a row of v2's table, or the rows of one resolution of v1's and v3's. In every block the
convolutions are `expand`, `depthwise` and `project` (v1: `depthwise` and `pointwise`), each with
`conv` and `norm`: torchvision's `conv.0.0` and `conv.0.1` and so on, in this order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.rows import TORCHVISION, also_called, row

# v1: (features, blocks, stride of the first block).
V1_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))

# v2: (expansion, features, blocks, stride of the first block).
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

# v3: (kernel size, expanded features, features, squeeze-and-excite, hard swish) of each block.
V3_LARGE = (
    ((3, 16, 16, False, False),),
    ((3, 64, 24, False, False), (3, 72, 24, False, False)),
    ((5, 72, 40, True, False), (5, 120, 40, True, False), (5, 120, 40, True, False)),
    (
        (3, 240, 80, False, True),
        (3, 200, 80, False, True),
        (3, 184, 80, False, True),
        (3, 184, 80, False, True),
        (3, 480, 112, True, True),
        (3, 672, 112, True, True),
    ),
    ((5, 672, 160, True, True), (5, 960, 160, True, True), (5, 960, 160, True, True)),
)
V3_SMALL = (
    ((3, 16, 16, True, False),),
    ((3, 72, 24, False, False), (3, 88, 24, False, False)),
    (
        (5, 96, 40, True, True),
        (5, 240, 40, True, True),
        (5, 240, 40, True, True),
        (5, 120, 48, True, True),
        (5, 144, 48, True, True),
    ),
    ((5, 288, 96, True, True), (5, 576, 96, True, True), (5, 576, 96, True, True)),
)

normal_001 = nn.initializers.normal(0.01)


class DepthwiseSeparable(nn.Module):
    """3x3 convolution of each channel, then a 1x1 convolution (arXiv 1704.04861, section 3.1)."""

    features: int
    strides: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        channels = x.shape[-1]
        x = conv_norm(channels, 3, strides=self.strides, groups=channels, name="depthwise")(x)
        return conv_norm(self.features, 1, name="pointwise")(x)


class MobileNetV1(nn.Module):
    """MobileNet v1: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages: (features, blocks, stride of the first block) of each stage.
      num_classes: of the head; `None` returns the pooled features.
      width: factor of all channels (section 3.3).
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      padding: `"symmetric"` as in PyTorch or `"same"` as in Keras: see `layers.conv_layer`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Sequence[tuple[int, int, int]] = V1_STAGES
    num_classes: int | None = 1000
    width: float = 1.0
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    padding: str = "symmetric"
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV1")
        layers = self.layers.factories(train=train, padding=self.padding)
        stem_strides, *strides = strides_for(self.stem, (2, *(row[2] for row in self.stages)))
        scaled = functools.partial(blocks.scale_channels, width=self.width)
        x = blocks.ConvNorm(scaled(32), 3, layers, stem_strides, name="stem")(image)
        stages = [
            [
                functools.partial(DepthwiseSeparable, scaled(features), stride if index == 0 else 1)
                for index in range(depth)
            ]
            for (features, depth, _), stride in zip(self.stages, strides, strict=True)
        ]
        x = blocks.run_stages(x, stages, layers)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


class MobileNetV2(nn.Module):
    """MobileNet v2: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes as in `MobileNetV1`, and
      stages: (expansion, features, blocks, stride of the first block) of each stage.
      last_features: of the last convolution.
      stochastic_depth_rate: of the last block; rises linearly from 0.
    """

    stages: Sequence[tuple[int, int, int, int]] = V2_STAGES
    last_features: int = 1280
    num_classes: int | None = 1000
    width: float = 1.0
    stem: str = "imagenet"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.0
    padding: str = "symmetric"
    layers: Layers = Layers(activation="relu6")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV2")
        layers = self.layers.factories(train=train, padding=self.padding)
        stem_strides, *strides = strides_for(self.stem, (2, *(row[3] for row in self.stages)))
        scaled = functools.partial(blocks.scale_channels, width=self.width)
        channels = scaled(32)
        x = blocks.ConvNorm(channels, 3, layers, stem_strides, name="stem")(image)
        stages: list[list[Factory]] = []
        for (expansion, features, depth, _), stride in zip(self.stages, strides, strict=True):
            stages.append([])
            for index in range(depth):
                block = functools.partial(
                    blocks.InvertedResidual,
                    scaled(features),
                    expansion * channels,
                    3,
                    stride if index == 0 else 1,
                )
                stages[-1].append(block)
                channels = scaled(features)
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        # Section 5 leaves the last convolution as wide as it is when the network is made thinner.
        last = blocks.scale_channels(self.last_features, width=max(1.0, self.width))
        x = blocks.ConvNorm(last, 1, layers, name="last")(x)
        return blocks.classify(
            x, self.num_classes, layers, dropout_rate=self.dropout_rate, kernel_init=normal_001
        )


class MobileNetV3(nn.Module):
    """MobileNet v3: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes as in `MobileNetV1`, and
      stages: the rows of `V3_LARGE` or `V3_SMALL`.
      strides: of the first block of each stage.
      dense_features: of the layer before the head.
      width: factor of all channels.
      activation: of the stem, of the rows marked so, and of the layers before the head; the other
        rows have ReLU.
      stochastic_depth_rate: of the last block; rises linearly from 0.
    """

    stages: Sequence[Sequence[tuple[int, int, int, bool, bool]]]
    strides: Sequence[int]
    dense_features: int
    num_classes: int | None = 1000
    width: float = 1.0
    stem: str = "imagenet"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.0
    padding: str = "symmetric"
    layers: Layers = Layers(activation="hard_swish", norm_epsilon=1e-3, norm_momentum=0.99)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV3")
        layers = self.layers.factories(train=train, padding=self.padding)
        stem_strides, *strides = strides_for(self.stem, (2, *self.strides))
        x = blocks.ConvNorm(
            blocks.scale_channels(16, width=self.width), 3, layers, stem_strides, name="stem"
        )(image)
        stages = [
            [self._block(row, stride if index == 0 else 1) for index, row in enumerate(rows)]
            for rows, stride in zip(self.stages, strides, strict=True)
        ]
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        x = blocks.ConvNorm(6 * x.shape[-1], 1, layers, name="last")(x)
        dense = nn.Dense(
            self.dense_features, dtype=layers.dtype, kernel_init=normal_001, name="dense"
        )
        return blocks.classify(
            layers.activation(dense(jnp.mean(x, axis=(1, 2)))),
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=normal_001,
        )

    def _block(self, row: tuple[int, int, int, bool, bool], strides: int) -> Factory:
        kernel_size, expanded, features, squeeze_excite, hard_swish = row
        expanded = blocks.scale_channels(expanded, width=self.width)
        return functools.partial(
            blocks.InvertedResidual,
            blocks.scale_channels(features, width=self.width),
            expanded,
            kernel_size,
            strides,
            activation=None if hard_swish else nn.relu,
            se_features=blocks.make_divisible(expanded // 4) if squeeze_excite else 0,
            se_gate=nn.hard_sigmoid,
        )


v3 = functools.partial(row, MobileNetV3, source=TORCHVISION)
large = functools.partial(v3, stages=V3_LARGE, strides=(1, 2, 2, 2, 2))
small = functools.partial(v3, stages=V3_SMALL, strides=(2, 2, 2, 2))
COUNTED = "counted; 4.2 M and 569 M in Table 8"

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "mobilenet_v1": row(
        MobileNetV1,
        4_231_976,
        21_888,
        568_740_352,
        source=COUNTED,
        also={"timm": "mobilenetv1_100"},
    ),
    "mobilenet_v2": row(
        MobileNetV2,
        3_504_872,
        34_112,
        300_774_272,
        source=TORCHVISION,
        also={"timm": "mobilenetv2_100"},
    ),
    "mobilenet_v3_large": large(
        5_483_032,
        24_400,
        216_589_760,
        dense_features=1280,
        also={"timm": "mobilenetv3_large_100"},
    ),
    "mobilenet_v3_small": small(
        2_542_856,
        12_112,
        56_510_400,
        dense_features=1024,
        also={"timm": "mobilenetv3_small_100"},
    ),
}
KERAS = {
    "mobilenet_v1": "MobileNet",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_large": "MobileNetV3Large",
    "mobilenet_v3_small": "MobileNetV3Small",
}
TIMM_NAMES = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
}
ROWS |= also_called(ROWS, "keras", KERAS)
ROWS |= also_called(ROWS, "timm", TIMM_NAMES)
