"""MobileNet v4: inverted bottlenecks with depthwise convolutions in either, both or no place.

Qin et al. 2024, "MobileNetV4: Universal Models for the Mobile Ecosystem" (arXiv 2404.10518),
section 4 for the block, Tables 11 to 13 for the convolutional networks S, M and L, as in timm; the
rates of dropout are 0, as there.

Names: timm's `blocks.2.0` is `stage3/block1`. Its `dw_start`, `pw_exp`, `dw_mid` and `pw_proj` are
`start`, `expand`, `depthwise` and `project`; a fused block's `conv_exp` and `conv_pwl` are `expand`
and `project`; `conv_head` is `last/conv`, `norm_head` is `last/norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import TIMM, row

# A block: ("conv", kernel size, features), ("fused", kernel size, expansion, features), or
# ("universal", first kernel size, middle kernel size, expansion, features), 0 for no convolution.
Block = tuple[Any, ...]
Stages = Sequence[Sequence[Block]]


def universal(features: int, *numbers: tuple[int, int, int]) -> tuple[Block, ...]:
    """Returns the blocks of (first kernel size, middle kernel size, expansion)."""
    return tuple(("universal", *each, features) for each in numbers)


SMALL: Stages = (
    (("conv", 3, 32), ("conv", 1, 32)),
    (("conv", 3, 96), ("conv", 1, 64)),
    universal(96, (5, 5, 3), *[(0, 3, 2)] * 4, (3, 0, 4)),
    universal(128, (3, 3, 6), (5, 5, 4), (0, 5, 4), (0, 5, 3), (0, 3, 4), (0, 3, 4)),
    (("conv", 1, 960),),
)
MEDIUM: Stages = (
    (("fused", 3, 4, 48),),
    universal(80, (3, 5, 4), (3, 3, 2)),
    universal(
        160,
        (3, 5, 6), (3, 3, 4), (3, 3, 4), (3, 5, 4), (3, 3, 4), (3, 0, 4), (0, 0, 2), (3, 0, 4),
    ),
    universal(
        256,
        (5, 5, 6), (5, 5, 4), (3, 5, 4), (3, 5, 4), (0, 0, 4), (3, 0, 4), (3, 5, 2), (5, 5, 4),
        (0, 0, 4), (0, 0, 4), (5, 0, 2),
    ),
    (("conv", 1, 960),),
)  # fmt: skip
LARGE: Stages = (
    (("fused", 3, 4, 48),),
    universal(96, (3, 5, 4), (3, 3, 4)),
    universal(192, (3, 5, 4), *[(3, 3, 4)] * 3, (3, 5, 4), *[(5, 3, 4)] * 5, (3, 0, 4)),
    universal(
        512,
        *[(5, 5, 4)] * 4, (5, 0, 4), (5, 3, 4), (5, 0, 4), (5, 0, 4), (5, 3, 4), (5, 5, 4),
        *[(5, 0, 4)] * 3,
    ),
    (("conv", 1, 960),),
)  # fmt: skip


class Convolution(blocks.ConvNorm):
    """`blocks.ConvNorm` as a block: it has no branch to drop."""

    stochastic_depth_rate: float = 0.0


class UniversalBottleneck(nn.Module):
    """Filter each channel, widen by 1x1, filter each channel, narrow by 1x1 (section 4).

    The first and the last have no activation. The stride is that of the middle filter, or of the
    first where there is no other. The input is added where the shape stays the same.

    Attributes:
      features: channels of the output.
      expanded_features: channels between.
      start_size, middle_size: of the kernels that filter; 0 leaves the convolution out.
    """

    features: int
    expanded_features: int
    start_size: int
    middle_size: int
    strides: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        channels, expanded, y = x.shape[-1], self.expanded_features, x
        if self.start_size:
            strides = 1 if self.middle_size else self.strides
            y = conv_norm(
                channels,
                self.start_size,
                strides=strides,
                groups=channels,
                linear=True,
                name="start",
            )(y)
        y = conv_norm(expanded, 1, name="expand")(y)
        if self.middle_size:
            y = conv_norm(
                expanded, self.middle_size, strides=self.strides, groups=expanded, name="depthwise"
            )(y)
        y = conv_norm(self.features, 1, linear=True, name="project")(y)
        if self.strides == 1 and input_width(x) == self.features:
            y = x + blocks.drop_branch(self, y)
        return y


class MobileNetV4(nn.Module):
    """MobileNet v4: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages: the blocks of each stage; see `Block`.
      strides: of the first block of each stage.
      stem_features: of the first convolution.
      last_features: of the layer before the head.
      num_classes: of the head; `None` returns what enters it.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      padding: `"symmetric"` as in timm or `"same"` as in TensorFlow: see `layers.conv_layer`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Stages
    strides: Sequence[int] = (2, 2, 2, 2, 1)
    stem_features: int = 32
    last_features: int = 1280
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    padding: str = "symmetric"
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MobileNetV4")
        layers = self.layers.factories(train=train, padding=self.padding)
        stem_strides, *strides = strides_for(self.stem, (2, *self.strides))
        x = blocks.ConvNorm(self.stem_features, 3, layers, stem_strides, name="stem")(image)
        stages: list[list[Factory]] = []
        channels = self.stem_features
        for rows, stride in zip(self.stages, strides, strict=True):
            stages.append([])
            for index, numbers in enumerate(rows):
                stages[-1].append(_block(numbers, channels, stride if index == 0 else 1))
                channels = numbers[-1]
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        x = jnp.mean(x, axis=(1, 2), keepdims=True)
        x = blocks.ConvNorm(self.last_features, 1, layers, name="last")(x)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


def _block(numbers: Block, channels: int, strides: int) -> Factory:
    kind, kernel_size, *others, features = numbers
    if kind == "conv":
        return functools.partial(Convolution, features, kernel_size, strides=strides)
    expanded = blocks.make_divisible(channels * others[-1])
    if kind == "fused":
        return functools.partial(
            blocks.FusedInvertedResidual, features, expanded, kernel_size, strides
        )
    return functools.partial(
        UniversalBottleneck, features, expanded, kernel_size, others[0], strides
    )


published = functools.partial(row, MobileNetV4, source=TIMM)
small = functools.partial(published, stages=SMALL)
medium = functools.partial(published, stages=MEDIUM, image=(256, 256, 3))
large = functools.partial(published, stages=LARGE, stem_features=24, image=(384, 384, 3))

# parameters, running statistics, multiply-accumulates
ROWS = {
    "mobilenet_v4_conv_small": small(
        3_774_024, 25_088, 186_005_568, also={"timm": "mobilenetv4_conv_small"}
    ),
    "mobilenet_v4_conv_medium": medium(
        9_715_512, 67_904, 1_080_244_224, also={"timm": "mobilenetv4_conv_medium"}
    ),
    "mobilenet_v4_conv_large": large(
        32_590_864, 149_552, 6_376_220_672, also={"timm": "mobilenetv4_conv_large"}
    ),
}
