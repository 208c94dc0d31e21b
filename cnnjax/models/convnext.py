"""ConvNeXt: a ResNet made over after the vision transformer.

Liu et al. 2022, "A ConvNet for the 2020s" (arXiv 2201.03545), section 2 and appendix A.

Names: torchvision's `features.1.0.block.0`, `.2`, `.3`, `.5` and `layer_scale` are
`stage1/block1/depthwise`, `norm`, `expand`, `project` and `layer_scale`; `features.2.0` and `.1`
are `downsample1/norm` and `/conv`; `features.0` is `stem`; `classifier.0` is `norm`, `.2` is
`head`.
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

truncated_normal = nn.initializers.truncated_normal(0.02)


class ConvNeXtBlock(nn.Module):
    """7x7 convolution of each channel, norm, two dense layers over channels, added scaled.

    The paper's Figure 4, right. `layer_scale` multiplies each channel of the branch.
    """

    conv: Factory
    norm: Factory
    activation: Activation
    layer_scale_init: float
    dtype: Any
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=truncated_normal)
        y = self.conv(channels, 7, groups=channels, name="depthwise")(x)
        y = self.norm(name="norm")(y)
        y = self.activation(dense(4 * channels, name="expand")(y))
        y = dense(channels, name="project")(y)
        scale = self.param(
            "layer_scale", nn.initializers.constant(self.layer_scale_init), (channels,)
        )
        y = y * scale.astype(y.dtype)
        return x + blocks.StochasticDepth(self.stochastic_depth_rate, name="drop")(y, train=train)


class Downsample(nn.Module):
    """Norm, then a 2x2 convolution at stride 2 (section 2.6)."""

    features: int
    norm: Factory
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.norm(name="norm")(x)
        return ops.Conv(
            self.features,
            (2, 2),
            strides=(2, 2),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="conv",
        )(x)


class Stem(nn.Module):
    """Convolution and norm: `"imagenet"` 4x4 at stride 4, `"cifar"` 3x3 at stride 1."""

    kind: str
    features: int
    norm: Factory
    dtype: Any

    @nn.compact
    def __call__(self, image: Array) -> Array:
        large = self.kind == "imagenet"
        size = 4 if large else 3
        x = ops.Conv(
            self.features,
            (size, size),
            strides=(4, 4) if large else (1, 1),
            padding="VALID" if large else "SAME",
            dtype=self.dtype,
            kernel_init=truncated_normal,
            name="conv",
        )(image)
        return self.norm(name="norm")(x)


class ConvNeXt(nn.Module):
    """ConvNeXt: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage.
      stage_features: channels of each stage.
      num_classes: of the head; `None` returns the pooled, normalised features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      norm: `"layer"`, `"batch"`, `"group"` or `"none"`.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      layer_scale_init: first value of each block's scale (Table 5).
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0 (Table 5).
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax, for batch norm.
      axis_name: mapped axis for the statistics of batch norm; `None` outside `pmap`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    stage_features: Sequence[int]
    num_classes: int | None = 1000
    stem: str = "imagenet"
    norm: str = "layer"
    activation: str | Activation = "gelu"
    layer_scale_init: float = 1e-6
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    norm_epsilon: float = 1e-6
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        minimum = 2 ** (len(self.stage_sizes) - 1) * (4 if self.stem == "imagenet" else 1)
        require_image(image, "ConvNeXt", minimum=minimum)
        require_stem(self.stem)
        layers = blocks.layers_of(self, train=train, kernel_init=truncated_normal)
        norm = layers["norm"]
        layers["conv"] = functools.partial(layers["conv"], use_bias=True)
        rates = iter(
            blocks.stochastic_depth_rates(self.stochastic_depth_rate, sum(self.stage_sizes))
        )
        x = Stem(self.stem, self.stage_features[0], norm, self.dtype, name="stem")(image)
        for stage, (depth, features) in enumerate(
            zip(self.stage_sizes, self.stage_features, strict=True), 1
        ):
            if stage > 1:
                x = Downsample(features, norm, self.dtype, name=f"downsample{stage - 1}")(x)
            stage_blocks = [
                functools.partial(
                    ConvNeXtBlock,
                    layer_scale_init=self.layer_scale_init,
                    dtype=self.dtype,
                    stochastic_depth_rate=next(rates),
                    **layers,
                )
                for _ in range(depth)
            ]
            x = blocks.Stage(stage_blocks, self.remat, name=f"stage{stage}")(x, train=train)
        return blocks.classify(
            norm(name="norm")(jnp.mean(x, axis=(1, 2))),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            kernel_init=truncated_normal,
        )


convnext_tiny = functools.partial(
    ConvNeXt,
    stage_sizes=(3, 3, 9, 3),
    stage_features=(96, 192, 384, 768),
    stochastic_depth_rate=0.1,
)
convnext_small = functools.partial(
    ConvNeXt,
    stage_sizes=(3, 3, 27, 3),
    stage_features=(96, 192, 384, 768),
    stochastic_depth_rate=0.4,
)
convnext_base = functools.partial(
    ConvNeXt,
    stage_sizes=(3, 3, 27, 3),
    stage_features=(128, 256, 512, 1024),
    stochastic_depth_rate=0.5,
)
convnext_large = functools.partial(
    ConvNeXt,
    stage_sizes=(3, 3, 27, 3),
    stage_features=(192, 384, 768, 1536),
    stochastic_depth_rate=0.5,
)
