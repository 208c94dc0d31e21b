"""SKNet: residual networks whose units weigh kernels of two sizes against each other.

Li et al. 2019, "Selective Kernel Networks" (arXiv 1903.06586), section 3. Its SKNet-50 is
`sk_resnext50_32x4d`. In the other rows, which are timm's, each kernel sees half of the channels
(`split_input`). The 5x5 kernel is a 3x3 one with holes, as in the paper.

Names: timm's `layer1.0.conv2` is `stage1/block1/conv2`; in it `paths.0` is `path1` and `attn` is
`reduce`, `norm` and `select`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.layers import Array, Factories, Factory, Layers, check_name
from cnnjax.models.resnet import BLOCKS, run_in_frame, shortcut
from cnnjax.models.rows import TIMM, row

# Distance of taps in the 3x3 kernel of each path: windows of 3x3 and 5x5.
DILATIONS = (1, 2)


class SelectiveKernel(nn.Module):
    """Two convolutions, summed with weights that a softmax over them gives each channel.

    Attributes:
      features: channels of the output.
      strides, groups: of both.
      gate_features: channels inside the gate.
      split_input: whether the first sees the first half of the channels, the second the other.
    """

    features: int
    layers: Factories
    strides: int
    groups: int
    gate_features: int
    split_input: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, features = self.layers, self.features
        inputs = jnp.split(x, 2, axis=-1) if self.split_input else (x, x)
        first, second = (
            blocks.ConvNorm(
                features, 3, layers, self.strides, self.groups, dilation=dilation, name=f"path{i}"
            )(part)
            for i, (part, dilation) in enumerate(zip(inputs, DILATIONS, strict=True), 1)
        )
        means = jnp.mean(first + second, axis=(1, 2), keepdims=True)
        hidden = layers.conv(self.gate_features, 1, use_bias=False, name="reduce")(means)
        hidden = layers.activation(layers.norm(name="norm")(hidden))
        gates = layers.conv(2 * features, 1, use_bias=False, name="select")(hidden)
        gates = nn.softmax(gates.reshape(-1, 1, 1, 2, features), axis=3)
        return first * gates[..., 0, :] + second * gates[..., 1, :]


class SelectiveBlock(nn.Module):
    """`activation(shortcut(x) + branch(x))`, a `SelectiveKernel` in place of a 3x3 convolution.

    Attributes:
      features: channels of the output.
      width: of the 3x3 convolution, or `features` for the basic block, whose first it replaces.
      strides: of the selective kernel.
      kernel: makes it, with these.
      shortcut: see `resnet.shortcut`.
    """

    features: int
    width: int
    strides: int
    kernel: Factory
    shortcut: str
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        kernel = functools.partial(self.kernel, self.width, self.layers, self.strides)
        if self.width == self.features:
            y = kernel(name="conv1")(x)
            y = conv_norm(self.features, 3, linear=True, name="conv2")(y)
        else:
            y = conv_norm(self.width, 1, name="conv1")(x)
            y = kernel(name="conv2")(y)
            y = conv_norm(self.features, 1, linear=True, name="conv3")(y)
        x = shortcut(x, self.features, self.strides, self.layers, self.shortcut)
        return self.layers.activation(x + blocks.drop_branch(self, y))


class SKNet(nn.Module):
    """SKNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: number of blocks of each stage; each stage but the first halves the resolution
        and doubles the features.
      block: `"basic"` or `"bottleneck"`.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features, stem_widths: see `resnet.Stem`.
      features: width of the first stage; a bottleneck's output is four times as wide.
      groups, width_per_group: of a bottleneck's selective kernel.
      shortcut: `"projection"`, `"average"` or `"pad"`; see `resnet.shortcut`.
      split_input: whether each kernel sees half of the channels.
      gate_ratio: channels inside the gate per channel.
      gate_divisor: of which they are a multiple.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image is not four-dimensional.
    """

    stage_sizes: Sequence[int]
    block: str = "bottleneck"
    num_classes: int | None = 1000
    stem: str = "imagenet"
    stem_features: int = 64
    stem_widths: Sequence[int] = ()
    features: int = 64
    groups: int = 1
    width_per_group: int = 64
    shortcut: str = "projection"
    split_input: bool = True
    gate_ratio: float = 1 / 16
    gate_divisor: int = 8
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        check_name("block", self.block, BLOCKS)
        return run_in_frame(self, image, train=train)

    def _block(self, factor: int, strides: int, index: int) -> Factory:
        del index
        features = self.features * factor
        width = features
        if self.block == "bottleneck":
            width, features = (
                int(features * self.width_per_group / 64) * self.groups,
                4 * features,
            )
        kernel = functools.partial(
            SelectiveKernel,
            groups=self.groups,
            gate_features=blocks.make_divisible(width * self.gate_ratio, self.gate_divisor),
            split_input=self.split_input,
        )
        return functools.partial(
            SelectiveBlock, features, width, strides, kernel, shortcut=self.shortcut
        )


timm = functools.partial(row, SKNet, source=TIMM)
basic = functools.partial(timm, block="basic", gate_ratio=1 / 8, gate_divisor=16)
resnet50 = functools.partial(timm, stage_sizes=(3, 4, 6, 3))

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "sk_resnet18": basic(
        11_958_056, 13_952, 1_814_337_536, stage_sizes=(2, 2, 2, 2), also={"timm": "skresnet18"}
    ),
    "sk_resnet34": basic(
        22_282_376, 25_568, 3_664_237_568, stage_sizes=(3, 4, 6, 3), also={"timm": "skresnet34"}
    ),
    "sk_resnet50": resnet50(25_803_160, 61_168, 4_089_422_336, also={"timm": "skresnet50"}),
    "sk_resnet50d": resnet50(
        25_822_392,
        61_296,
        4_329_062_912,
        stem_widths=(32, 32),
        shortcut="average",
        also={"timm": "skresnet50d"},
    ),
    "sk_resnext50_32x4d": resnet50(
        27_479_784,
        84_544,
        4_462_710_784,
        groups=32,
        width_per_group=4,
        split_input=False,
        gate_divisor=32,
        also={"timm": "skresnext50_32x4d"},
    ),
}
