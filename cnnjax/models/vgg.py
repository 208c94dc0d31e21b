"""VGG: stages of 3x3 convolutions, each ended by a 2x2 max pool, then three dense layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015 (arXiv 1409.1556), table 1, configurations A, B, D and E; with batch normalisation as
torchvision's `vgg*_bn` (convolutions keep their bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from cnnjax import ops
from cnnjax.models.blocks import (
    Activation,
    Factory,
    activation_function,
    call_block,
    he_normal_fan_out,
)
from cnnjax.models.layers import adaptive_average_pool, require_image, require_stem
from cnnjax.models.norms import norm_layer
from cnnjax.models.stages import stage_output

WIDTHS = (64, 128, 256, 512, 512)


class VGGStage(nn.Module):
    """`depth` 3x3 convolutions `conv1` ..., each with its norm and activation, then the pool.

    Attributes:
      features: channels of every convolution.
      depth: number of convolutions.
      conv: makes a 3x3 convolution.
      conv_pool: makes the last convolution together with its activation and pool; None where a
        norm stands between them.
      norm: makes a norm.
      activation: the function.
    """

    features: int
    depth: int
    conv: Factory
    conv_pool: Factory | None
    norm: Factory
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(1, self.depth + 1):
            if index == self.depth and self.conv_pool is not None:
                x = self.conv_pool(self.features, name=f"conv{index}")(x)
            else:
                x = self.conv(self.features, name=f"conv{index}")(x)
                x = self.activation(self.norm(name=f"norm{index}")(x))
        if self.conv_pool is None:
            x = ops.max_pool(x, (2, 2), (2, 2))
        return stage_output(self, "output", x)


class VGG(nn.Module):
    """VGG with `stage_sizes` convolutions in its stages of 64, 128, 256, 512 and 512 channels.

    Attributes:
      stage_sizes: convolutions of each of the five stages.
      num_classes: the logits; None returns the features before them.
      stem: `imagenet`, the last stage averaged to 7x7 as in torchvision; or `cifar`, the last stage
        flattened as it is (1x1 for images of 32 to 63 pixels).
      dense_widths: units of the dense layers before the head.
      norm: `none`, `batch`, `group` or `layer`.
      activation: a name from `blocks.ACTIVATIONS` or a function.
      dropout_rate: after each dense layer but the head; random stream `dropout`.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: the mapped axis over which BatchNorm averages, under `pmap` or `shard_map`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; None: that of image and parameters.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Call: `image [batch, height, width, channels]`, at least 32x32 -> `[batch, num_classes]`.
    """

    stage_sizes: Sequence[int]
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dense_widths: Sequence[int] = (4096, 4096)
    norm: str = "none"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.5
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_stem(self.stem)
        require_image(image, "VGG", minimum=32)
        activation = activation_function(self.activation)
        layer = {
            "kernel_size": (3, 3),
            "padding": [(1, 1)] * 2,
            "kernel_init": he_normal_fan_out,
            "dtype": self.dtype,
        }
        fused = partial(ops.ConvPool, activation=activation, **layer)
        stage = partial(
            VGGStage,
            conv=partial(ops.Conv, **layer),
            conv_pool=fused if self.norm == "none" else None,
            norm=norm_layer(
                self.norm,
                train=train,
                axis_name=self.axis_name,
                group_size=self.norm_group_size,
                epsilon=self.norm_epsilon,
                momentum=self.norm_momentum,
                dtype=self.dtype,
            ),
            activation=activation,
        )
        x = image
        for index, (width, depth) in enumerate(zip(WIDTHS, self.stage_sizes, strict=True), 1):
            block = stage(width, depth, name=f"stage{index}")
            x = call_block(block, x, remat=self.remat and train)
        if self.stem == "imagenet":
            x = adaptive_average_pool(x, 7)
        x = x.reshape(x.shape[0], -1)
        init = nn.initializers.normal(0.01)
        for index, width in enumerate(self.dense_widths, 1):
            dense = nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f"dense{index}")
            x = nn.Dropout(self.dropout_rate)(activation(dense(x)), deterministic=not train)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="head")(x)


VGG11 = partial(VGG, stage_sizes=(1, 1, 2, 2, 2))
VGG13 = partial(VGG, stage_sizes=(2, 2, 2, 2, 2))
VGG16 = partial(VGG, stage_sizes=(2, 2, 3, 3, 3))
VGG19 = partial(VGG, stage_sizes=(2, 2, 4, 4, 4))
VGG11BN = partial(VGG11, norm="batch")
VGG13BN = partial(VGG13, norm="batch")
VGG16BN = partial(VGG16, norm="batch")
VGG19BN = partial(VGG19, norm="batch")
