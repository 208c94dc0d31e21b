"""DLA: deep layer aggregation, trees of blocks whose roots gather what the blocks computed.

Yu et al. 2017, "Deep Layer Aggregation" (arXiv 1707.06484), Figure 3f and Table 1. As in timm; the
projection that the authors' trees have and never use is left out.

Names: timm's `level2.tree1.conv1` is `stage1/block1/tree1/conv1`, `bn1` is `norm1`; `project` and
`root` keep their names, with `conv` and `norm`; `base_layer`, `level0` and `level1` are
`stem/base`, `stem/level0_1` and `stem/level1_1`; `fc` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import max_pool_ceil, require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers, check_name
from cnnjax.models.reshaped import input_width
from cnnjax.models.resnet import BLOCKS, Branch, basic_branch
from cnnjax.models.rows import TIMM, Row, row


def bottleneck_branch(features: int, strides: int, groups: int, width_per_group: int) -> Branch:
    """1x1, 3x3 and 1x1 convolutions, half as wide between (times the width of the groups)."""
    width = features * width_per_group // 64 * groups // 2
    return ((width, 1, 1, 1), (width, 3, strides, groups), (features, 1, 1, 1))


class Node(nn.Module):
    """`activation(shortcut + branch(x))`, each convolution followed by a normalization."""

    branch: Branch
    layers: Factories

    @nn.compact
    def __call__(self, x: Array, shortcut: Array) -> Array:
        layers = self.layers
        for number, (width, kernel_size, step, groups) in enumerate(self.branch, 1):
            x = layers.activation(x) if number > 1 else x
            x = layers.conv(width, kernel_size, step, groups=groups, name=f"conv{number}")(x)
            x = layers.norm(name=f"norm{number}")(x)
        return layers.activation(x + shortcut)


class Root(nn.Module):
    """Aggregation: a 1x1 convolution of all that it is given (section 3.1)."""

    features: int
    residual: bool
    layers: Factories

    @nn.compact
    def __call__(self, *children: Array) -> Array:
        layers = self.layers
        x = layers.conv(self.features, 1, name="conv")(jnp.concatenate(children, axis=-1))
        x = layers.norm(name="norm")(x)
        return layers.activation(x + children[0] if self.residual else x)


class Tree(nn.Module):
    """A tree of `2 ** levels` blocks (section 3.2).

    Attributes:
      levels: 1: two blocks and their root; more: two trees, the second of which gathers.
      features: of the output.
      strides: of the first block.
      branch: makes the convolutions of a block from `features` and `strides`.
      residual_root: whether a root adds the last block's output.
      keeps_input: whether the last root gathers the input, too, at the tree's resolution.
    """

    levels: int
    features: int
    strides: int
    branch: Any
    residual_root: bool
    layers: Factories
    keeps_input: bool = False

    @nn.compact
    def __call__(self, x: Array, children: tuple[Array, ...] = ()) -> Array:
        layers, features = self.layers, self.features
        bottom = x
        if self.strides > 1:
            bottom = max_pool_ceil(x, self.strides, self.strides)
        if self.keeps_input:
            children = (*children, bottom)
        if self.levels > 1:
            tree = functools.partial(
                Tree,
                self.levels - 1,
                features,
                branch=self.branch,
                residual_root=self.residual_root,
                layers=layers,
            )
            first = tree(strides=self.strides, name="tree1")(x)
            return tree(strides=1, name="tree2")(first, (*children, first))
        if input_width(x) != features:
            bottom = blocks.ConvNorm(features, 1, layers, linear=True, name="project")(bottom)
        first = Node(self.branch(features, self.strides), layers, name="tree1")(x, bottom)
        first = ops.computed_once_both_ways(first)
        second = Node(self.branch(features, 1), layers, name="tree2")(first, first)
        root = Root(features, self.residual_root, layers, name="root")
        return ops.computed_once_both_ways(root(second, first, *children))


class Stem(nn.Module):
    """A 7x7 convolution, then 3x3 ones at full and at half resolution."""

    features: Sequence[int]
    sizes: Sequence[int]
    strides: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        x = conv_norm(self.features[0], 7, name="base")(image)
        for level, (features, depth) in enumerate(zip(self.features, self.sizes, strict=True)):
            for number in range(1, depth + 1):
                strides = self.strides if level == 1 and number == 1 else 1
                x = conv_norm(features, 3, strides=strides, name=f"level{level}_{number}")(x)
        return x


class DLA(nn.Module):
    """DLA: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      levels: of the tree of each stage; each stage halves the resolution.
      stage_features: channels of each stage.
      num_classes: of the head; `None` returns the pooled features.
      block: `"basic"` or `"bottleneck"`.
      groups, width_per_group: of the 3x3 convolutions of a bottleneck.
      residual_root: whether roots add the last block's output.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features: channels at full and at half resolution.
      stem_sizes: numbers of the stem's 3x3 convolutions there.
      dropout_rate: before the head.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    levels: Sequence[int]
    stage_features: Sequence[int] = (128, 256, 512, 1024)
    num_classes: int | None = 1000
    block: str = "bottleneck"
    groups: int = 1
    width_per_group: int = 64
    residual_root: bool = False
    stem: str = "imagenet"
    stem_features: Sequence[int] = (16, 32)
    stem_sizes: Sequence[int] = (1, 1)
    dropout_rate: float = 0.0
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "DLA")
        check_name("block", self.block, BLOCKS)
        layers = self.layers.factories(train=train)
        branch: Any = basic_branch
        if self.block == "bottleneck":
            branch = functools.partial(
                bottleneck_branch, groups=self.groups, width_per_group=self.width_per_group
            )
        stem_strides, *strides = strides_for(self.stem, [2] * (1 + len(self.levels)))
        x = Stem(self.stem_features, self.stem_sizes, stem_strides, layers, name="stem")(image)
        trees = [
            functools.partial(
                Tree,
                levels,
                features,
                step,
                branch,
                self.residual_root,
                keeps_input=stage > 1,
            )
            for stage, (levels, features, step) in enumerate(
                zip(self.levels, self.stage_features, strides, strict=True), 1
            )
        ]
        x = blocks.run_stages(x, [[tree] for tree in trees], layers)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


