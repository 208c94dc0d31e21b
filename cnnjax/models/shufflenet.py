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
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.blocks import Activation, Array, Factory
from cnnjax.models.layers import require_image, require_stem

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
    conv: Factory
    norm: Factory
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        del train
        half = self.features // 2
        conv_norm = functools.partial(blocks.ConvNorm, conv=self.conv, norm=self.norm)
        pointwise = functools.partial(conv_norm, half, 1, activation=self.activation)
        depthwise = functools.partial(conv_norm, strides=self.strides, activation=None)
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
      norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      dropout_rate: before the head.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: mapped axis for the statistics of batch norm; `None` outside `pmap`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_features: Sequence[int]
    stage_sizes: Sequence[int] = (4, 8, 4)
    last_features: int = 1024
    num_classes: int | None = 1000
    stem: str = "imagenet"
    norm: str = "batch"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "ShuffleNetV2")
        require_stem(self.stem)
        layers = blocks.layers_of(self, train=train)
        large = self.stem == "imagenet"
        x = blocks.ConvNorm(STEM_FEATURES, 3, strides=2 if large else 1, name="stem", **layers)(
            image
        )
        if large:
            x = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (depth, features) in enumerate(
            zip(self.stage_sizes, self.stage_features, strict=True), 1
        ):
            units = [
                functools.partial(ShuffleUnit, features, 2 if index == 0 else 1, **layers)
                for index in range(depth)
            ]
            x = blocks.Stage(units, self.remat, name=f"stage{stage}")(x, train=train)
        x = blocks.ConvNorm(self.last_features, 1, name="last", **layers)(x)
        return blocks.classify(
            jnp.mean(x, axis=(1, 2)),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )


shufflenet_v2_x0_5 = functools.partial(ShuffleNetV2, stage_features=(48, 96, 192))
shufflenet_v2_x1_0 = functools.partial(ShuffleNetV2, stage_features=(116, 232, 464))
shufflenet_v2_x1_5 = functools.partial(ShuffleNetV2, stage_features=(176, 352, 704))
shufflenet_v2_x2_0 = functools.partial(
    ShuffleNetV2, stage_features=(244, 488, 976), last_features=2048
)
