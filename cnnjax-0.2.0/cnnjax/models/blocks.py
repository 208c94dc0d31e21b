"""Blocks that families of networks share, and the loop over stages.

All images are `[batch, height, width, channels]`. Blocks take the factories of their layers as
`layers`: see `cnnjax.models.layers`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models.layers import Activation, Array, Factories, Factory
from cnnjax.models.reshaped import input_width
from cnnjax.models.stages import stage_output

# PyTorch's initializer of dense kernels: uniform within 1 / sqrt(fan-in) on either side.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Rounds to a multiple of `divisor`, and never down by more than 10%.

    The rule of the MobileNet code (`_make_divisible`), which EfficientNet and RegNet follow.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def scale_channels(channels: int, *, width: float) -> int:
    """Returns `width * channels`, made divisible by 8."""
    return make_divisible(channels * width)


def stochastic_depth_rates(rate: float, num_blocks: int) -> list[float]:
    """Drop rates that rise linearly from 0 at the first block to `rate` at the last.

    Huang et al. 2016 (arXiv 1603.09382), section 3, "linear decay".
    """
    if not 0.0 <= rate < 1.0:
        raise UserError(f"stochastic_depth_rate is {rate}: it must be at least 0 and below 1.")
    return [rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]


class StochasticDepth(nn.Module):
    """Drops the whole input of an example with probability `rate` while training.

    What is kept is divided by `1 - rate`, so that the expectation is the input. Huang et al. 2016
    (arXiv 1603.09382), in the form in which evaluation needs no rescaling. Draws from the stream
    `dropout`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        all_but_examples = tuple(range(1, x.ndim))
        drop = nn.Dropout(self.rate, broadcast_dims=all_but_examples, deterministic=not train)
        return drop(x)


def drop_branch(block: Any, y: Array) -> Array:
    """Stochastic depth of `y`, at the rate and in the mode of the block that calls."""
    rate = block.stochastic_depth_rate
    return StochasticDepth(rate, name="drop")(y, train=block.layers.train)


class ConvNorm(nn.Module):
    """Convolution, normalization, activation.

    Attributes:
      features, kernel_size, strides, groups, valid, dilation: of the convolution, see `conv_layer`.
      linear: whether the activation is left out.
    """

    features: int
    kernel_size: int | tuple[int, int]
    layers: Factories
    strides: int = 1
    groups: int = 1
    linear: bool = False
    valid: bool = False
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.layers.conv(
            self.features,
            self.kernel_size,
            self.strides,
            groups=self.groups,
            valid=self.valid,
            dilation=self.dilation,
            name="conv",
        )(x)
        x = self.layers.norm(name="norm")(x)
        return x if self.linear else self.layers.activation(x)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the means of all channels.

    `x * gate(fc2(activation(fc1(mean(x)))))`. Hu et al. 2018 (arXiv 1709.01507), section 3.
    """

    reduced_features: int
    conv: Factory
    activation: Activation = nn.relu
    gate: Activation = nn.sigmoid

    @nn.compact
    def __call__(self, x: Array) -> Array:
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        hidden = self.conv(self.reduced_features, 1, use_bias=True, name="fc1")(means)
        gates = self.conv(x.shape[-1], 1, use_bias=True, name="fc2")(self.activation(hidden))
        return x * self.gate(gates)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel, gate (by argument), narrow by 1x1 without activation.

    The input is added at stride 1 where the channels stay the same. Sandler et al. 2018 (arXiv
    1801.04381), section 3.3; with the gate, Howard et al. 2019 (arXiv 1905.02244), section 4, and
    Tan & Le 2019 (arXiv 1905.11946), section 4.

    Attributes:
      features: channels of the output.
      expanded_features: channels between; equal to the input's, there is no widening convolution.
      se_features: channels inside the gate; 0 for no gate.
      activation: in place of that of `layers`, or None.
    """

    features: int
    expanded_features: int
    kernel_size: int
    strides: int
    layers: Factories
    se_features: int = 0
    se_activation: Activation = nn.relu
    se_gate: Activation = nn.sigmoid
    activation: Activation | None = None
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = self.activation or self.layers.activation
        layers = dataclasses.replace(self.layers, activation=activation)
        conv_norm = functools.partial(ConvNorm, layers=layers)
        expanded = self.expanded_features
        y = x
        if expanded != input_width(x):
            y = conv_norm(expanded, 1, name="expand")(y)
        y = conv_norm(
            expanded, self.kernel_size, strides=self.strides, groups=expanded, name="depthwise"
        )(y)
        if self.se_features:
            y = SqueezeExcite(
                self.se_features, layers.conv, self.se_activation, self.se_gate, name="se"
            )(y)
        y = conv_norm(self.features, 1, linear=True, name="project")(y)
        if self.strides == 1 and input_width(x) == self.features:
            y = x + drop_branch(self, y)
        return y


