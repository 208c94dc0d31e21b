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
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.blocks import Activation, Array, Factory
from cnnjax.models.layers import require_image

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
    conv: Factory
    norm: Factory
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
        conv_norm = functools.partial(
            blocks.ConvNorm, conv=self.conv, norm=self.norm, activation=self.activation
        )
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
      norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      dropout_rate: before the head.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      padding: `"symmetric"` as in PyTorch or `"same"` as in Keras: see `blocks.conv_layer`.
      axis_name: mapped axis for the statistics of batch norm; `None` outside `pmap`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Sequence[tuple[int, int, int]] = V1_STAGES
    num_classes: int | None = 1000
    width: float = 1.0
    stem: str = "imagenet"
    norm: str = "batch"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    padding: str = "symmetric"
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV1")
        layers = blocks.layers_of(self, train=train)
        stem_strides, *strides = blocks.strides_for(
            self.stem, (2, *(row[2] for row in self.stages))
        )
        scaled = functools.partial(blocks.scale_channels, width=self.width)
        x = blocks.ConvNorm(scaled(32), 3, strides=stem_strides, name="stem", **layers)(image)
        for stage, (features, depth, _) in enumerate(self.stages, 1):
            stage_blocks = [
                functools.partial(
                    DepthwiseSeparable,
                    scaled(features),
                    strides[stage - 1] if index == 0 else 1,
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
        )


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
    norm: str = "batch"
    activation: str | Activation = "relu6"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    padding: str = "symmetric"
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV2")
        layers = blocks.layers_of(self, train=train)
        stem_strides, *strides = blocks.strides_for(
            self.stem, (2, *(row[3] for row in self.stages))
        )
        rates = iter(
            blocks.stochastic_depth_rates(
                self.stochastic_depth_rate, sum(row[2] for row in self.stages)
            )
        )
        scaled = functools.partial(blocks.scale_channels, width=self.width)
        channels = scaled(32)
        x = blocks.ConvNorm(channels, 3, strides=stem_strides, name="stem", **layers)(image)
        for stage, (expansion, features, depth, _) in enumerate(self.stages, 1):
            stage_blocks = []
            for index in range(depth):
                stage_blocks.append(
                    functools.partial(
                        blocks.InvertedResidual,
                        scaled(features),
                        expansion * channels,
                        3,
                        strides[stage - 1] if index == 0 else 1,
                        stochastic_depth_rate=next(rates),
                        **layers,
                    )
                )
                channels = scaled(features)
            x = blocks.Stage(stage_blocks, self.remat, name=f"stage{stage}")(x, train=train)
        # Section 5 leaves the last convolution as wide as it is when the network is made thinner.
        last = blocks.scale_channels(self.last_features, width=max(1.0, self.width))
        x = blocks.ConvNorm(last, 1, name="last", **layers)(x)
        return blocks.classify(
            jnp.mean(x, axis=(1, 2)),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            kernel_init=normal_001,
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
    norm: str = "batch"
    activation: str | Activation = "hard_swish"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.0
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.99
    padding: str = "symmetric"
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV3")
        layers = blocks.layers_of(self, train=train)
        stem_strides, *strides = blocks.strides_for(self.stem, (2, *self.strides))
        rates = iter(
            blocks.stochastic_depth_rates(self.stochastic_depth_rate, sum(map(len, self.stages)))
        )
        scaled = functools.partial(blocks.scale_channels, width=self.width)
        x = blocks.ConvNorm(scaled(16), 3, strides=stem_strides, name="stem", **layers)(image)
        for stage, rows in enumerate(self.stages, 1):
            stage_blocks = [
                self._block(row, strides[stage - 1] if index == 0 else 1, next(rates), layers)
                for index, row in enumerate(rows)
            ]
            x = blocks.Stage(stage_blocks, self.remat, name=f"stage{stage}")(x, train=train)
        x = blocks.ConvNorm(6 * x.shape[-1], 1, name="last", **layers)(x)
        x = nn.Dense(self.dense_features, dtype=self.dtype, kernel_init=normal_001, name="dense")(
            jnp.mean(x, axis=(1, 2))
        )
        return blocks.classify(
            layers["activation"](x),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            kernel_init=normal_001,
        )

    def _block(
        self,
        row: tuple[int, int, int, bool, bool],
        strides: int,
        rate: float,
        layers: dict[str, Any],
    ) -> Factory:
        kernel_size, expanded, features, squeeze_excite, hard_swish = row
        expanded = blocks.scale_channels(expanded, width=self.width)
        return functools.partial(
            blocks.InvertedResidual,
            blocks.scale_channels(features, width=self.width),
            expanded,
            kernel_size,
            strides,
            conv=layers["conv"],
            norm=layers["norm"],
            activation=layers["activation"] if hard_swish else nn.relu,
            se_features=blocks.make_divisible(expanded // 4) if squeeze_excite else 0,
            se_gate=nn.hard_sigmoid,
            stochastic_depth_rate=rate,
        )


mobilenet_v1 = functools.partial(MobileNetV1)
mobilenet_v2 = functools.partial(MobileNetV2)
mobilenet_v3_large = functools.partial(
    MobileNetV3, stages=V3_LARGE, strides=(1, 2, 2, 2, 2), dense_features=1280
)
mobilenet_v3_small = functools.partial(
    MobileNetV3, stages=V3_SMALL, strides=(2, 2, 2, 2), dense_features=1024
)
