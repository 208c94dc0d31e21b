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

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, require_stem
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TORCHVISION, also_called, row

he_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DenseLayer(nn.Module):
    """Appends `growth` features computed by a 1x1 and a 3x3 convolution.

    Norm, activation, 1x1 to `4 * growth`, norm, activation, 3x3 to `growth` (section 3,
    "Bottleneck layers"), then dropout.
    """

    growth: int
    layers: Factories
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.layers.activation(self.layers.norm(name="norm1")(x))
        y = self.layers.conv(4 * self.growth, 1, name="conv1")(y)
        y = self.layers.activation(self.layers.norm(name="norm2")(y))
        y = self.layers.conv(self.growth, 3, name="conv2")(y)
        y = nn.Dropout(self.dropout_rate, deterministic=not self.layers.train)(y)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nn.Module):
    """Halves resolution and features: norm, activation, 1x1 convolution, 2x2 average pool."""

    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.layers.activation(self.layers.norm(name="norm")(x))
        return ops.avg_pool(self.layers.conv(x.shape[-1] // 2, 1, name="conv")(y), (2, 2), (2, 2))


class Stem(nn.Module):
    """`"imagenet"`: 7x7 convolution at stride 2, norm, 3x3 max pool; `"cifar"`: 3x3 convolution.

    The small stem is bare: the first layer begins with the normalization.
    """

    kind: str
    features: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        if self.kind == "cifar":
            x = self.layers.conv(self.features, 3, name="conv")(image)
        else:
            x = self.layers.conv(self.features, 7, 2, name="conv")(image)
            x = self.layers.activation(self.layers.norm(name="norm")(x))
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
      dropout_rate: before the head.
      block_dropout_rate: after each layer.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    growth: int
    stem_features: int
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    block_dropout_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        minimum = 2 ** (len(self.stage_sizes) - 1) * (4 if self.stem == "imagenet" else 1)
        require_image(image, "DenseNet", minimum=minimum)
        require_stem(self.stem)
        layers = self.layers.factories(train=train, kernel_init=he_normal_fan_in)
        layer = functools.partial(DenseLayer, self.growth, dropout_rate=self.block_dropout_rate)
        x = Stem(self.stem, self.stem_features, layers, name="stem")(image)
        x = blocks.run_stages(
            x,
            [[layer] * depth for depth in self.stage_sizes],
            layers,
            between=lambda stage, x: Transition(layers, name=f"transition{stage}")(x),
        )
        x = layers.activation(layers.norm(name="norm")(x))
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


published = functools.partial(row, DenseNet, source=TORCHVISION)
growth32 = functools.partial(published, growth=32, stem_features=64)
growth48 = functools.partial(published, growth=48, stem_features=96)

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "densenet121": growth32(7_978_856, 83_648, 2_834_161_664, stage_sizes=(6, 12, 24, 16)),
    "densenet161": growth48(28_681_000, 219_936, 7_727_907_072, stage_sizes=(6, 12, 36, 24)),
    "densenet169": growth32(14_149_480, 158_400, 3_359_843_328, stage_sizes=(6, 12, 32, 32)),
    "densenet201": growth32(20_013_928, 229_056, 4_291_365_888, stage_sizes=(6, 12, 48, 32)),
    # Depth 100 is 3 stages of 16 layers of 2 convolutions, 2 transitions, the stem and the head.
    "cifar_densenet_bc100": row(
        DenseNet,
        769_162,
        23_988,
        287_929_692,
        source="by hand, tests/models/test_densenet.py",
        image=(32, 32, 3),
        num_classes=10,
        stage_sizes=(16, 16, 16),
        growth=12,
        stem_features=24,
        stem="cifar",
    ),
}
ROWS |= also_called(ROWS, "keras", {f"densenet{n}": f"DenseNet{n}" for n in (121, 169, 201)})
