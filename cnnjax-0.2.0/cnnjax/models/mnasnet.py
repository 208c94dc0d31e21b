"""MNASNet: inverted residuals whose kernels and depths were found by search.

Tan et al. 2019, "MnasNet: Platform-Aware Neural Architecture Search for Mobile" (arXiv 1807.11626),
Table 2: the network without gates, which the authors' code calls B1. As in torchvision, all layers
but the last convolution are scaled by the width, and running statistics move by 0.0003 a step.

Names: torchvision's `layers.8.0.layers.0`, `.3` and `.6` are `stage2/block1/expand/conv`,
`depthwise/conv` and `project/conv`, the norm behind each is the next; `layers.0` is `stem/conv`,
`layers.14` is `last/conv`, `classifier.1` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factory, Layers
from cnnjax.models.rows import TORCHVISION, row

# (expansion, kernel size, stride, features, blocks) of each stage.
STAGES = (
    (1, 3, 1, 16, 1),
    (3, 3, 2, 24, 3),
    (3, 5, 2, 40, 3),
    (6, 5, 2, 80, 3),
    (6, 3, 1, 96, 2),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class MNASNet(nn.Module):
    """MNASNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages: (expansion, kernel size, stride, features, blocks) of each stage, before scaling.
      last_features: of the last convolution.
      num_classes: of the head; `None` returns the pooled features.
      width: factor of all channels, which are then made divisible by 8.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      padding: `"symmetric"` as in PyTorch or `"same"` as in TensorFlow: see `layers.conv_layer`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Sequence[tuple[int, int, int, int, int]] = STAGES
    last_features: int = 1280
    num_classes: int | None = 1000
    width: float = 1.0
    stem: str = "imagenet"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.0
    padding: str = "symmetric"
    layers: Layers = Layers(norm_momentum=0.9997)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MNASNet")
        layers = self.layers.factories(train=train, padding=self.padding)
        stem_strides, *strides = strides_for(self.stem, (2, *(row[2] for row in self.stages)))
        channels = blocks.scale_channels(32, width=self.width)
        x = blocks.ConvNorm(channels, 3, layers, stem_strides, name="stem")(image)
        stages: list[list[Factory]] = []
        for numbers, stride in zip(self.stages, strides, strict=True):
            expansion, kernel_size, _, features, depth = numbers
            features = blocks.scale_channels(features, width=self.width)
            stages.append([])
            for index in range(depth):
                block = functools.partial(
                    blocks.InvertedResidual,
                    features,
                    expansion * channels,
                    kernel_size,
                    stride if index == 0 else 1,
                )
                stages[-1].append(block)
                channels = features
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        x = blocks.ConvNorm(self.last_features, 1, layers, name="last")(x)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


published = functools.partial(row, MNASNet, source=TORCHVISION)

# parameters, running statistics, multiply-accumulates
ROWS = {
    "mnasnet0_5": published(
        2_218_512, 20_624, 104_455_968, width=0.5, also={"timm": "mnasnet_050"}
    ),
    "mnasnet0_75": published(
        3_170_208, 29_808, 215_493_104, width=0.75, also={"timm": "mnasnet_075"}
    ),
    "mnasnet1_0": published(
        4_383_312, 37_920, 314_415_872, width=1.0, also={"timm": "mnasnet_100"}
    ),
    "mnasnet1_3": published(6_282_256, 48_816, 526_362_432, width=1.3),
}
