"""Residual networks: ResNet v1, v1.5 and v2, CIFAR ResNet, Wide ResNet, ResNeXt, SE-ResNet.

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
- SE-ResNet: Hu et al. 2018 (arXiv 1709.01507), Table 1; reduction 16.

Names follow torchvision's: `layer2.0.conv1` is `stage2/block1/conv1`, `bn1` is `norm1`,
`downsample.0` and `.1` are `downsample/conv` and `downsample/norm`, `fc` is `head`; the first
`conv1` and `bn1` are `stem/conv` and `stem/norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models import blocks
from cnnjax.models.images import require_image, require_stem
from cnnjax.models.layers import Array, Factories, Factory, Layers, check_name
from cnnjax.models.rows import TIMM, TORCHVISION, also_called, row

# A residual branch as data: (features, kernel size, strides, groups) of each convolution.
Branch = Sequence[tuple[int, int, int, int]]

SHORTCUTS = ("projection", "pad")
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


class ResidualBlock(nn.Module):
    """`activation(shortcut(x) + branch(x))`, each convolution followed by a normalization.

    Attributes:
      branch: the convolutions.
      shortcut: `"projection"` (1x1 convolution) or `"pad"`, where the shape changes.
      zero_init_residual: the branch's last scale starts at 0 (arXiv 1706.02677, section 5.1).
      se_reduction: the factor of the squeeze-and-excite gate; 0 for no gate.
    """

    branch: Branch
    layers: Factories
    shortcut: str = "projection"
    zero_init_residual: bool = False
    se_reduction: int = 0
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
        if self.se_reduction:
            y = blocks.SqueezeExcite(features // self.se_reduction, layers.conv, name="se")(y)
        if strides != 1 or x.shape[-1] != features:
            if self.shortcut == "pad":
                x = pad_shortcut(x, features, strides)
            else:
                x = blocks.ConvNorm(features, 1, layers, strides, linear=True, name="downsample")(x)
        return layers.activation(x + blocks.drop_branch(self, y))


class PreActivationBlock(nn.Module):
    """`shortcut(x) + branch(x)`, each convolution preceded by normalization and activation.

    Where the shape changes, the shortcut is a bare convolution of the first activation, which both
    paths then share (arXiv 1603.05027, appendix). Dropout stands before the last convolution
    (arXiv 1605.07146, section 2.4). Attributes as in `ResidualBlock`, and
      slim: the block of `"v2_slim"`.
    """

    branch: Branch
    layers: Factories
    shortcut: str = "projection"
    se_reduction: int = 0
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    slim: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, features = self.layers, self.branch[-1][0]
        strides = max(strides for _, _, strides, _ in self.branch)
        last_conv = functools.partial(layers.conv, use_bias=True) if self.slim else layers.conv
        y = layers.activation(layers.norm(name="norm1")(x))
        if strides != 1 or x.shape[-1] != features:
            if self.shortcut == "pad" or (self.slim and x.shape[-1] == features):
                x = pad_shortcut(x, features, strides)
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
        if self.se_reduction:
            y = blocks.SqueezeExcite(features // self.se_reduction, layers.conv, name="se")(y)
        return x + blocks.drop_branch(self, y)


class Stem(nn.Module):
    """`"imagenet"`: 7x7 convolution at stride 2 and 3x3 max pool at stride 2; `"cifar"`: 3x3.

    In v2 the convolution is bare: the first block begins with the normalization. In v2_slim it has
    a bias, and the pool takes the zeros around the image for pixels.
    """

    kind: str
    features: int
    layers: Factories
    version: str = "v1.5"

    @nn.compact
    def __call__(self, image: Array) -> Array:
        layers = self.layers
        large, slim = self.kind == "imagenet", self.version == "v2_slim"
        conv = functools.partial(layers.conv, use_bias=True) if slim else layers.conv
        x = conv(self.features, 7 if large else 3, 2 if large else 1, name="conv")(image)
        if not self.version.startswith("v2"):
            x = layers.activation(layers.norm(name="norm")(x))
        if large and slim:
            x = ops.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))
        elif large:
            x = ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x


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
      features: width of the first stage; a bottleneck's output is four times as wide.
      groups, width_per_group: of the 3x3 convolution of a bottleneck.
      shortcut: `"projection"` or `"pad"`, where the shape changes.
      se_reduction: the factor of the squeeze-and-excite gate; 0 for none.
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
    features: int = 64
    groups: int = 1
    width_per_group: int = 64
    shortcut: str = "projection"
    se_reduction: int = 0
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
        x = Stem(self.stem, self.stem_features, layers, self.version, name="stem")(image)
        x = blocks.run_stages(
            x,
            [
                [self._block(stage, index) for index in range(depth)]
                for stage, depth in enumerate(self.stage_sizes, 1)
            ],
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
        )
        if self.version.startswith("v2"):
            x = layers.activation(layers.norm(name="norm")(x))
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def _block(self, stage: int, index: int) -> Factory:
        features = self.features * 2 ** (stage - 1)
        slim = self.version == "v2_slim"
        if slim:
            halves = stage < len(self.stage_sizes) and index == self.stage_sizes[stage - 1] - 1
        else:
            halves = stage > 1 and index == 0
        strides = 2 if halves else 1
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
            dropout_rate=self.block_dropout_rate,
        )
        if self.version.startswith("v2"):
            return functools.partial(block, slim=slim)
        return functools.partial(block, zero_init_residual=self.zero_init_residual)

    def _check(self) -> None:
        require_stem(self.stem)
        for kind, name, valid in (
            ("block", self.block, BLOCKS),
            ("version", self.version, VERSIONS),
            ("shortcut", self.shortcut, SHORTCUTS),
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


published = functools.partial(row, ResNet, source=TORCHVISION)
resnet18 = functools.partial(published, block="basic", stage_sizes=(2, 2, 2, 2))
resnet34 = functools.partial(published, block="basic", stage_sizes=(3, 4, 6, 3))
resnet50 = functools.partial(published, stage_sizes=(3, 4, 6, 3))
resnet101 = functools.partial(published, stage_sizes=(3, 4, 23, 3))
resnet152 = functools.partial(published, stage_sizes=(3, 8, 36, 3))
cifar = functools.partial(
    row,
    ResNet,
    source="by hand, tests/models/test_resnet.py",
    image=(32, 32, 3),
    num_classes=10,
    block="basic",
    stem="cifar",
    stem_features=16,
)
option_a = functools.partial(cifar, features=16, shortcut="pad")
# Depth 28 is 6 * 4 + 4: three stages of four blocks (arXiv 1605.07146, Table 1), ten times as wide.
wide = functools.partial(cifar, version="v2")
V1 = "v1.5 less 3 * 77,070,336: a stage's first convolution is at the lower resolution"

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "resnet18": resnet18(11_689_512, 9_600, 1_814_073_344),
    "resnet34": resnet34(21_797_672, 17_024, 3_663_761_408),
    "resnet50": resnet50(25_557_032, 53_120, 4_089_184_256),
    "resnet101": resnet101(44_549_160, 105_344, 7_801_405_440),
    "resnet152": resnet152(60_192_808, 151_424, 11_513_626_624),
    "resnet50_v1": resnet50(25_557_032, 53_120, 3_857_973_248, source=V1, version="v1"),
    "resnet101_v1": resnet101(44_549_160, 105_344, 7_570_194_432, source=V1, version="v1"),
    "resnet152_v1": resnet152(60_192_808, 151_424, 11_282_415_616, source=V1, version="v1"),
    "resnet18_v2": resnet18(
        11_687_720, 7_808, 1_814_073_344, source=TIMM, version="v2", also={"timm": "resnetv2_18"}
    ),
    "resnet34_v2": resnet34(
        21_795_880, 15_232, 3_663_761_408, source=TIMM, version="v2", also={"timm": "resnetv2_34"}
    ),
    "resnet50_v2": resnet50(
        25_549_352, 45_440, 4_089_184_256, source=TIMM, version="v2", also={"timm": "resnetv2_50"}
    ),
    "resnet101_v2": resnet101(
        44_541_480, 97_664, 7_801_405_440, source=TIMM, version="v2", also={"timm": "resnetv2_101"}
    ),
    "resnet152_v2": resnet152(
        60_185_128,
        143_744,
        11_513_626_624,
        source=TIMM,
        version="v2",
        also={"timm": "resnetv2_152"},
    ),
    "cifar_resnet20": option_a(269_722, 1_376, 40_551_040, stage_sizes=(3, 3, 3)),
    "cifar_resnet32": option_a(464_154, 2_272, 68_862_592, stage_sizes=(5, 5, 5)),
    "cifar_resnet44": option_a(658_586, 3_168, 97_174_144, stage_sizes=(7, 7, 7)),
    "cifar_resnet56": option_a(853_018, 4_064, 125_485_696, stage_sizes=(9, 9, 9)),
    "cifar_resnet110": option_a(1_727_962, 8_096, 252_887_680, stage_sizes=(18, 18, 18)),
    "wide_resnet28_10": wide(
        36_479_194, 17_952, 5_243_328_768, features=160, stage_sizes=(4, 4, 4)
    ),
    "wide_resnet50_2": resnet50(68_883_240, 68_224, 11_398_021_120, width_per_group=128),
    "wide_resnet101_2": resnet101(126_886_696, 137_856, 22_753_050_624, width_per_group=128),
    "resnext50_32x4d": resnet50(25_028_904, 68_224, 4_230_479_872, groups=32, width_per_group=4),
    "resnext101_32x4d": resnet101(44_177_704, 137_856, 7_969_996_800, groups=32, width_per_group=4),
    "resnext101_32x8d": resnet101(
        88_791_336, 202_880, 16_414_015_488, groups=32, width_per_group=8
    ),
    "se_resnet50": resnet50(
        28_088_024, 53_120, 4_091_699_200, source=TIMM, se_reduction=16, also={"timm": "seresnet50"}
    ),
}
KERAS = {"resnet{}": "ResNet{}", "resnet{}_v2": "ResNet{}V2"}
ROWS |= also_called(
    ROWS,
    "keras",
    {ours.format(n): theirs.format(n) for ours, theirs in KERAS.items() for n in (50, 101, 152)},
)
