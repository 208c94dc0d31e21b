"""Parts that the families of residual and mobile networks share.

A model builds three factories once, by `layers_of`, and hands them to its blocks:

    conv(features, kernel_size, strides, groups=..., name=...)(x)
    norm(name=..., scale_init=...)(x)
    activation(x)

so that no block knows which normalisation, activation, dtype or device axis it runs with.
All images are `[batch, height, width, channels]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError, unknown_name
from cnnjax.models.layers import require_stem
from cnnjax.models.norms import norm_layer
from cnnjax.models.stages import stage_output

Array = jax.Array
Factory = Callable[..., Any]
Activation = Callable[[Array], Array]

# He et al. 2015 (arXiv 1502.01852), section 2.2, in the fan-out form that torchvision uses.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
}
PADDINGS = ("symmetric", "same")


def check_name(kind: str, name: str, valid: Iterable[str]) -> None:
    """Raises UserError unless `name` is among the `valid` ones."""
    if name not in valid:
        raise unknown_name(kind, name, valid)


def activation_function(activation: str | Activation) -> Activation:
    """Returns the function of that name; a function is returned as it is."""
    if callable(activation):
        return activation
    check_name("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]


def conv_layer(
    features: int,
    kernel_size: int,
    strides: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    padding: str = "symmetric",
    dtype: Any = None,
    kernel_init: Any = he_normal_fan_out,
    name: str,
) -> nn.Module:
    """Square convolution of an odd `kernel_size` whose output is as large as the image, or half.

    `padding="symmetric"`, PyTorch's convention, pads by `kernel_size // 2` on every side at every
    stride. `"same"`, TensorFlow's and Keras's, pads no more than it must: at stride 2 one pixel
    less at the top and left of images with even sides. Weights of the one compute other numbers
    with the other.

    Raises:
      UserError: `padding` is neither.
    """
    check_name("padding", padding, PADDINGS)
    sides = (kernel_size // 2, kernel_size // 2)
    return ops.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(strides, strides),
        padding="SAME" if padding == "same" and strides > 1 else [sides] * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


def layer_factories(
    norm: str,
    activation: str | Activation,
    *,
    train: bool,
    dtype: Any = None,
    axis_name: str | None = None,
    group_size: int = 0,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    kernel_init: Any = he_normal_fan_out,
    padding: str = "symmetric",
    conv_bias: bool = False,
) -> dict[str, Any]:
    """Returns `conv`, `norm` and `activation` for blocks; arguments as in `norm_layer`.

    `padding` is that of `conv_layer`. Convolutions have a bias where no normalisation follows
    (`norm="none"`), and with `conv_bias` where it makes the bias superfluous, too.
    """
    return {
        "conv": functools.partial(
            conv_layer,
            dtype=dtype,
            use_bias=conv_bias or norm == "none",
            padding=padding,
            kernel_init=kernel_init,
        ),
        "norm": norm_layer(
            norm,
            train=train,
            dtype=dtype,
            axis_name=axis_name,
            group_size=group_size,
            epsilon=epsilon,
            momentum=momentum,
        ),
        "activation": activation_function(activation),
    }


def layers_of(model: Any, *, train: bool, kernel_init: Any = he_normal_fan_out) -> dict[str, Any]:
    """Returns `layer_factories` of a model's own fields.

    They are `norm`, `activation`, `dtype`, `axis_name`, `norm_group_size`, `norm_epsilon`,
    `norm_momentum`, and in the models that have them `padding` and `conv_bias`.
    """
    return layer_factories(
        model.norm,
        model.activation,
        train=train,
        dtype=model.dtype,
        axis_name=model.axis_name,
        group_size=model.norm_group_size,
        epsilon=model.norm_epsilon,
        momentum=model.norm_momentum,
        kernel_init=kernel_init,
        padding=getattr(model, "padding", "symmetric"),
        conv_bias=getattr(model, "conv_bias", False),
    )


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


def strides_for(stem: str, strides: Sequence[int]) -> list[int]:
    """Returns the strides of a network's stem and stages, in order, for the kind of stem.

    `"imagenet"` for images of about 224 pixels; `"cifar"` for 28 to 64 pixels: the first two
    strides of 2 (where there are so many) become 1. Raises UserError for an unknown stem.
    """
    require_stem(stem)
    result = list(strides)
    if stem == "cifar":
        for index in [index for index, stride in enumerate(strides) if stride == 2][:2]:
            result[index] = 1
    return result


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


class ConvNorm(nn.Module):
    """Convolution, normalisation, activation; `activation=None` leaves the sum linear."""

    features: int
    kernel_size: int
    conv: Factory
    norm: Factory
    activation: Activation | None
    strides: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(
            self.features, self.kernel_size, self.strides, groups=self.groups, name="conv"
        )(x)
        x = self.norm(name="norm")(x)
        return x if self.activation is None else self.activation(x)


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
    """

    features: int
    expanded_features: int
    kernel_size: int
    strides: int
    conv: Factory
    norm: Factory
    activation: Activation
    se_features: int = 0
    se_activation: Activation = nn.relu
    se_gate: Activation = nn.sigmoid
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        conv_norm = functools.partial(ConvNorm, conv=self.conv, norm=self.norm)
        expanded = self.expanded_features
        y = x
        if expanded != x.shape[-1]:
            y = conv_norm(expanded, 1, activation=self.activation, name="expand")(y)
        y = conv_norm(
            expanded,
            self.kernel_size,
            strides=self.strides,
            groups=expanded,
            activation=self.activation,
            name="depthwise",
        )(y)
        if self.se_features:
            y = SqueezeExcite(
                self.se_features, self.conv, self.se_activation, self.se_gate, name="se"
            )(y)
        y = conv_norm(self.features, 1, activation=None, name="project")(y)
        if self.strides == 1 and x.shape[-1] == self.features:
            y = x + StochasticDepth(self.stochastic_depth_rate, name="drop")(y, train=train)
        return y