class FusedInvertedResidual(nn.Module):
    """Widen by a convolution of that kernel size, narrow by 1x1 without activation.

    The input is added at stride 1 where the channels stay the same. Where nothing is widened, there
    is one convolution, `expand`, with an activation. Tan & Le 2021 (arXiv 2104.00298), section 3.2.

    Attributes:
      features, expanded_features: as in `InvertedResidual`.
    """

    features: int
    expanded_features: int
    kernel_size: int
    strides: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv_norm = functools.partial(ConvNorm, layers=self.layers)
        widened = self.expanded_features != input_width(x)
        width = self.expanded_features if widened else self.features
        y = conv_norm(width, self.kernel_size, strides=self.strides, name="expand")(x)
        if widened:
            y = conv_norm(self.features, 1, linear=True, name="project")(y)
        if self.strides == 1 and input_width(x) == self.features:
            y = x + drop_branch(self, y)
        return y


def call_block(block: nn.Module, x: Array, layers: Factories) -> Array:
    """Returns `block(x)`.

    With `layers.remat` the backward pass computes again what happens between the block's input and
    output, instead of keeping it from the forward pass: about a third more computation for the
    memory of one block at a time (Chen et al. 2016, arXiv 1604.06174, section 3). Parameters, their
    paths and the random draws stay the same. Only training gains by it.
    """

    def run(block: nn.Module, x: Array) -> Array:
        return block(x)

    return (nn.remat(run) if layers.remat else run)(block, x)


class Stage(nn.Module):
    """Blocks one after another, named `block1`, `block2` ...

    Sows its result into `intermediates` as `output`; a model's stage 2 is thus found at
    `intermediates/stage2/output`. (Flax reserves the name of a submodule in every collection.)
    """

    blocks: Sequence[Factory]
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for number, block in enumerate(self.blocks, 1):
            x = call_block(block(layers=self.layers, name=f"block{number}"), x, self.layers)
            # Else what a block adds is computed again in each block behind it; so backwards.
            x = ops.computed_once_both_ways(x)
        return self.end(x)

    def end(self, x: Array) -> Array:
        """Sows the result; a stage whose result is no image changes it there and back."""
        return stage_output(self, "output", x)


def run_stages(
    x: Array,
    stages: Iterable[Sequence[Factory]],
    layers: Factories,
    *,
    stochastic_depth_rate: float | None = None,
    between: Callable[[int, Array], Array] | None = None,
    stage_class: Factory = Stage,
) -> Array:
    """Runs the stages `stage1`, `stage2` ... of the calling module.

    Args:
      x: what enters the first.
      stages: the blocks of each, still without `layers`, `name` and `stochastic_depth_rate`.
      layers: of the blocks.
      stochastic_depth_rate: of the last block, rising linearly from 0 at the first; None where
        blocks have none.
      between: called with the number of the stage before and its output, where another follows.
      stage_class: `Stage`, or one made from it.

    Raises:
      UserError: a rate outside [0, 1).
    """
    stages = [list(stage) for stage in stages]
    if stochastic_depth_rate is not None:
        rates = iter(stochastic_depth_rates(stochastic_depth_rate, sum(map(len, stages))))
        stages = [
            [functools.partial(block, stochastic_depth_rate=next(rates)) for block in stage]
            for stage in stages
        ]
    for number, stage in enumerate(stages, 1):
        if between is not None and number > 1:
            x = between(number - 1, x)
        x = stage_class(stage, layers, name=f"stage{number}")(x)
    return x


def classify(
    features: Array,
    num_classes: int | None,
    layers: Factories,
    *,
    dropout_rate: float = 0.0,
    kernel_init: Any = uniform_fan_in,
    use_bias: bool = True,
    name: str = "head",
) -> Array:
    """Dropout, then the dense layer `head` of the calling module.

    Args:
      features: `[batch, features]`, or `[batch, height, width, features]`, averaged first.
      num_classes: of the logits; `None` leaves out the dense layer.
      layers: dropout acts in training; the dtype is that of the logits.
      dropout_rate: probability of a zero.
      kernel_init: of the dense kernel; the bias starts at 0.
      use_bias: whether the dense layer has a bias.
      name: of the dense layer, where a network has a second one.

    Returns:
      Logits `[batch, num_classes]`, or `[batch, features]`.
    """
    if features.ndim == 4:
        features = jnp.mean(features, axis=(1, 2))
    features = nn.Dropout(dropout_rate, deterministic=not layers.train)(features)
    if num_classes is None:
        return features
    options = {"use_bias": use_bias, "dtype": layers.dtype, "kernel_init": kernel_init}
    return nn.Dense(num_classes, name=name, **options)(features)
