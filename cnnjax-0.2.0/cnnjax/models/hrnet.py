"""HRNet: branches of several resolutions side by side, which exchange what they computed.

Wang et al. 2019, "Deep High-Resolution Representation Learning for Visual Recognition" (arXiv
1908.07919), section 3 and its appendix on pretraining. W18 has 18 channels in its finest
branch, and so on; the small ones are the authors' code's, and all are as in timm.

Stage 1 has one branch, each further one another branch at half the resolution of the one before.
What a stage sows is its coarsest map: the stages are thus a pyramid as in other networks.

Names: timm's `layer1.0` is `stage1/block1`; `stage2.0.branches.1.0` is `stage2/block1/branch2_1`,
`stage2.0.fuse_layers.0.1` is `fuse2_to_1`; `transition1.1` is `transition1_2`; `incre_modules.0.0`,
`downsamp_modules.0` and `final_layer` are `widen1`, `shrink1` and `last`; `classifier` is `head`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.resnet import ResidualBlock, basic_branch, bottleneck_branch
from cnnjax.models.rows import TIMM, Row, row
from cnnjax.models.stages import stage_output

# Widths of the bottlenecks behind the four branches, and features of the last layer: the appendix.
HEAD_WIDTHS = (32, 64, 128, 256)
HEAD_FEATURES = 2048

bottleneck = functools.partial(bottleneck_branch, strides=1, version="v1.5")


def enlarge(x: Array, factor: int, size: tuple[int, int]) -> Array:
    """Repeats pixels of `[batch, height, width, channels]` by `factor`, and cuts to `size`."""
    x = jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
    return x[:, : size[0], : size[1]]


class ExchangeBlock(nn.Module):
    """Basic blocks in each branch, then the sum over all branches in each (Figure 3).

    A finer map comes down by 3x3 convolutions at stride 2, a coarser one goes up by a 1x1
    convolution and repetition.

    Attributes:
      depth: basic blocks of each branch.

    Call: a list of maps, each at half the resolution of the one before, to the same shapes.
    """

    depth: int
    layers: Factories

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> list[Array]:
        computed = []
        for number, x in enumerate(maps, 1):
            for index in range(1, self.depth + 1):
                branch = basic_branch(x.shape[-1], 1)
                x = ResidualBlock(branch, self.layers, name=f"branch{number}_{index}")(x)
                x = ops.computed_once_both_ways(x)
            computed.append(x)
        exchanged = []
        for to in range(len(computed)):
            moved = [self._moved(computed, source, to) for source in range(len(computed))]
            x = self.layers.activation(functools.reduce(jnp.add, moved))
            exchanged.append(ops.computed_once_both_ways(x))
        return exchanged

    def _moved(self, maps: Sequence[Array], source: int, to: int) -> Array:
        """Returns a branch's map at the resolution and with the features of another's."""
        x, target = maps[source], maps[to]
        if source == to:
            return x
        name = f"fuse{source + 1}_to_{to + 1}"
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        if source > to:
            x = conv_norm(target.shape[-1], 1, linear=True, name=name)(x)
            return enlarge(x, 2 ** (source - to), (target.shape[1], target.shape[2]))
        for step in range(1, to - source + 1):
            last = step == to - source
            features = target.shape[-1] if last else x.shape[-1]
            x = conv_norm(features, 3, strides=2, linear=last, name=f"{name}_{step}")(x)
        return x


class ExchangeStage(nn.Module):
    """Exchange blocks `block1`, `block2` ...; sows the coarsest map."""

    size: int
    depth: int
    layers: Factories

    @nn.compact
    def __call__(self, maps: Any) -> list[Array]:
        for number in range(1, self.size + 1):
            block = ExchangeBlock(self.depth, self.layers, name=f"block{number}")
            maps = blocks.call_block(block, maps, self.layers)
        return [*maps[:-1], stage_output(self, "output", maps[-1])]


class HRNet(nn.Module):
    """HRNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      features: channels of the finest branch; doubled in each coarser one.
      num_classes: of the head; `None` returns the pooled features.
      stage_sizes: exchange blocks of the second and further stages.
      depth: basic blocks of a branch between two exchanges.
      first_size, first_features: number and width of the first stage's bottlenecks.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features: channels of the stem.
      dropout_rate: before the head.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    features: int
    num_classes: int | None = 1000
    stage_sizes: Sequence[int] = (1, 4, 3)
    depth: int = 4
    first_size: int = 4
    first_features: int = 64
    stem: str = "imagenet"
    stem_features: int = 64
    dropout_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "HRNet")
        layers = self.layers.factories(train=train)
        x = image
        for number, strides in enumerate(strides_for(self.stem, (2, 2)), 1):
            x = blocks.ConvNorm(self.stem_features, 3, layers, strides, name=f"stem{number}")(x)
        first = functools.partial(ResidualBlock, bottleneck(self.first_features))
        x = blocks.Stage([first] * self.first_size, layers, name="stage1")(x)
        maps = [x]
        for number, size in enumerate(self.stage_sizes, 2):
            maps = self._with_another(maps, number, layers)
            maps = ExchangeStage(size, self.depth, layers, name=f"stage{number}")(maps)
        return blocks.classify(
            self._merged(maps, layers), self.num_classes, layers, dropout_rate=self.dropout_rate
        )

    def _with_another(self, maps: list[Array], stage: int, layers: Factories) -> list[Array]:
        """Returns the maps of stage `stage`: those before, and one at half the resolution.

        Only those are convolved whose features change, which are those of the first stage.
        """
        conv_norm = functools.partial(blocks.ConvNorm, layers=layers)
        name = f"transition{stage - 1}_"
        last, result = maps[-1], []
        for number, x in enumerate(maps, 1):
            features = self.features * 2 ** (number - 1)
            if x.shape[-1] != features:
                x = conv_norm(features, 3, name=f"{name}{number}")(x)
            result.append(x)
        features = self.features * 2 ** (stage - 1)
        return [*result, conv_norm(features, 3, strides=2, name=f"{name}{stage}")(last)]

    def _merged(self, maps: Sequence[Array], layers: Factories) -> Array:
        """Returns all maps as one at the coarsest resolution, for the head."""
        biased = dataclasses.replace(layers, conv=functools.partial(layers.conv, use_bias=True))
        widened = [
            ResidualBlock(bottleneck(width), layers, name=f"widen{number}")(x)
            for number, (x, width) in enumerate(zip(maps, HEAD_WIDTHS, strict=False), 1)
        ]
        merged = widened[0]
        for number, x in enumerate(widened[1:], 1):
            shrink = blocks.ConvNorm(x.shape[-1], 3, biased, 2, name=f"shrink{number}")
            merged = x + shrink(merged)
        return blocks.ConvNorm(HEAD_FEATURES, 1, biased, name="last")(merged)


