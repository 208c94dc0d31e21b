"""MobileOne: depthwise separable convolutions of several branches, folded into one when deployed.

Vasu et al. 2023, "MobileOne: An Improved One millisecond Mobile Backbone" (arXiv 2206.04040),
section 3.3 and Tables 2 and 3. As in timm, the stem of S0 has one branch where the authors have
four. `reparametrize.reparametrize` gives the network without branches.

Names: timm's `stages.1.2` and `stages.1.3` are `stage2/block2/depthwise` and `pointwise`; their
`conv_kxk.0` is `conv/branch1`, `conv_scale` is the last branch, `identity` is `conv/identity`, and
`attn` is `se`; `stem` is `stem`, `head.fc` is `head`. Deployed, `reparam_conv` is `conv/conv`.
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


class MobileOneConv(nn.Module):
    """Branches of one kernel size, a 1x1 one beside larger ones, the identity; gate; activation.

    Attributes:
      kernel_size, num_branches: of the branches besides the 1x1 one and the identity.
      se: whether a gate of a sixteenth of the channels follows.
    """

    features: int
    kernel_size: int
    layers: Factories
    strides: int = 1
    groups: int = 1
    num_branches: int = 1
    se: bool = False
    deployed: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = (1,) if self.kernel_size > 1 else ()
        kernel_sizes = (self.kernel_size,) * self.num_branches + scale
        x = BranchedConv(
            self.features,
            kernel_sizes,
            self.layers,
            strides=self.strides,
            groups=self.groups,
            deployed=self.deployed,
            name="conv",
        )(x)
        if self.se:
            reduced = max(8, (self.features // 16 + 4) // 8 * 8)
            x = blocks.SqueezeExcite(reduced, self.layers.conv, name="se")(x)
        return self.layers.activation(x)


class MobileOneBlock(nn.Module):
    """A 3x3 convolution of each channel, then a 1x1 convolution, both of branches (Figure 3)."""

    features: int
    strides: int
    num_branches: int
    se: bool
    deployed: bool
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        conv = functools.partial(
            MobileOneConv,
            layers=self.layers,
            num_branches=self.num_branches,
            se=self.se,
            deployed=self.deployed,
        )
        x = conv(channels, 3, strides=self.strides, groups=channels, name="depthwise")(x)
        return conv(self.features, 1, name="pointwise")(x)


class MobileOne(nn.Module):
    """MobileOne: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_features: channels of each stage.
      stage_sizes: blocks of each stage.
      se_blocks: how many blocks at the end of each stage have gates.
      num_branches: of each convolution but the stem, besides the 1x1 one and the identity.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      deployed: whether the branches are folded; see `reparametrize`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_features: Sequence[int]
    stage_sizes: Sequence[int] = (2, 8, 10, 1)
    se_blocks: Sequence[int] = (0, 0, 0, 0)
    num_branches: int = 1
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    deployed: bool = False
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileOne")
        layers = self.layers.factories(train=train)
        stem_strides, *strides = strides_for(self.stem, [2] * (1 + len(self.stage_sizes)))
        channels = min(64, self.stage_features[0])
        x = MobileOneConv(channels, 3, layers, stem_strides, deployed=self.deployed, name="stem")(
            image
        )
        block = functools.partial(
            MobileOneBlock, num_branches=self.num_branches, deployed=self.deployed
        )
        stages = [
            [
                functools.partial(
                    block, features, stride if index == 0 else 1, se=index >= depth - gates
                )
                for index in range(depth)
            ]
            for features, depth, gates, stride in zip(
                self.stage_features, self.stage_sizes, self.se_blocks, strides, strict=True
            )
        ]
        x = blocks.run_stages(x, stages, layers)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


published = functools.partial(row, MobileOne, source=TIMM)
s0 = functools.partial(published, stage_features=(48, 128, 256, 1024), num_branches=4)
s1 = functools.partial(published, stage_features=(96, 192, 512, 1280))
s2 = functools.partial(published, stage_features=(96, 256, 640, 2048))
s3 = functools.partial(published, stage_features=(128, 320, 768, 2048))
s4 = functools.partial(published, stage_features=(192, 448, 896, 2048), se_blocks=(0, 0, 5, 1))

# parameters, running statistics, multiply-accumulates, all of the form for training
ROWS = {
    "mobileone_s0": s0(5_293_272, 88_192, 1_051_935_232),
    "mobileone_s1": s1(4_825_192, 68_352, 830_062_080),
    "mobileone_s2": s2(7_884_648, 87_040, 1_304_027_392),
    "mobileone_s3": s3(10_170_600, 104_704, 1_902_112_768),
    "mobileone_s4": s4(14_951_248, 127_744, 2_986_802_432),
}
