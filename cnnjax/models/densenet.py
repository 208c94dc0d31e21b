"""DenseNet: every layer sees the features of all layers before it in its stage.

Huang et al. 2017, "Densely Connected Convolutional Networks" (arXiv 1608.06993): Table 1 for
ImageNet, section 4 for DenseNet-BC on CIFAR. 161 (growth 48) as in torchvision.

Names follow torchvision's: `denseblock1.denselayer2.conv1` is `stage1/block2/conv1`, `transition1`
keeps its name, `conv0` and `norm0` are `stem/conv` and `stem/norm`, `norm5` is `norm`, `classifier`
is `head`.
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

he_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """Appends `growth` features computed by a 1x1 and a 3x3 convolution.

    Norm, activation, 1x1 to `4 * growth`, norm, activation, 3x3 to `growth` (section 3,
    "Bottleneck layers"), then dropout.
    """

    growth: int
    conv: Factory
    norm: Factory
    activation: Activation
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        y = self.activation(self.norm(name="norm1")(x))
        y = self.conv(4 * self.growth, 1, name="conv1")(y)
        y = self.activation(self.norm(name="norm2")(y))
        y = self.conv(self.growth, 3, name="conv2")(y)
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Halves resolution and features: norm, activation, 1x1 convolution, 2x2 average pool."""

    conv: Factory
    norm: Factory
    activation: Activation

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.activation(self.norm(name="norm")(x))
        return ops.avg_pool(self.conv(x.shape[-1] // 2, 1, name="conv")(y), (2, 2), (2, 2))


class Stem(nn.Module):
    """`"imagenet"`: 7x7 convolution at stride 2, norm, 3x3 max pool; `"cifar"`: 3x3 convolution.

    The small stem is bare: the first layer begins with the normalisation.
    """

    kind: str
    features: int
    conv: Factory
    norm: Factory
    activation: Activation

    @nn.compact
    def __call__(self, image: Array) -> Array:
        if self.kind == "cifar":
            x = self.conv(self.features, 3, name="conv")(image)
        else:
            x = self.conv(self.features, 7, 2, name="conv")(image)
            x = self.activation(self.norm(name="norm")(x))
            x = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x


class DenseNet(nn.Module):
    """DenseNet-BC: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: number of layers of each stage; a transition halves the resolution between.
      growth: features that each layer adds.
      stem_features: channels of the stem.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      norm: `"batch"`, `"group"`, `"layer"` or `"none"`.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      dropout_rate: before the head.
      block_dropout_rate: after each layer.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: mapped axis for the statistics of batch norm; `None` outside `pmap`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    growth: int
    stem_features: int
    num_classes: int | None = 1000
    stem: str = "imagenet"
    norm: str = "batch"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.0
    block_dropout_rate: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        minimum = 2 ** (len(self.stage_sizes) - 1) * (4 if self.stem == "imagenet" else 1)
        require_image(image, "DenseNet", minimum=minimum)
        require_stem(self.stem)
        layers = blocks.layers_of(self, train=train, kernel_init=he_normal_fan_in)
        layer = functools.partial(
            DenseLayer, self.growth, dropout_rate=self.block_dropout_rate, **layers
        )
        x = Stem(self.stem, self.stem_features, name="stem", **layers)(image)
        for stage, depth in enumerate(self.stage_sizes, 1):
            if stage > 1:
                x = Transition(name=f"transition{stage - 1}", **layers)(x)
            x = blocks.Stage([layer] * depth, self.remat, name=f"stage{stage}")(x, train=train)
        x = layers["activation"](layers["norm"](name="norm")(x))
        return blocks.classify(
            jnp.mean(x, axis=(1, 2)),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )


densenet121 = functools.partial(DenseNet, stage_sizes=(6, 12, 24, 16), growth=32, stem_features=64)
densenet161 = functools.partial(DenseNet, stage_sizes=(6, 12, 36, 24), growth=48, stem_features=96)
densenet169 = functools.partial(DenseNet, stage_sizes=(6, 12, 32, 32), growth=32, stem_features=64)
densenet201 = functools.partial(DenseNet, stage_sizes=(6, 12, 48, 32), growth=32, stem_features=64)

# Depth 100 is 3 stages of 16 layers of 2 convolutions, 2 transitions, the stem and the head.
cifar_densenet_bc100 = functools.partial(
    DenseNet,
    stage_sizes=(16, 16, 16),
    growth=12,
    stem_features=24,
    num_classes=10,
    stem="cifar",
)
