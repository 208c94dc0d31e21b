"""RepVGG: 3x3 convolutions and ReLUs only, once its branches are folded into them.

Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again" (arXiv 2101.03697), section 3 and
Table 2. In training each convolution stands beside a 1x1 one and the identity, each with its batch
norm; `reparametrize.reparametrize` gives the plain network.

Names: timm's `stages.0.1.conv_kxk`, `.conv_1x1` and `.identity` are `stage1/block2/conv/branch1`,
`branch2` and `identity`; `stem` is `stem`, `head.fc` is `head`. Deployed, `reparam_conv` is
`conv/conv`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.reparametrize import BranchedConv
from cnnjax.models.rows import TIMM, row


class RepVGGBlock(nn.Module):
    """3x3 convolution, 1x1 convolution and identity, added; activation (Figure 4)."""

    features: int
    strides: int
    groups: int
    deployed: bool
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = BranchedConv(
            self.features,
            (3, 1),
            self.layers,
            strides=self.strides,
            groups=self.groups,
            deployed=self.deployed,
            name="conv",
        )(x)
        return self.layers.activation(x)


class RepVGG(nn.Module):
    """RepVGG: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage.
      stage_features: channels of each stage.
      stem_features: of the first block.
      num_classes: of the head; `None` returns the pooled features.
      groups: of the convolutions of every second block (section 3.4).
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      deployed: whether each block is one convolution; see `reparametrize`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    stage_features: Sequence[int]
    stem_features: int = 64
    num_classes: int | None = 1000
    groups: int = 1
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    deployed: bool = False
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "RepVGG")
        layers = self.layers.factories(train=train)
        stem_strides, *strides = strides_for(self.stem, [2] * (1 + len(self.stage_sizes)))
        block = functools.partial(RepVGGBlock, deployed=self.deployed)
        x = block(self.stem_features, stem_strides, 1, layers=layers, name="stem")(image)
        stages = [
            [
                functools.partial(
                    block,
                    features,
                    stride if index == 0 else 1,
                    self.groups if index % 2 else 1,
                )
                for index in range(depth)
            ]
            for depth, features, stride in zip(
                self.stage_sizes, self.stage_features, strides, strict=True
            )
        ]
        x = blocks.run_stages(x, stages, layers)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


published = functools.partial(row, RepVGG, source=TIMM)
a = functools.partial(published, stage_sizes=(2, 4, 14, 1))
b = functools.partial(published, stage_sizes=(4, 6, 16, 1))
b1 = functools.partial(b, stage_features=(128, 256, 512, 2048))
b2 = functools.partial(b, stage_features=(160, 320, 640, 2560))
b3 = functools.partial(b, stage_features=(192, 384, 768, 2560))

# parameters, running statistics, multiply-accumulates, all of the form for training
ROWS = {
    "repvgg_a0": a(
        9_108_968, 23_648, 1_512_581_120, stage_features=(48, 96, 192, 1280), stem_features=48
    ),
    "repvgg_a1": a(14_092_264, 29_824, 2_626_488_320, stage_features=(64, 128, 256, 1280)),
    "repvgg_a2": a(28_210_600, 42_560, 5_685_345_280, stage_features=(96, 192, 384, 1408)),
    "repvgg_b0": b(15_817_960, 35_200, 3_397_191_680, stage_features=(64, 128, 256, 1280)),
    "repvgg_b1": b1(57_415_016, 68_096, 13_128_089_600),
    "repvgg_b1g4": b1(39_966_056, 68_096, 8_118_517_760, groups=4),
    "repvgg_b2": b2(89_022_376, 85_056, 20_418_170_880),
    "repvgg_b2g4": b2(61_758_376, 85_056, 12_590_714_880, groups=4),
    "repvgg_b3": b3(123_085_288, 99_968, 29_120_696_320),
    "repvgg_b3g4": b3(83_825_128, 99_968, 17_849_159_680, groups=4),
}
