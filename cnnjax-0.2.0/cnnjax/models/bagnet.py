"""BagNet: a ResNet-50 whose features each see a small patch of the image.

Brendel & Bethge 2019, "Approximating CNNs with Bag-of-local-Features models works surprisingly well
on ImageNet" (arXiv 1904.00760), section 3 and appendix A.1, as in the authors' code: no padding,
and a 3x3 convolution in the first block of some stages only. The logits are the means of those of
all patches of 9, 17 or 33 pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import row


class BagNetBlock(nn.Module):
    """`activation(shortcut(x) + branch(x))` without padding: the shortcut is cut below and right.

    Attributes:
      features: channels of the output; the branch has a quarter.
      kernel_size, strides: of the convolution between the 1x1 ones.
    """

    features: int
    kernel_size: int
    strides: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, width = self.layers, self.features // 4
        y = x
        for number, (features, kernel_size, strides) in enumerate(
            ((width, 1, 1), (width, self.kernel_size, self.strides), (self.features, 1, 1)), 1
        ):
            conv = layers.conv(features, kernel_size, strides, valid=True, name=f"conv{number}")
            y = layers.norm(name=f"norm{number}")(conv(y))
            y = y if number == 3 else layers.activation(y)
        if self.strides != 1 or input_width(x) != self.features:
            x = blocks.ConvNorm(
                self.features, 1, layers, self.strides, linear=True, name="downsample"
            )(x)
        x = x[:, : y.shape[1], : y.shape[2]]
        return layers.activation(x + blocks.drop_branch(self, y))


class BagNet(nn.Module):
    """BagNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages_with_3x3: the first of the stages, whose first block has a 3x3 convolution.
      stage_sizes: number of blocks of each stage.
      stage_strides: of the first block of each stage.
      num_classes: of the head; `None` returns the pooled features.
      features: channels of the stem, and a quarter of those of the first stage; each stage doubles.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: the image does not fit.
    """

    stages_with_3x3: int
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    stage_strides: Sequence[int] = (2, 2, 2, 1)
    num_classes: int | None = 1000
    features: int = 64
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @property
    def patch(self) -> int:
        """Side in pixels of the patch that a feature of the last stage sees."""
        size, step = 3, 1
        for stage, strides in enumerate(self.stage_strides):
            size += 2 * step if stage < self.stages_with_3x3 else 0
            step *= strides
        return size

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "BagNet", minimum=self.patch)
        layers = self.layers.factories(train=train)
        x = layers.conv(self.features, 1, name="stem_conv1")(image)
        x = layers.conv(self.features, 3, valid=True, name="stem_conv2")(x)
        x = layers.activation(layers.norm(name="stem_norm")(x))
        x = blocks.run_stages(
            x,
            [self._stage(stage, depth) for stage, depth in enumerate(self.stage_sizes)],
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
        )
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def _stage(self, stage: int, depth: int) -> list[Factory]:
        block = functools.partial(BagNetBlock, 4 * self.features * 2**stage)
        kernel_size = 3 if stage < self.stages_with_3x3 else 1
        first = functools.partial(block, kernel_size, self.stage_strides[stage])
        return [first, *[functools.partial(block, 1, 1)] * (depth - 1)]


bagnet = functools.partial(row, BagNet, source="the authors' network, counted")

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "bagnet9": bagnet(15_688_744, 53_120, 15_932_243_968, stages_with_3x3=2),
    "bagnet17": bagnet(16_213_032, 53_120, 15_654_502_400, stages_with_3x3=3),
    "bagnet33": bagnet(18_310_184, 53_120, 16_259_530_752, stages_with_3x3=4),
}
