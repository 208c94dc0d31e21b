"""Residual networks: ResNet v1, v1.5 and v2, CIFAR ResNet, Wide ResNet, ResNeXt, SE-ResNet.

The rows are in `cnnjax.models.resnet_rows`.

- v1: He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), Table 1;
  the stride of a bottleneck in its first 1x1 convolution.
- v1.5: the same with the stride in the 3x3 convolution, as in torchvision (the default here).
- v2: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027), Figure 4(e).
- v2_slim: v2 as TensorFlow-Slim wrote it and keras.applications has it: a stage's last block halves
  the resolution, and its shortcut takes every second pixel; what no normalization follows has a
  bias; the stem's pool pads with zeros.
- CIFAR: the first paper's section 4.2; shortcuts without parameters (its option A).
- Wide ResNet: Zagoruyko & Komodakis 2016 (arXiv 1605.07146); 50-2 and 101-2 as in torchvision.
- ResNeXt: Xie et al. 2017 (arXiv 1611.05431), Table 1.
- SE-ResNet: Hu et al. 2018 (arXiv 1709.01507), Table 1; reduction 16. ECA, CBAM and BAM: see
  `cnnjax.models.gates`.
- ResNet-C: three 3x3 convolutions as the stem; ResNet-D: also an average pool in front of a
  projection that halves. He et al. 2019, "Bag of Tricks" (arXiv 1812.01187), section 4.2.
- ResNet-RS: Bello et al. 2021 (arXiv 2103.07579), section 7 and Table 11: D with a gate, and a
  strided convolution in place of the stem's pool.
- BiT: Kolesnikov et al. 2020 (arXiv 1912.11370), section 3.2: v2 with GroupNorm and standardized
  kernels, any number of times as wide; the stem's pool pads with zeros.

Names follow torchvision's: `layer2.0.conv1` is `stage2/block1/conv1`, `bn1` is `norm1`,
`downsample.0` and `.1` are `downsample/conv` and `downsample/norm`, `fc` is `head`; the first
`conv1` and `bn1` are `stem/conv` and `stem/norm`; those of a deep stem are numbered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models import blocks
from cnnjax.models.gates import ATTENTIONS, BottleneckAttention, gate_branch
from cnnjax.models.images import require_image, require_stem
from cnnjax.models.layers import Array, Factories, Factory, Layers, check_name
from cnnjax.models.reshaped import input_width
from cnnjax.models.standardized_conv import StandardizedConv

# A residual branch as data: (features, kernel size, strides, groups) of each convolution.
Branch = Sequence[tuple[int, int, int, int]]

SHORTCUTS = ("projection", "pad", "average")
STEM_POOLS = ("max", "max_of_zeros", "conv")
VERSIONS = ("v1", "v1.5", "v2", "v2_slim")
BLOCKS = ("basic", "bottleneck")


def basic_branch(features: int, strides: int) -> Branch:
    """Two 3x3 convolutions (arXiv 1512.03385, Figure 5 left)."""
    return ((features, 3, strides, 1), (features, 3, 1, 1))


def bottleneck_branch(
    features: int, strides: int, *, groups: int = 1, width_per_group: int = 64, version: str
) -> Branch:
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide (Figure 5 right).

    The width between is `features * width_per_group / 64 * groups`, as in torchvision.
    """
    width = int(features * width_per_group / 64) * groups
    first, second = (strides, 1) if version == "v1" else (1, strides)
    return ((width, 1, first, 1), (width, 3, second, groups), (4 * features, 1, 1, 1))


