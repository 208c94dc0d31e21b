"""ShuffleNet v2: split the channels, transform one half, shuffle.

Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design" (arXiv
1807.11164), section 4 and Table 5. Width 2.0 has torchvision's 1024 and 2048 channels at the end.

Names: torchvision's `stage2.0` is `stage1/block1`; `branch1` holds `depthwise` and `pointwise`
directly (`shortcut_depthwise`, `shortcut_pointwise`), `branch2` is `pointwise1`, `depthwise`,
`pointwise2`; `conv1` is `stem`, `conv5` is `last`, `fc` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, require_stem
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TORCHVISION, row

STEM_FEATURES = 24


def channel_shuffle(x: Array, groups: int = 2) -> Array:
    """Deals the channels of `groups` equal groups out in turn: 0 1 2 3 becomes 0 2 1 3."""
    *positions, channels = x.shape
    x = x.reshape(*positions, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*positions, channels)


class ShuffleUnit(nn.Module):
    """The paper's Figure 3(c), or with stride 2 its Figure 3(d), where both halves are new."""

    features: int
    strides: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        half = self.features // 2
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        pointwise = functools.partial(conv_norm, half, 1)
        depthwise = functools.partial(conv_norm, strides=self.strides, linear=True)
        if self.strides == 1:
            kept, y = jnp.split(x, 2, axis=-1)
        else:
            channels = x.shape[-1]
            kept = depthwise(channels, 3, groups=channels, name="shortcut_depthwise")(x)
            kept = pointwise(name="shortcut_pointwise")(kept)
            y = x
        y = pointwise(name="pointwise1")(y)
        y = depthwise(half, 3, groups=half, name="depthwise")(y)
        y = pointwise(name="pointwise2")(y)
        return channel_shuffle(jnp.concatenate([kept, y], axis=-1))


class ShuffleNetV2(nn.Module):
    """ShuffleNet v2: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_features: channels of each stage.
      stage_sizes: units of the stages.
      last_features: channels of the last convolution.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels; `"cifar"` for 28 to 64 pixels: no stride
        and no pool.
      dropout_rate: before the head.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_features: Sequence[int]
    stage_sizes: Sequence[int] = (4, 8, 4)
    last_features: int = 1024
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "ShuffleNetV2")
        require_stem(self.stem)
        layers = self.layers.factories(train=train)
        large = self.stem == "imagenet"
        x = blocks.ConvNorm(STEM_FEATURES, 3, layers, 2 if large else 1, name="stem")(image)
        if large:
            x = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        stages = [
            [
                functools.partial(ShuffleUnit, features, 2 if index == 0 else 1)
                for index in range(depth)
            ]
            for depth, features in zip(self.stage_sizes, self.stage_features, strict=True)
        ]
        x = blocks.run_stages(x, stages, layers)
        x = blocks.ConvNorm(self.last_features, 1, layers, name="last")(x)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


published = functools.partial(row, ShuffleNetV2, source=TORCHVISION)
wide = functools.partial(published, last_features=2048)

# parameters, running statistics, multiply-accumulates, and the channels of Table 5
ROWS = {
    "shufflenet_v2_x0_5": published(1_366_792, 7_952, 40_476_448, stage_features=(48, 96, 192)),
    "shufflenet_v2_x1_0": published(2_278_604, 16_180, 144_907_992, stage_features=(116, 232, 464)),
    "shufflenet_v2_x1_5": published(3_503_624, 23_440, 295_759_392, stage_features=(176, 352, 704)),
    "shufflenet_v2_x2_0": wide(7_393_996, 33_716, 583_253_464, stage_features=(244, 488, 976)),
}
