"""EfficientNet B0 to B7, Lite 0 to 4, and EfficientNetV2: inverted residuals, scaled in all sizes.

- B0 to B7: Tan & Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
  Networks" (arXiv 1905.11946), Table 1 for B0. The factors of B1 to B7 and their dropout rates are
  those of the authors' code; so are the epsilon and momentum of B5 to B7, while B0 to B4 have
  PyTorch's, as in torchvision, whose published weights were trained so.
- V2 S, M and L: Tan & Le 2021, "EfficientNetV2: Smaller Models and Faster Training" (arXiv
  2104.00298), Table 4 for S; M and L as in the authors' code, with torchvision's epsilon and
  momentum. The first three stages have one convolution in place of the widening and the depthwise
  one.

EfficientNet-Lite is the same authors' variant for phones (the directory `lite` of their code, 2020;
there is no paper): no gates, ReLU6, and neither the stem, the last convolution nor the depth of the
first and the last stage are scaled. Its padding, epsilon and momentum are TensorFlow's, as in the
published weights and in timm's `tf_efficientnet_lite0`. Images of Lite 3 and 4 have the authors'
280 and 300 pixels; timm evaluates them at 300 and 380.

Names: torchvision's `features.2.0.block.1.0` is `stage2/block1/depthwise/conv`; a block's parts
are `expand`, `depthwise`, `se` and `project`, in V2's first stages `expand` and `project`;
`features.0` is `stem`, `features.8` (or the one behind the last stage) is `last`, `classifier.1` is
`head`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factory, Layers
from cnnjax.models.rows import TIMM, TORCHVISION, Row, also_called, row

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
# The same of V2; the first three are fused.
V2_S = (
    (1, 3, 1, 24, 2),
    (4, 3, 2, 48, 4),
    (4, 3, 2, 64, 4),
    (4, 3, 2, 128, 6),
    (6, 3, 1, 160, 9),
    (6, 3, 2, 256, 15),
)
V2_M = (
    (1, 3, 1, 24, 3),
    (4, 3, 2, 48, 5),
    (4, 3, 2, 80, 5),
    (4, 3, 2, 160, 7),
    (6, 3, 1, 176, 14),
    (6, 3, 2, 304, 18),
    (6, 3, 1, 512, 5),
)
V2_L = (
    (1, 3, 1, 32, 4),
    (4, 3, 2, 64, 7),
    (4, 3, 2, 96, 7),
    (4, 3, 2, 192, 10),
    (6, 3, 1, 224, 19),
    (6, 3, 2, 384, 25),
    (6, 3, 1, 640, 7),
)


class EfficientNet(nn.Module):
    """EfficientNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages: (expansion, kernel size, stride, features, blocks) of each stage, before scaling.
      num_classes: of the head; `None` returns the pooled features.
      width: factor of all channels, which are then made divisible by 8.
      depth: factor of the number of blocks of each stage, rounded up.
      fused_stages: how many of the stages, from the first, have `blocks.FusedInvertedResidual`s.
      stem_features: of the first convolution, before scaling.
      last_features: of the last convolution; None for four times those of the last stage.
      gated: whether blocks have a gate (squeeze and excitation).
      scaled_ends: whether `width` and `depth` scale the stem, the last convolution and the depth of
        the first and last stage too.
      stem: `"imagenet"` for images of 224 pixels and more, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      padding: `"symmetric"` as in PyTorch or `"same"` as in Keras: see `layers.conv_layer`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Sequence[tuple[int, int, int, int, int]] = STAGES
    num_classes: int | None = 1000
    width: float = 1.0
    depth: float = 1.0
    fused_stages: int = 0
    stem_features: int = 32
    last_features: int | None = None
    gated: bool = True
    scaled_ends: bool = True
    stem: str = "imagenet"
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.2
    padding: str = "symmetric"
    layers: Layers = Layers(activation="silu")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "EfficientNet")
        layers = self.layers.factories(train=train, padding=self.padding)
        stem_strides, *strides = strides_for(self.stem, (2, *(row[2] for row in self.stages)))
        width_of_ends = self.width if self.scaled_ends else 1.0
        channels = blocks.scale_channels(self.stem_features, width=width_of_ends)
        x = blocks.ConvNorm(channels, 3, layers, stem_strides, name="stem")(image)
        stages: list[list[Factory]] = []
        for numbers, stride, depth in zip(self.stages, strides, self.depths(), strict=True):
            expansion, kernel_size, _, features, _ = numbers
            features = blocks.scale_channels(features, width=self.width)
            fused = len(stages) < self.fused_stages
            stages.append([])
            for index in range(depth):
                sizes = (features, expansion * channels, kernel_size, stride if index == 0 else 1)
                if fused:
                    block: Factory = functools.partial(blocks.FusedInvertedResidual, *sizes)
                else:
                    block = functools.partial(
                        blocks.InvertedResidual,
                        *sizes,
                        # A quarter of the block's input, not of the expanded channels.
                        se_features=max(1, channels // 4) if self.gated else 0,
                        se_activation=layers.activation,
                    )
                stages[-1].append(block)
                channels = features
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        last = 4 * (channels if self.scaled_ends else self.stages[-1][3])
        x = blocks.ConvNorm(self.last_features or last, 1, layers, name="last")(x)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def depths(self) -> list[int]:
        """Returns the number of blocks of each stage."""
        depths = [math.ceil(numbers[4] * self.depth) for numbers in self.stages]
        if not self.scaled_ends:
            depths[0], depths[-1] = self.stages[0][4], self.stages[-1][4]
        return depths


def scaled(width: float, depth: float, side: int, *sizes: int, **options: Any) -> Row:
    """Returns the row of a network scaled so, for images of `side` pixels."""
    options |= {"width": width, "depth": depth, "image": (side, side, 3)}
    return row(EfficientNet, *sizes, **{"source": TORCHVISION, **options})


def lite(number: int, *sizes: Any, dropout_rate: float) -> Row:
    """Returns the row of EfficientNet-Lite of a number: width, depth, side and sizes follow."""
    return scaled(
        *sizes,
        source=TIMM,
        also={"timm": f"tf_efficientnet_lite{number}"},
        gated=False,
        scaled_ends=False,
        activation="relu6",
        padding="same",
        norm_epsilon=1e-3,
        norm_momentum=0.99,
        dropout_rate=dropout_rate,
    )


def second(
    stages: Sequence[tuple[int, int, int, int, int]], side: int, *sizes: int, **options: Any
) -> Row:
    """Returns the row of an EfficientNetV2 for images of `side` pixels."""
    options |= {"stages": stages, "stem_features": stages[0][3], "image": (side, side, 3)}
    options |= {"fused_stages": 3, "last_features": 1280, "norm_epsilon": 1e-3}
    return row(EfficientNet, *sizes, source=TORCHVISION, **options)


# timm's networks of the same name have another epsilon.
large = functools.partial(scaled, norm_epsilon=1e-3, norm_momentum=0.99)

# width, depth, image; parameters, running statistics, multiply-accumulates
ROWS = {
    "efficientnet_b0": scaled(1.0, 1.0, 224, 5_288_548, 42_016, 385_814_752, dropout_rate=0.2),
    "efficientnet_b1": scaled(1.0, 1.1, 240, 7_794_184, 62_048, 686_802_832, dropout_rate=0.2),
    "efficientnet_b2": scaled(1.1, 1.2, 260, 9_109_994, 67_568, 993_561_872, dropout_rate=0.3),
    "efficientnet_b3": scaled(1.2, 1.4, 300, 12_233_232, 87_296, 1_827_141_392, dropout_rate=0.3),
    "efficientnet_b4": scaled(1.4, 1.8, 380, 19_341_616, 125_200, 4_393_771_024, dropout_rate=0.4),
    "efficientnet_b5": large(
        1.6,
        2.2,
        456,
        30_389_784,
        172_736,
        10_266_384_752,
        dropout_rate=0.4,
        also={"timm": "tf_efficientnet_b5"},
    ),
    "efficientnet_b6": large(
        1.8,
        2.6,
        528,
        43_040_704,
        224_432,
        19_067_593_536,
        dropout_rate=0.5,
        also={"timm": "tf_efficientnet_b6"},
    ),
    "efficientnet_b7": large(
        2.0,
        3.1,
        600,
        66_347_960,
        310_720,
        37_745_884_192,
        dropout_rate=0.5,
        also={"timm": "tf_efficientnet_b7"},
    ),
    "efficientnet_v2_s": second(
        V2_S,
        384,
        21_458_488,
        153_872,
        8_365_617_152,
        dropout_rate=0.2,
        also={"timm": "tf_efficientnetv2_s"},
    ),
    "efficientnet_v2_m": second(
        V2_M,
        480,
        54_139_356,
        292_032,
        24_582_460_384,
        dropout_rate=0.3,
        also={"timm": "tf_efficientnetv2_m"},
    ),
    "efficientnet_v2_l": second(
        V2_L,
        480,
        118_515_272,
        512_576,
        56_079_699_008,
        dropout_rate=0.4,
        also={"timm": "tf_efficientnetv2_l"},
    ),
    "efficientnet_lite0": lite(0, 1.0, 1.0, 224, 4_652_008, 42_016, 385_187_552, dropout_rate=0.2),
    "efficientnet_lite1": lite(1, 1.0, 1.1, 240, 5_416_680, 53_664, 600_185_232, dropout_rate=0.2),
    "efficientnet_lite2": lite(2, 1.1, 1.2, 260, 6_092_072, 58_096, 859_736_272, dropout_rate=0.3),
    "efficientnet_lite3": lite(
        3, 1.2, 1.4, 280, 8_197_096, 76_672, 1_383_321_872, dropout_rate=0.3
    ),
    "efficientnet_lite4": lite(
        4, 1.4, 1.8, 300, 13_006_568, 112_368, 2_553_034_336, dropout_rate=0.3
    ),
}
ROWS |= also_called(ROWS, "keras", {f"efficientnet_b{n}": f"EfficientNetB{n}" for n in range(8)})