def call_block(block: nn.Module, x: Array, *, remat: bool, **options: Any) -> Array:
    """Returns `block(x, **options)`.

    With `remat` the backward pass computes again what happens between the block's input and output,
    instead of keeping it from the forward pass: about a third more computation for the memory of
    one block at a time (Chen et al. 2016, arXiv 1604.06174, section 3). Parameters, their paths and
    the random draws stay the same. Only training gains by it.
    """

    def run(block: nn.Module, x: Array) -> Array:
        return block(x, **options)

    return (nn.remat(run) if remat else run)(block, x)


class Stage(nn.Module):
    """Blocks one after another, named `block1`, `block2` ...; `remat` as for `call_block`.

    Sows its result into `intermediates` as `output`; a model's stage 2 is thus found at
    `intermediates/stage2/output`. (Flax reserves the name of a submodule in every collection.)
    """

    blocks: Sequence[Factory]
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for number, block in enumerate(self.blocks, 1):
            x = call_block(block(name=f"block{number}"), x, remat=self.remat and train, train=train)
        return stage_output(self, "output", x)


# PyTorch's initialiser of dense kernels: uniform within 1 / sqrt(fan-in) on either side.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def classify(
    features: Array,
    num_classes: int | None,
    *,
    train: bool,
    dropout_rate: float = 0.0,
    dtype: Any = None,
    kernel_init: Any = uniform_fan_in,
) -> Array:
    """Dropout, then the dense layer `head` of the calling module.

    Args:
      features: `[batch, features]`.
      num_classes: of the logits; `None` leaves out the dense layer.
      train: dropout acts.
      dropout_rate: probability of a zero.
      dtype: of the logits; `None` for that of features and parameters.
      kernel_init: of the dense kernel; the bias starts at 0.

    Returns:
      Logits `[batch, num_classes]`, or `[batch, features]`.
    """
    features = nn.Dropout(dropout_rate, deterministic=not train)(features)
    if num_classes is None:
        return features
    return nn.Dense(num_classes, dtype=dtype, kernel_init=kernel_init, name="head")(features)
