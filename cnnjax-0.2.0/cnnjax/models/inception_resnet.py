"""Inception-ResNet v2: Inception modules with residual connections.

Szegedy et al. 2017, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
Learning" (arXiv 1602.07261), section 3.2 and Figures 15 to 19, in the released form, which timm and
Keras have: its stem is Inception v3's, and it has more blocks than the paper's. A branch is scaled
down before it is added (section 3.3).

Names: timm's `repeat.0` is `block35_1`, `repeat_1.0` `block17_1`, `repeat_2.0` `block8_1` and its
`block8` `block8_10`; `branch1.0` is `branch1_0`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import linen as nn

from cnnjax import ops
from cnnjax.models.blocks import ConvNorm, call_block, classify
from cnnjax.models.images import require_image
from cnnjax.models.inception_v4 import MAXIMUM, MEAN, Branch, Branches, Unit
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TIMM, row
from cnnjax.models.stages import stage_output

MIXED_5B = (
    (Unit(96, 1),),
    (Unit(48, 1), Unit(64, 5)),
    (Unit(64, 1), Unit(96, 3), Unit(96, 3)),
    (MEAN, Unit(64, 1)),
)
BLOCK_35 = ((Unit(32, 1),), (Unit(32, 1), Unit(32, 3)), (Unit(32, 1), Unit(48, 3), Unit(64, 3)))
MIXED_6A = ((Unit(384, 3, 2),), (Unit(256, 1), Unit(256, 3), Unit(384, 3, 2)), (MAXIMUM,))
BLOCK_17 = ((Unit(192, 1),), (Unit(128, 1), Unit(160, (1, 7)), Unit(192, (7, 1))))
MIXED_7A = (
    (Unit(256, 1), Unit(384, 3, 2)),
    (Unit(256, 1), Unit(288, 3, 2)),
    (Unit(256, 1), Unit(288, 3), Unit(320, 3, 2)),
    (MAXIMUM,),
)
BLOCK_8 = ((Unit(192, 1),), (Unit(192, 1), Unit(224, (1, 3)), Unit(256, (3, 1))))


class ResidualBranches(nn.Module):
    """`activation(x + scale * conv(branches(x)))`; the 1x1 convolution has a bias and no norm.

    Attributes:
      branches: see `Branches`.
      scale: of the branches.
      linear: whether the activation is left out.
    """

    branches: Sequence[Branch]
    scale: float
    layers: Factories
    linear: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Branches(self.branches, self.layers, name="branches")(x)
        y = self.layers.conv(x.shape[-1], 1, use_bias=True, name="conv")(y)
        x = x + self.scale * y
        return x if self.linear else self.layers.activation(x)


class InceptionResNetV2(nn.Module):
    """Inception-ResNet v2: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      num_classes: of the head; `None` returns the 1,536 features before it.
      dropout_rate: before the head; the paper keeps 0.8 (Figure 15).
      layers: what all layers share; see `Layers`.

    Images are at least 75x75; it was published for 299x299.
    """

    num_classes: int | None = 1000
    dropout_rate: float = 0.2
    layers: Layers = Layers(norm_epsilon=1e-3)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "InceptionResNetV2", minimum=75)
        layers = self.layers.factories(train=train)

        def module(branches: Sequence[Branch], x: Array, name: str) -> Array:
            return call_block(Branches(branches, layers, name=name), x, layers)

        def residual(
            branches: Sequence[Branch], scale: float, x: Array, name: str, *, linear: bool = False
        ) -> Array:
            block = ResidualBranches(branches, scale, layers, linear, name=name)
            return ops.computed_once_both_ways(call_block(block, x, layers))

        unit = functools.partial(ConvNorm, layers=layers)
        x = unit(32, 3, strides=2, valid=True, name="conv2d_1a")(image)
        x = unit(32, 3, valid=True, name="conv2d_2a")(x)
        x = stage_output(self, "stage1", unit(64, 3, name="conv2d_2b")(x))
        x = unit(80, 1, name="conv2d_3b")(ops.max_pool(x, (3, 3), (2, 2)))
        x = stage_output(self, "stage2", unit(192, 3, valid=True, name="conv2d_4a")(x))
        x = module(MIXED_5B, ops.max_pool(x, (3, 3), (2, 2)), "mixed_5b")
        for number in range(1, 11):
            x = residual(BLOCK_35, 0.17, x, f"block35_{number}")
        x = module(MIXED_6A, stage_output(self, "stage3", x), "mixed_6a")
        for number in range(1, 21):
            x = residual(BLOCK_17, 0.1, x, f"block17_{number}")
        x = module(MIXED_7A, stage_output(self, "stage4", x), "mixed_7a")
        for number in range(1, 10):
            x = residual(BLOCK_8, 0.2, x, f"block8_{number}")
        x = residual(BLOCK_8, 1.0, x, "block8_10", linear=True)
        x = stage_output(self, "stage5", unit(1536, 1, name="conv2d_7b")(x))
        return classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


ROWS = {
    "inception_resnet_v2": row(
        InceptionResNetV2, 55_843_464, 60_544, 13_155_794_016, source=TIMM, image=(299, 299, 3)
    ),
}