def pad_shortcut(x: Array, features: int, strides: int) -> Array:
    """Every `strides`-th pixel, with zero channels appended (section 3.3, option A)."""
    x = x[:, ::strides, ::strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def mean_pixels(x: Array, strides: int) -> Array:
    """Means of `strides` by `strides` pixels, of fewer at the edge."""
    window = (strides, strides)
    return x if strides == 1 else ops.avg_pool(x, window, window, "SAME", count_include_pad=False)


def shortcut(x: Array, features: int, strides: int, layers: Factories, kind: str) -> Array:
    """Returns `x` in the shape of a branch's output, by `downsample` of the calling module.

    Args:
      x: input of the block.
      features: of the output.
      strides: of the branch.
      layers: of the projection.
      kind: `"projection"`; `"average"`, which projects `mean_pixels` (ResNet-D); `"pad"`.
    """
    if strides == 1 and input_width(x) == features:
        return x
    if kind == "pad":
        return pad_shortcut(x, features, strides)
    if kind == "average":
        x, strides = mean_pixels(x, strides), 1
    return blocks.ConvNorm(features, 1, layers, strides, linear=True, name="downsample")(x)


class ResidualBlock(nn.Module):
    """`activation(shortcut(x) + branch(x))`, each convolution followed by a normalization.

    Attributes:
      branch: the convolutions.
      shortcut: `"projection"` (1x1 convolution), `"average"` or `"pad"`, where the shape changes.
      zero_init_residual: the branch's last scale starts at 0 (arXiv 1706.02677, section 5.1).
      se_reduction: the factor of the squeeze-and-excite gate; 0 for no gate.
      attention: of the branch's output; see `gates.gate_branch`.
    """

    branch: Branch
    layers: Factories
    shortcut: str = "projection"
    zero_init_residual: bool = False
    se_reduction: int = 0
    attention: str = "none"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, features = self.layers, self.branch[-1][0]
        strides = max(strides for _, _, strides, _ in self.branch)
        y = x
        for number, (width, kernel_size, step, groups) in enumerate(self.branch, 1):
            last = number == len(self.branch)
            if last:
                y = nn.Dropout(self.dropout_rate, deterministic=not layers.train)(y)
            zero = last and self.zero_init_residual
            scale_init = nn.initializers.zeros if zero else nn.initializers.ones
            y = layers.conv(width, kernel_size, step, groups=groups, name=f"conv{number}")(y)
            y = layers.norm(scale_init=scale_init, name=f"norm{number}")(y)
            y = y if last else layers.activation(y)
        y = gate_branch(y, layers, self.attention, self.se_reduction)
        x = shortcut(x, features, strides, layers, self.shortcut)
        return layers.activation(x + blocks.drop_branch(self, y))


class PreActivationBlock(nn.Module):
    """`shortcut(x) + branch(x)`, each convolution preceded by normalization and activation.

    Where the shape changes, the shortcut is a bare convolution of the first activation, which both
    paths then share (arXiv 1603.05027, appendix). Dropout stands before the last convolution
    (arXiv 1605.07146, section 2.4). Attributes as in `ResidualBlock`, and `slim`: the block of
    `"v2_slim"`.
    """

    branch: Branch
    layers: Factories
    shortcut: str = "projection"
    se_reduction: int = 0
    attention: str = "none"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    slim: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, features = self.layers, self.branch[-1][0]
        strides = max(strides for _, _, strides, _ in self.branch)
        last_conv = functools.partial(layers.conv, use_bias=True) if self.slim else layers.conv
        y = layers.activation(layers.norm(name="norm1")(x))
        if strides != 1 or input_width(x) != features:
            if self.shortcut == "pad" or (self.slim and input_width(x) == features):
                x = pad_shortcut(x, features, strides)
            elif self.shortcut == "average":
                x = last_conv(features, 1, 1, name="downsample")(mean_pixels(y, strides))
            else:
                x = last_conv(features, 1, strides, name="downsample")(y)
        for number, (width, kernel_size, step, groups) in enumerate(self.branch, 1):
            if number > 1:
                y = layers.activation(layers.norm(name=f"norm{number}")(y))
            conv = layers.conv
            if number == len(self.branch):
                y, conv = (
                    nn.Dropout(self.dropout_rate, deterministic=not layers.train)(y),
                    last_conv,
                )
            y = conv(width, kernel_size, step, groups=groups, name=f"conv{number}")(y)
        y = gate_branch(y, layers, self.attention, self.se_reduction)
        return x + blocks.drop_branch(self, y)


class Stem(nn.Module):
    """Convolutions, and a pool at stride 2 unless the images are small.

    Attributes:
      kind: `"imagenet"`: the first convolution is 7x7 at stride 2; `"cifar"`: 3x3 at stride 1.
      features: channels of the output.
      version: in v2 the last convolution is bare: the first block begins with the normalization.
        In v2_slim it has a bias.
      widths: channels of the convolutions before the last one; with any, all are 3x3.
      pool: `"max"` of 3x3; `"max_of_zeros"`: the zeros around the image count as pixels, as always
        in v2_slim; `"conv"`: a 3x3 convolution.
    """

    kind: str
    features: int
    layers: Factories
    version: str = "v1.5"
    widths: Sequence[int] = ()
    pool: str = "max"

    @nn.compact
    def __call__(self, image: Array) -> Array:
        layers, large = self.layers, self.kind == "imagenet"
        use_bias = {"use_bias": True} if self.version == "v2_slim" else {}
        widths = (*self.widths, self.features)
        kernel_size = 3 if self.widths or not large else 7
        x = image
        for number, width in enumerate(widths, 1):
            suffix = str(number) if self.widths else ""
            strides = 2 if large and number == 1 else 1
            x = layers.conv(width, kernel_size, strides, name=f"conv{suffix}", **use_bias)(x)
            if number < len(widths) or not self.version.startswith("v2"):
                x = layers.activation(layers.norm(name=f"norm{suffix}")(x))
        return self._pool(x) if large else x

    def _pool(self, x: Array) -> Array:
        if self.pool == "conv":
            return blocks.ConvNorm(self.features, 3, self.layers, 2, name="pool")(x)
        if self.pool == "max_of_zeros" or self.version == "v2_slim":
            return ops.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))
        return ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def stage_blocks(
    stage_sizes: Sequence[int],
    make_block: Callable[[int, int, int], Factory],
    *,
    halve_last: bool = False,
) -> list[list[Factory]]:
    """Returns the blocks of each stage: `make_block(factor, strides, index)`.

    Args:
      stage_sizes: number of blocks of each stage.
      make_block: gets the factor of the first stage's width, twice as large in each stage; the
        strides, 2 where a stage but the first begins; and the block's number in it, from 0.
      halve_last: the strides are 2 where a stage but the last ends.
    """

    def strides(stage: int, index: int) -> int:
        if halve_last:
            halves = stage < len(stage_sizes) - 1 and index == stage_sizes[stage] - 1
        else:
            halves = stage > 0 and index == 0
        return 2 if halves else 1

    return [
        [make_block(2**stage, strides(stage, index), index) for index in range(depth)]
        for stage, depth in enumerate(stage_sizes)
    ]