def hrnet(features: int, *sizes: int, **options: Any) -> Row:
    """Returns the row of the network with that many channels in its finest branch."""
    return row(HRNet, *sizes, source=TIMM, features=features, **options)


small = functools.partial(hrnet, depth=2)

# features; parameters, running statistics, multiply-accumulates
ROWS = {
    "hrnet_w18_small": small(
        16,
        13_187_464,
        24_032,
        1_601_508_352,
        stage_sizes=(1, 1, 1),
        first_size=1,
        first_features=32,
    ),
    "hrnet_w18_small_v2": small(
        18, 15_597_464, 33_228, 2_595_712_864, stage_sizes=(1, 3, 2), first_size=2
    ),
    "hrnet_w18": hrnet(18, 21_299_004, 51_216, 4_283_537_072),
    "hrnet_w30": hrnet(30, 37_712_220, 71_280, 8_105_781_680),
    "hrnet_w32": hrnet(32, 41_232_680, 74_624, 8_921_133_056),
    "hrnet_w40": hrnet(40, 57_557_160, 88_000, 12_691_997_440),
    "hrnet_w44": hrnet(44, 67_064_984, 94_688, 14_883_104_960),
    "hrnet_w48": hrnet(48, 77_469_864, 101_376, 17_277_996_032),
    "hrnet_w64": hrnet(64, 128_059_944, 128_128, 28_895_395_840),
}