def dla(levels: tuple[int, ...], *sizes: int, **options: Any) -> Row:
    """Returns a row of Table 1."""
    return row(DLA, *sizes, source=TIMM, levels=levels, **options)


COMPACT = (64, 64, 128, 256)
GROUPED = {"groups": 32, "width_per_group": 4}

# levels; parameters, running statistics, multiply-accumulates
ROWS = {
    "dla34": dla(
        (1, 2, 2, 1),
        15_742_104,
        15_488,
        3_060_043_776,
        block="basic",
        stage_features=(64, 128, 256, 512),
    ),
    "dla46_c": dla((1, 2, 2, 1), 1_301_400, 8_064, 574_269_440, stage_features=COMPACT),
    "dla46x_c": dla(
        (1, 2, 2, 1), 1_068_440, 10_880, 532_723_712, stage_features=COMPACT, **GROUPED
    ),
    "dla60": dla((1, 2, 3, 1), 22_036_632, 41_088, 4_235_878_400),
    "dla60x": dla((1, 2, 3, 1), 17_352_344, 55_936, 3_516_555_264, **GROUPED),
    "dla60x_c": dla(
        (1, 2, 3, 1), 1_319_832, 14_464, 581_294_080, stage_features=COMPACT, **GROUPED
    ),
    "dla102": dla((1, 3, 4, 1), 33_268_888, 66_688, 7_164_551_168, residual_root=True),
    "dla102x": dla((1, 3, 4, 1), 26_309_272, 91_776, 5_847_932_928, residual_root=True, **GROUPED),
    "dla169": dla((2, 3, 5, 1), 53_389_720, 108_928, 11_557_560_320, residual_root=True),
}