def run_in_frame(module: Any, image: Array, *, train: bool) -> Array:
    """Stem, stages and head as ResNet's, of a network with other blocks: within its `__call__`.

    Args:
      module: with the fields of ResNet, and `_block` as `stage_blocks` calls it.
      image: `[batch, height, width, channels]`.
      train: whether batch norm takes the batch's statistics, and dropout acts.

    Returns:
      Logits `[batch, classes]`, or the pooled features.

    Raises:
      UserError: an unknown stem or shortcut, or the image is not four-dimensional.
    """
    require_image(image, type(module).__name__)
    require_stem(module.stem)
    check_name("shortcut", module.shortcut, SHORTCUTS)
    layers = module.layers.factories(train=train)
    stem = Stem(module.stem, module.stem_features, layers, widths=module.stem_widths, name="stem")
    x = blocks.run_stages(
        stem(image),
        stage_blocks(module.stage_sizes, module._block),
        layers,
        stochastic_depth_rate=module.stochastic_depth_rate,
    )
    return blocks.classify(x, module.num_classes, layers, dropout_rate=module.dropout_rate)


class ResNet(nn.Module):
    """A residual network: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: number of blocks of each stage; each stage but the first halves the resolution
        and doubles the features.
      block: `"basic"` or `"bottleneck"`.
      num_classes: of the head; `None` returns the pooled features.
      version: `"v1"`, `"v1.5"`, `"v2"` or `"v2_slim"`.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features: channels of the stem.
      stem_widths: channels of its convolutions before the last one; none for one convolution.
      stem_pool: `"max"`, `"max_of_zeros"` or `"conv"`; see `Stem`.
      features: width of the first stage; a bottleneck's output is four times as wide.
      groups, width_per_group: of the 3x3 convolution of a bottleneck.
      shortcut: `"projection"`, `"average"` or `"pad"`, where the shape changes.
      se_reduction: the factor of the squeeze-and-excite gate; 0 for none.
      attention: `"none"`; `"eca"` or `"cbam"` in each block; `"bam"` between stages.
      weight_standardization: whether kernels of convolutions are standardized.
      conv_bias: whether convolutions before a normalization have a bias, too, as Keras's v1 has.
      dropout_rate: before the head.
      block_dropout_rate: before the last convolution of each block.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      zero_init_residual: each block starts as the identity; v1 and v1.5.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, an option does not fit the version, or the image
        is not four-dimensional.
    """

    stage_sizes: Sequence[int]
    block: str = "bottleneck"
    num_classes: int | None = 1000
    version: str = "v1.5"
    stem: str = "imagenet"
    stem_features: int = 64
    stem_widths: Sequence[int] = ()
    stem_pool: str = "max"
    features: int = 64
    groups: int = 1
    width_per_group: int = 64
    shortcut: str = "projection"
    se_reduction: int = 0
    attention: str = "none"
    weight_standardization: bool = False
    conv_bias: bool = False
    dropout_rate: float = 0.0
    block_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    zero_init_residual: bool = False
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "ResNet")
        self._check()
        layers = self.layers.factories(train=train, conv_bias=self.conv_bias)
        if self.weight_standardization:
            conv = functools.partial(layers.conv, layer=StandardizedConv)
            layers = dataclasses.replace(layers, conv=conv)
        x = Stem(
            self.stem,
            self.stem_features,
            layers,
            self.version,
            self.stem_widths,
            self.stem_pool,
            name="stem",
        )(image)
        x = blocks.run_stages(
            x,
            stage_blocks(self.stage_sizes, self._block, halve_last=self.version == "v2_slim"),
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
            between=functools.partial(self._between, layers),
        )
        if self.version.startswith("v2"):
            x = layers.activation(layers.norm(name="norm")(x))
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def _between(self, layers: Factories, stage: int, x: Array) -> Array:
        if self.attention != "bam":
            return x
        return BottleneckAttention(layers, name=f"bam{stage}")(x)

    def _block(self, factor: int, strides: int, index: int) -> Factory:
        del index
        features = self.features * factor
        if self.block == "basic":
            branch = basic_branch(features, strides)
        else:
            branch = bottleneck_branch(
                features,
                strides,
                groups=self.groups,
                width_per_group=self.width_per_group,
                version=self.version,
            )
        block = functools.partial(
            PreActivationBlock if self.version.startswith("v2") else ResidualBlock,
            branch,
            shortcut=self.shortcut,
            se_reduction=self.se_reduction,
            attention=self.attention,
            dropout_rate=self.block_dropout_rate,
        )
        if self.version.startswith("v2"):
            return functools.partial(block, slim=self.version == "v2_slim")
        return functools.partial(block, zero_init_residual=self.zero_init_residual)

    def _check(self) -> None:
        require_stem(self.stem)
        for kind, name, valid in (
            ("block", self.block, BLOCKS),
            ("version", self.version, VERSIONS),
            ("shortcut", self.shortcut, SHORTCUTS),
            ("stem_pool", self.stem_pool, STEM_POOLS),
            ("attention", self.attention, ATTENTIONS),
        ):
            check_name(kind, name, valid)
        if self.block == "basic" and (self.groups != 1 or self.width_per_group != 64):
            raise UserError(
                f"groups={self.groups} and width_per_group={self.width_per_group} need "
                "block='bottleneck'; the basic block's width is set by features."
            )
        if self.version.startswith("v2") and self.zero_init_residual:
            raise UserError(
                "zero_init_residual=True needs version 'v1' or 'v1.5': in "
                f"{self.version!r} no normalization ends a branch."
            )
