"""MaxViT: convolution, attention in windows, and attention on a grid, in every block.

Tu et al. 2022, "MaxViT: Multi-Axis Vision Transformer" (arXiv 2204.01697), section 3. The details
are torchvision's, whose published weights have them: scores are divided by the root of all
features, not of a head's; the shortcut of a strided block is a 3x3 average pool and a 1x1
convolution.

Names: torchvision's `blocks.1.layers.0.layers.MBconv` is `stage2/block1/conv`, with `conv_a`,
`conv_b`, `conv_c` as `expand`, `depthwise`, `project`; `window_attention` and `grid_attention` are
`window` and `grid`; `classifier.2`, `.3` and `.5` are `norm`, `dense` and `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models import blocks
from cnnjax.models.affine_norms import LayerNorm
from cnnjax.models.attention import (
    Mlp,
    SelfAttention,
    bias_of_pairs,
    from_windows,
    to_windows,
    truncated_normal,
)
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import row

FEATURES_OF_A_HEAD = 32
normal = nn.initializers.normal(0.02)


class ConvBranch(nn.Module):
    """The inverted residual of a MaxViT block, norm first (section 3.3)."""

    features: int
    strides: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, expanded = self.layers, 4 * self.features
        biased = functools.partial(layers.conv, use_bias=True)
        conv_norm = functools.partial(blocks.ConvNorm, expanded, layers=layers)
        y = layers.norm(name="norm")(x)
        y = conv_norm(1, name="expand")(y)
        y = conv_norm(3, strides=self.strides, groups=expanded, name="depthwise")(y)
        y = blocks.SqueezeExcite(self.features // 4, layers.conv, nn.silu, name="se")(y)
        y = biased(self.features, 1, name="project")(y)
        if self.strides == 2:
            x = ops.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        if self.strides == 2 or input_width(x) != self.features:
            x = biased(self.features, 1, name="shortcut")(x)
        return x + blocks.drop_branch(self, y)


class PartitionAttention(nn.Module):
    """Attention among the `side ** 2` tokens of each part of the image, then dense layers.

    Attributes:
      side: tokens along a side of a part.
      grid: whether the tokens of a part are spread evenly over the image; else they are neighbors.

    Section 3.2 and Figure 3. Call: `[batch, height, width, features]` to the same shape.
    """

    side: int
    grid: bool
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, side, (height, width) = self.layers, self.side, x.shape[1:3]
        norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=layers.dtype)
        drop = functools.partial(blocks.StochasticDepth, self.stochastic_depth_rate)
        features = x.shape[-1]
        num_heads = max(1, features // FEATURES_OF_A_HEAD)
        shape = ((2 * side - 1) ** 2, num_heads)
        bias = bias_of_pairs(self.param("position_bias", truncated_normal, shape), side)
        x = to_grid(x, side) if self.grid else to_windows(x, side)
        attention = SelfAttention(num_heads, layers, scale=features**-0.5, name="attention")
        x = x + drop(name="drop1")(attention(norm(name="norm1")(x), bias), train=layers.train)
        y = Mlp(4 * features, layers, name="mlp")(norm(name="norm2")(x))
        x = x + drop(name="drop2")(y, train=layers.train)
        return (from_grid if self.grid else from_windows)(x, side, height, width)


def to_grid(image: Array, side: int) -> Array:
    """Takes `side` times `side` pixels, spread evenly, for each place in a cell of that grid.

    Returns:
      `[batch, places in a cell, side ** 2, features]`; `from_grid` undoes it.
    """
    batch, height, width, features = image.shape
    x = image.reshape(batch, side, height // side, side, width // side, features)
    return jnp.transpose(x, (0, 2, 4, 1, 3, 5)).reshape(batch, -1, side * side, features)


def from_grid(parts: Array, side: int, height: int, width: int) -> Array:
    """Returns the image `[batch, height, width, features]` that `to_grid` has taken apart."""
    batch, features = parts.shape[0], parts.shape[-1]
    x = parts.reshape(batch, height // side, width // side, side, side, features)
    return jnp.transpose(x, (0, 3, 1, 4, 2, 5)).reshape(batch, height, width, features)


class MaxViTBlock(nn.Module):
    """Convolution, attention in windows, attention on a grid (Figure 2)."""

    features: int
    strides: int
    side: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, rate = self.layers, self.stochastic_depth_rate
        x = ConvBranch(self.features, self.strides, layers, rate, name="conv")(x)
        x = PartitionAttention(self.side, False, layers, rate, name="window")(x)
        return PartitionAttention(self.side, True, layers, rate, name="grid")(x)


class Stem(nn.Module):
    """Convolution, norm, activation, and a bare convolution."""

    features: int
    strides: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        conv, features = self.layers.conv, self.features
        x = conv(features, 3, self.strides, name="conv1")(image)
        x = self.layers.activation(self.layers.norm(name="norm1")(x))
        return conv(features, 3, use_bias=True, name="conv2")(x)


class MaxViT(nn.Module):
    """MaxViT: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage; each halves the resolution.
      stage_features: channels of each stage.
      stem_features: channels of the stem.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      side: tokens along a side of a window and of a grid; it divides the sides of every stage.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all convolutions share; see `Layers`. Attentions have layer norm.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int] = (2, 2, 5, 2)
    stage_features: Sequence[int] = (64, 128, 256, 512)
    stem_features: int = 64
    num_classes: int | None = 1000
    stem: str = "imagenet"
    side: int = 7
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.2
    layers: Layers = Layers(activation="gelu", norm_epsilon=1e-3, norm_momentum=0.99)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "MaxViT")
        stem_strides, *strides = strides_for(self.stem, [2] * (1 + len(self.stage_sizes)))
        self._check(image, stem_strides, strides)
        layers = self.layers.factories(train=train, kernel_init=normal)
        x = Stem(self.stem_features, stem_strides, layers, name="stem")(image)
        stages = [
            [
                functools.partial(MaxViTBlock, features, step if index == 0 else 1, self.side)
                for index in range(depth)
            ]
            for depth, features, step in zip(
                self.stage_sizes, self.stage_features, strides, strict=True
            )
        ]
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        x = LayerNorm(epsilon=1e-5, dtype=layers.dtype, name="norm")(jnp.mean(x, axis=(1, 2)))
        x = nn.Dense(x.shape[-1], dtype=layers.dtype, kernel_init=normal, name="dense")(x)
        return blocks.classify(
            jnp.tanh(x),
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=normal,
            use_bias=False,
        )

    def _check(self, image: Array, stem_strides: int, strides: Sequence[int]) -> None:
        height, width = (-(-size // stem_strides) for size in image.shape[1:3])
        for step in strides:
            height, width = -(-height // step), -(-width // step)
            if height % self.side or width % self.side:
                raise UserError(
                    f"MaxViT cuts the {height}x{width} pixels of a stage into windows of "
                    f"side={self.side}, which does not divide them: resize the images "
                    f"({image.shape[1]}x{image.shape[2]}), or choose another side."
                )


SOURCE = "torchvision's num_params; its _ops less the products of attention"

ROWS = {
    "maxvit_t": row(MaxViT, 30_919_624, 47_616, 5_381_025_792, source=SOURCE),
}
