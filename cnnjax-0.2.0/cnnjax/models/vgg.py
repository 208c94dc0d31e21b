"""VGG: stages of 3x3 convolutions, each ended by a 2x2 max pool, then three dense layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015 (arXiv 1409.1556), table 1, configurations A, B, D and E; with batch normalization as
torchvision's `vgg*_bn` (convolutions keep their bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax

from cnnjax import ops
from cnnjax.models.blocks import call_block, classify
from cnnjax.models.images import adaptive_average_pool, require_image, require_stem
from cnnjax.models.layers import Factories, Factory, Layers, he_normal_fan_out
from cnnjax.models.rows import TORCHVISION, also_called, row
from cnnjax.models.stages import stage_output

WIDTHS = (64, 128, 256, 512, 512)


class VGGStage(nn.Module):
    """`depth` 3x3 convolutions `conv1` ..., each with its norm and activation, then the pool.

    Attributes:
      features: channels of every convolution.
      depth: number of convolutions.
      conv_pool: makes the last convolution together with its activation and pool; None where a
        norm stands between them.
    """

    features: int
    depth: int
    layers: Factories
    conv_pool: Factory | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(1, self.depth + 1):
            if index == self.depth and self.conv_pool is not None:
                x = self.conv_pool(self.features, name=f"conv{index}")(x)
            else:
                x = self.layers.conv(self.features, 3, name=f"conv{index}")(x)
                x = self.layers.activation(self.layers.norm(name=f"norm{index}")(x))
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
      dropout_rate: after each dense layer but the head; random stream `dropout`.
      layers: what all layers share; see `Layers`.

    Call: `image [batch, height, width, channels]`, at least 32x32 -> `[batch, num_classes]`.
    """

    stage_sizes: Sequence[int]
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dense_widths: Sequence[int] = (4096, 4096)
    dropout_rate: float = 0.5
    layers: Layers = Layers(norm="none")

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_stem(self.stem)
        require_image(image, "VGG", minimum=32)
        layers = self.layers.factories(train=train, conv_bias=True)
        conv_pool = partial(
            ops.ConvPool,
            kernel_size=(3, 3),
            padding=[(1, 1)] * 2,
            activation=layers.activation,
            kernel_init=he_normal_fan_out,
            dtype=layers.dtype,
        )
        x = image
        for index, (width, depth) in enumerate(zip(WIDTHS, self.stage_sizes, strict=True), 1):
            fused = conv_pool if self.layers.norm == "none" else None
            x = call_block(VGGStage(width, depth, layers, fused, name=f"stage{index}"), x, layers)
        if self.stem == "imagenet":
            x = adaptive_average_pool(x, 7)
        x = x.reshape(x.shape[0], -1)
        init = nn.initializers.normal(0.01)
        for index, width in enumerate(self.dense_widths, 1):
            dense = nn.Dense(width, kernel_init=init, dtype=layers.dtype, name=f"dense{index}")
            x = layers.activation(dense(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return classify(x, self.num_classes, layers, kernel_init=init)


published = partial(row, VGG, source=TORCHVISION)
# Table 1, configurations A, B, D and E.
vgg11 = partial(published, stage_sizes=(1, 1, 2, 2, 2))
vgg13 = partial(published, stage_sizes=(2, 2, 2, 2, 2))
vgg16 = partial(published, stage_sizes=(2, 2, 3, 3, 3))
vgg19 = partial(published, stage_sizes=(2, 2, 4, 4, 4))

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "vgg11": vgg11(132_863_336, 0, 7_609_090_048),
    "vgg11_bn": vgg11(132_868_840, 5_504, 7_609_090_048, norm="batch"),
    "vgg13": vgg13(133_047_848, 0, 11_308_466_176),
    "vgg13_bn": vgg13(133_053_736, 5_888, 11_308_466_176, norm="batch"),
    "vgg16": vgg16(138_357_544, 0, 15_470_264_320),
    "vgg16_bn": vgg16(138_365_992, 8_448, 15_470_264_320, norm="batch"),
    "vgg19": vgg19(143_667_240, 0, 19_632_062_464),
    "vgg19_bn": vgg19(143_678_248, 11_008, 19_632_062_464, norm="batch"),
}
ROWS |= also_called(ROWS, "keras", {"vgg16": "VGG16", "vgg19": "VGG19"})
