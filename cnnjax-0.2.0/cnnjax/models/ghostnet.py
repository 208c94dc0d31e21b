"""GhostNet v1 and v2: half of the channels of each layer are made from the other half.

- v1: Han et al. 2020, "GhostNet: More Features from Cheap Operations" (arXiv 1911.11907), section 3
  and Table 1.
- v2: Tang et al. 2022, "GhostNetV2: Enhance Cheap Operation with Long-Range Attention" (arXiv
  2211.12905), section 4: the first ghost module of a block has a gate of long range.

The gate's width, the hard sigmoid and the last layers are those of the authors' code, as in timm.

Names: timm's `blocks.3.0` and `blocks.4.0` are `stage3/block1` and `block2`: over there the blocks
behind the first of a stage have a list of their own. `primary_conv.0` is `primary/conv`,
`cheap_operation.0` is `cheap/conv`, `short_conv` is `gate`, `conv_dw` is `depthwise/conv`;
`conv_stem` is `stem/conv`, `blocks.9.0` is `last`, `conv_head` is `dense`, `classifier` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import TIMM, row

# (kernel size, expanded features, features, squeeze-and-excite) of each block.
STAGES = (
    ((3, 16, 16, False),),
    ((3, 48, 24, False), (3, 72, 24, False)),
    ((5, 72, 40, True), (5, 120, 40, True)),
    (
        (3, 240, 80, False),
        (3, 200, 80, False),
        (3, 184, 80, False),
        (3, 184, 80, False),
        (3, 480, 112, True),
        (3, 672, 112, True),
    ),
    (
        (5, 672, 160, True),
        (5, 960, 160, False),
        (5, 960, 160, True),
        (5, 960, 160, False),
        (5, 960, 160, True),
    ),
)


def resize_nearest(x: Array, height: int, width: int) -> Array:
    """Enlarges `[batch, height, width, channels]` by copies, as PyTorch's mode `nearest`.

    Pixel i of the result is pixel floor(i * old / new) of `x`.
    """
    for axis, size in ((1, height), (2, width)):
        x = jnp.take(x, np.arange(size) * x.shape[axis] // size, axis=axis)
    return x


class LongRangeGate(nn.Module):
    """A gate for each pixel from its row and column, at half of the resolution.

    Mean of 2x2, 1x1 convolution, then 1x5 and 5x1 of each channel, without activations; sigmoid
    (the paper's section 4.2 and Figure 4).
    """

    features: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(
            blocks.ConvNorm, self.features, layers=self.layers, linear=True
        )
        y = ops.avg_pool(x, (2, 2), (2, 2))
        y = conv_norm(1, name="pointwise")(y)
        y = conv_norm((1, 5), groups=self.features, name="horizontal")(y)
        y = conv_norm((5, 1), groups=self.features, name="vertical")(y)
        return resize_nearest(nn.sigmoid(y), *x.shape[1:3])


class GhostModule(nn.Module):
    """1x1 convolution to half of the features, and 3x3 convolutions of each of these, side by side.

    Attributes:
      linear: whether activations are left out.
      gated: whether `LongRangeGate` follows.
    """

    features: int
    layers: Factories
    linear: bool = False
    gated: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers, linear=self.linear)
        half = self.features // 2
        primary = conv_norm(half, 1, name="primary")(x)
        cheap = conv_norm(half, 3, groups=half, name="cheap")(primary)
        y = jnp.concatenate([primary, cheap], axis=-1)
        return y * LongRangeGate(self.features, self.layers, name="gate")(x) if self.gated else y


class GhostBottleneck(nn.Module):
    """Ghost module, depthwise convolution at stride 2, gate, linear ghost module; shortcut added.

    v1's Figure 3. Where the shape changes, the shortcut is a depthwise separable convolution.
    """

    features: int
    expanded_features: int
    kernel_size: int
    strides: int
    se: bool
    gated: bool
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        linear = functools.partial(blocks.ConvNorm, layers=self.layers, linear=True)
        expanded, channels = self.expanded_features, x.shape[-1]
        y = GhostModule(expanded, self.layers, gated=self.gated, name="ghost1")(x)
        if self.strides > 1:
            y = linear(
                expanded, self.kernel_size, strides=self.strides, groups=expanded, name="depthwise"
            )(y)
        if self.se:
            reduced = blocks.make_divisible(expanded / 4, 4)
            y = blocks.SqueezeExcite(
                reduced, self.layers.conv, self.layers.activation, nn.hard_sigmoid, name="se"
            )(y)
        y = GhostModule(self.features, self.layers, linear=True, name="ghost2")(y)
        if self.strides > 1 or input_width(x) != self.features:
            x = linear(
                channels,
                self.kernel_size,
                strides=self.strides,
                groups=channels,
                name="shortcut_depthwise",
            )(x)
            x = linear(self.features, 1, name="shortcut_pointwise")(x)
        return x + y


class GhostNet(nn.Module):
    """GhostNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stages: (kernel size, expanded features, features, squeeze-and-excite) of each block.
      strides: of the first block of each stage.
      ungated: blocks before the first whose first ghost module has v2's gate; None for v1.
      dense_features: of the layer before the head.
      num_classes: of the head; `None` returns what enters it.
      width: factor of all channels, which are then made divisible by 4.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stages: Sequence[Sequence[tuple[int, int, int, bool]]] = STAGES
    strides: Sequence[int] = (1, 2, 2, 2, 2)
    ungated: int | None = None
    dense_features: int = 1280
    num_classes: int | None = 1000
    width: float = 1.0
    stem: str = "imagenet"
    dropout_rate: float = 0.2
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        layers = self.layers.factories(train=train)
        stem_strides, *strides = strides_for(self.stem, (2, *self.strides))
        # A gate halves the resolution once more.
        halvings = sum(stride == 2 for stride in (stem_strides, *strides))
        require_image(image, "GhostNet", minimum=1 if self.ungated is None else 2**halvings + 1)

        def scaled(channels: int) -> int:
            return blocks.make_divisible(channels * self.width, 4)

        x = blocks.ConvNorm(scaled(16), 3, layers, stem_strides, name="stem")(image)
        stages: list[list[functools.partial]] = []
        number = 0
        for rows, stride in zip(self.stages, strides, strict=True):
            stages.append([])
            for index, (kernel_size, expanded, features, se) in enumerate(rows):
                block = functools.partial(
                    GhostBottleneck,
                    scaled(features),
                    scaled(expanded),
                    kernel_size,
                    stride if index == 0 else 1,
                    se,
                    self.ungated is not None and number >= self.ungated,
                )
                stages[-1].append(block)
                number += 1
        x = blocks.run_stages(x, stages, layers)
        x = blocks.ConvNorm(scaled(self.stages[-1][-1][1]), 1, layers, name="last")(x)
        dense = nn.Dense(self.dense_features, dtype=layers.dtype, name="dense")
        x = layers.activation(dense(jnp.mean(x, axis=(1, 2))))
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


v1 = functools.partial(row, GhostNet, source=TIMM)
v2 = functools.partial(v1, ungated=2)

# parameters, running statistics, multiply-accumulates
ROWS = {
    "ghostnet_x1_0": v1(5_182_508, 21_968, 141_150_512, also={"timm": "ghostnet_100"}),
    "ghostnet_v2_x1_0": v2(6_156_908, 62_384, 167_048_288, also={"timm": "ghostnetv2_100"}),
    "ghostnet_v2_x1_3": v2(
        8_960_404, 81_048, 269_322_976, also={"timm": "ghostnetv2_130"}, width=1.3
    ),
    "ghostnet_v2_x1_6": v2(
        12_392_698, 99_872, 398_607_224, also={"timm": "ghostnetv2_160"}, width=1.6
    ),
}
