"""EfficientNet B0 to B7: inverted residuals with gates, depth and width scaled together.

Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (arXiv
1905.11946), Table 1 for B0. The factors of B1 to B7 and their dropout rates are those of the
authors' code; so are the epsilon and momentum of B5 to B7, while B0 to B4 have PyTorch's, as in
torchvision, whose published weights were trained so.

Names: torchvision's `features.2.0.block.1.0` is `stage2/block1/depthwise/conv`; a block's parts
are `expand`, `depthwise`, `se` and `project`; `features.0` is `stem`, `features.8` is `last`,
`classifier.1` is `head`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.blocks import Activation, Array
from cnnjax.models.layers import require_image

# (expansion, kernel size, stride, features, blocks) of each stage of B0.
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class EfficientNet(nn.Module):
    """EfficientNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages: (expansion, kernel size, stride, features, blocks) of each stage, before scaling.
      num_classes: of the head; `None` returns the pooled features.
      width: factor of all channels, which are then made divisible by 8.
      depth: factor of the number of blocks of each stage, rounded up.
      stem: `"imagenet"` for images of 224 pixels and more, `"cifar"` for 28 to 64 pixels.
      norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      padding: `"symmetric"` as in PyTorch or `"same"` as in Keras: see `blocks.conv_layer`.
      axis_name: mapped axis for the statistics of batch norm; `None` outside `pmap`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Sequence[tuple[int, int, int, int, int]] = STAGES
    num_classes: int | None = 1000
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    norm: str = "batch"
    activation: str | Activation = "silu"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.2
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    padding: str = "symmetric"
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "EfficientNet")
        layers = blocks.layers_of(self, train=train)
        stem_strides, *strides = blocks.strides_for(
            self.stem, (2, *(row[2] for row in self.stages))
        )
        depths = [math.ceil(row[4] * self.depth) for row in self.stages]
        rates = iter(blocks.stochastic_depth_rates(self.stochastic_depth_rate, sum(depths)))
        channels = blocks.scale_channels(32, width=self.width)
        x = blocks.ConvNorm(channels, 3, strides=stem_strides, name="stem", **layers)(image)
        for stage, (expansion, kernel_size, _, features, _) in enumerate(self.stages, 1):
            features = blocks.scale_channels(features, width=self.width)
            stage_blocks = []
            for index in range(depths[stage - 1]):
                stage_blocks.append(
                    functools.partial(
                        blocks.InvertedResidual,
                        features,
                        expansion * channels,
                        kernel_size,
                        strides[stage - 1] if index == 0 else 1,
                        # A quarter of the block's input, not of the expanded channels.
                        se_features=max(1, channels // 4),
                        se_activation=layers["activation"],
                        stochastic_depth_rate=next(rates),
                        **layers,
                    )
                )
                channels = features
            x = blocks.Stage(stage_blocks, self.remat, name=f"stage{stage}")(x, train=train)
        x = blocks.ConvNorm(4 * channels, 1, name="last", **layers)(x)
        return blocks.classify(
            jnp.mean(x, axis=(1, 2)),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )


_large = functools.partial(EfficientNet, norm_epsilon=1e-3, norm_momentum=0.99)

efficientnet_b0 = functools.partial(EfficientNet, width=1.0, depth=1.0, dropout_rate=0.2)
efficientnet_b1 = functools.partial(EfficientNet, width=1.0, depth=1.1, dropout_rate=0.2)
efficientnet_b2 = functools.partial(EfficientNet, width=1.1, depth=1.2, dropout_rate=0.3)
efficientnet_b3 = functools.partial(EfficientNet, width=1.2, depth=1.4, dropout_rate=0.3)
efficientnet_b4 = functools.partial(EfficientNet, width=1.4, depth=1.8, dropout_rate=0.4)
efficientnet_b5 = functools.partial(_large, width=1.6, depth=2.2, dropout_rate=0.4)
efficientnet_b6 = functools.partial(_large, width=1.8, depth=2.6, dropout_rate=0.5)
efficientnet_b7 = functools.partial(_large, width=2.0, depth=3.1, dropout_rate=0.5)
