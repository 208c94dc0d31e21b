"""DarkNet-53, and networks with cross-stage partial connections: CSPDarkNet, CSPResNet, CSPResNeXt.

- DarkNet-53: Redmon & Farhadi 2018, "YOLOv3: An Incremental Improvement" (arXiv 1804.02767),
  Table 1.
- CSPNet: Wang et al. 2019, "CSPNet: A New Backbone that can Enhance Learning Capability of CNN"
  (arXiv 1911.11929), section 3. Half of a stage's features go past its blocks.

All are as in timm: its leaky ReLU has slope 0.01 where the authors' has 0.1, and one convolution
makes both halves of a cross stage.

Names: timm's `stages.1.blocks.0.conv1` is `stage2/block1/conv1`; `conv_down`, `conv_exp`,
`conv_transition_b` and `conv_transition` of a stage are `downsample`, `expand`, `branch` and
`merge`; `stem.conv1` is `stem`, `head.fc` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Factory, Layers
from cnnjax.models.resnet import Stem
from cnnjax.models.rows import TIMM, row
from cnnjax.models.stages import stage_output


class DarkBlock(nn.Module):
    """`x + branch(x)`: 1x1 to `hidden_features`, 3x3 back; no activation of the sum."""

    hidden_features: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        y = conv_norm(self.hidden_features, 1, name="conv1")(x)
        y = conv_norm(x.shape[-1], 3, name="conv2")(y)
        return x + blocks.drop_branch(self, y)


class BottleneckBlock(nn.Module):
    """`activation(x + branch(x))`: 1x1 to `hidden_features`, 3x3 in groups, 1x1 back."""

    hidden_features: int
    groups: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        y = conv_norm(self.hidden_features, 1, name="conv1")(x)
        y = conv_norm(self.hidden_features, 3, groups=self.groups, name="conv2")(y)
        y = conv_norm(x.shape[-1], 1, linear=True, name="conv3")(y)
        return self.layers.activation(x + blocks.drop_branch(self, y))


class CrossStage(nn.Module):
    """A stage: a 3x3 convolution that halves the resolution, then blocks.

    Attributes:
      blocks: as in `blocks.Stage`.
      features: of the output.
      strides: of the first convolution; 0 for none.
      down_features, down_groups: of that convolution.
      expanded_features: that are split into what the blocks compute on and what goes past them
        (arXiv 1911.11929, section 3); 0 for a plain stage.
      linear: whether these have no activation.
    """

    blocks: Sequence[Factory]
    layers: Factories
    features: int
    strides: int
    down_features: int
    down_groups: int = 1
    expanded_features: int = 0
    linear: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(blocks.ConvNorm, layers=self.layers)
        if self.strides:
            x = conv_norm(
                self.down_features,
                3,
                strides=self.strides,
                groups=self.down_groups,
                name="downsample",
            )(x)
        past = None
        if self.expanded_features:
            x = conv_norm(self.expanded_features, 1, linear=self.linear, name="expand")(x)
            past, x = jnp.split(x, 2, axis=-1)
        for number, block in enumerate(self.blocks, 1):
            block = block(layers=self.layers, name=f"block{number}")
            x = ops.computed_once_both_ways(blocks.call_block(block, x, self.layers))
        if past is not None:
            x = conv_norm(self.expanded_features // 2, 1, name="branch")(x)
            x = jnp.concatenate([past, x], axis=-1)
            x = conv_norm(self.features, 1, name="merge")(x)
        return stage_output(self, "output", x)


def with_rates(stages: Sequence[Sequence[Factory]], rate: float) -> list[list[Factory]]:
    """Returns the blocks of all stages with rates of stochastic depth that rise to `rate`."""
    rates = iter(blocks.stochastic_depth_rates(rate, sum(map(len, stages))))
    return [
        [functools.partial(block, stochastic_depth_rate=next(rates)) for block in stage]
        for stage in stages
    ]


class DarkNet(nn.Module):
    """DarkNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage; each halves the resolution and doubles the features.
      num_classes: of the head; `None` returns the pooled features.
      cross_stage: whether half of the features go past a stage's blocks (CSPDarkNet).
      features: of the stem.
      stem: `"imagenet"` for images of about 256 pixels, `"cifar"` for 28 to 64 pixels.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int] = (1, 2, 8, 8, 4)
    num_classes: int | None = 1000
    cross_stage: bool = False
    features: int = 32
    stem: str = "imagenet"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers(activation="leaky_relu")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "DarkNet")
        layers = self.layers.factories(train=train)
        strides = strides_for(self.stem, [2] * len(self.stage_sizes))
        x = blocks.ConvNorm(self.features, 3, layers, name="stem")(image)
        widths = [self.features * 2**stage for stage in range(1, len(strides) + 1)]
        stages: list[list[Factory]] = [
            [functools.partial(DarkBlock, width // 2)] * depth
            for width, depth in zip(widths, self.stage_sizes, strict=True)
        ]
        stages = with_rates(stages, self.stochastic_depth_rate)
        for number, (stage, width) in enumerate(zip(stages, widths, strict=True), 1):
            # The first stage's halves are each as wide as its output (the authors' code).
            expanded = 2 * width if number == 1 else width
            x = CrossStage(
                stage,
                layers,
                width,
                strides[number - 1],
                down_features=width,
                expanded_features=expanded if self.cross_stage else 0,
                name=f"stage{number}",
            )(x)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


class CSPResNet(nn.Module):
    """CSPResNet and CSPResNeXt: image `[batch, height, width, channels]` to `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage; each but the first halves the resolution and doubles the
        features.
      num_classes: of the head; `None` returns the pooled features.
      features: of the first stage's output.
      expansion: features that are split in two, per feature of the output.
      groups: of the 3x3 convolutions.
      stem: `"imagenet"` for images of about 256 pixels, `"cifar"` for 28 to 64 pixels.
      stem_features: channels of the stem.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int] = (3, 3, 5, 2)
    num_classes: int | None = 1000
    features: int = 128
    expansion: int = 2
    groups: int = 1
    stem: str = "imagenet"
    stem_features: int = 64
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers(activation="leaky_relu")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "CSPResNet")
        # The stem's own two halvings are those that a small one leaves out.
        strides_for(self.stem, ())
        layers = self.layers.factories(train=train)
        x = Stem(self.stem, self.stem_features, layers, name="stem")(image)
        widths = [self.features * 2**stage for stage in range(len(self.stage_sizes))]
        stages: list[list[Factory]] = [
            [functools.partial(BottleneckBlock, width // 2, self.groups)] * depth
            for width, depth in zip(widths, self.stage_sizes, strict=True)
        ]
        stages = with_rates(stages, self.stochastic_depth_rate)
        for number, (stage, width) in enumerate(zip(stages, widths, strict=True), 1):
            x = CrossStage(
                stage,
                layers,
                width,
                strides=2 if number > 1 else 0,
                down_features=x.shape[-1],
                down_groups=self.groups,
                expanded_features=self.expansion * width,
                linear=True,
                name=f"stage{number}",
            )(x)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


dark = functools.partial(row, DarkNet, source=TIMM, image=(256, 256, 3))
csp = functools.partial(row, CSPResNet, source=TIMM, image=(256, 256, 3))

# parameters, running statistics, multiply-accumulates
ROWS = {
    "darknet53": dark(41_609_928, 35_712, 9_285_115_904),
    "cspdarknet53": dark(27_642_184, 35_328, 6_533_652_480, cross_stage=True),
    "cspresnet50": csp(21_616_168, 40_320, 4_517_240_832),
    "cspresnext50": csp(20_569_896, 57_472, 4_014_948_352, features=256, expansion=1, groups=32),
}
