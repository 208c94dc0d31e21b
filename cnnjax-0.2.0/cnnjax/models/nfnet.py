"""NFNet-F0: a residual network without normalization.

Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization" (arXiv
2102.06171), section 4 and appendix C; the signal's variance is tracked as in Brock et al. 2021,
"Characterizing signal propagation to close the performance gap in unnormalized ResNets" (arXiv
2101.08692), section 3. Padding is `SAME` as in the authors' code, one pixel more below and right at
stride 2. It is trained with adaptive gradient clipping (`optax.adaptive_grad_clip`), at 192 pixels
and tested at 256.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Activation, Array, Factories, Factory, check_name, conv_layer
from cnnjax.models.norms import norm_layer
from cnnjax.models.reshaped import input_width
from cnnjax.models.rows import TIMM, row

# Activation and the factor that gives it unit variance on standard normal input: the authors' own
# constants, which they estimated from samples (the exact one of ReLU is 1.71286).
SCALED_ACTIVATIONS: dict[str, tuple[Activation, float]] = {
    # The authors' GELU is JAX's, by tanh; timm's is the exact one.
    "gelu": (nn.gelu, 1.7015043497085571),
    "gelu_exact": (functools.partial(nn.gelu, approximate=False), 1.7015043497085571),
    "relu": (nn.relu, 1.7139588594436646),
    "silu": (nn.silu, 1.7881293296813965),
    "tanh": (nn.tanh, 1.5939117670059204),
    "elu": (nn.elu, 1.2716004848480225),
}


def scaled_activation(activation: str | Activation) -> Activation:
    """Returns the named activation, scaled to keep unit variance; a function as it is."""
    if callable(activation):
        return activation
    check_name("activation", activation, SCALED_ACTIVATIONS)
    function, gain = SCALED_ACTIVATIONS[activation]
    return lambda x: function(x) * gain


class WSConv(nn.Module):
    """Convolution whose kernel is standardized over its inputs, times a gain, plus a bias.

    `gain * (kernel - mean) / sqrt(fan_in * variance)` for each output channel: arXiv 2101.08692,
    equation 1. Parameters `kernel`, `gain`, `bias`.
    """

    features: int
    kernel_size: int = 1
    strides: int = 1
    groups: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel = self.param("kernel", init, shape)
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))

        mean = jnp.mean(kernel, axis=(0, 1, 2))
        variance = jnp.var(kernel, axis=(0, 1, 2))
        # The floor is the authors': a kernel of nearly equal weights would be blown up.
        scale = gain * jax.lax.rsqrt(jnp.maximum(variance * math.prod(shape[:-1]), 1e-4))
        x, kernel, bias = promote_dtype(x, (kernel - mean) * scale, bias, dtype=self.dtype)
        return ops.conv2d(
            x,
            kernel,
            strides=(self.strides, self.strides),
            padding="SAME",
            feature_group_count=self.groups,
            bias=bias,
        )


class NFBlock(nn.Module):
    """`shortcut + alpha * gain * 2 * gate(branch(beta * activation(x)))` (appendix C).

    The branch is 1x1, two grouped 3x3, 1x1. Where the shape changes, the shortcut is the average
    pool and a 1x1 convolution of the scaled activation.

    Attributes:
      features: channels of the output; the branch has half as many.
      strides: 1 or 2.
      beta: 1 over the expected standard deviation of the input.
      alpha: the branch's weight.
      group_width: channels of a group of the 3x3 convolutions.
      se_ratio: channels inside the gate per channel of the output.
    """

    features: int
    strides: int
    beta: float
    alpha: float
    group_width: int
    se_ratio: float
    layers: Factories
    stochastic_depth_rate: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, activation = self.layers.conv, self.layers.activation
        groups = max(1, self.features // 2 // self.group_width)
        width = self.features // 2 // groups * groups
        y = activation(x) * self.beta
        if self.strides != 1 or input_width(x) != self.features:
            x = y
            if self.strides == 2:
                x = ops.avg_pool(y, (2, 2), (2, 2), "SAME", count_include_pad=False)
            x = conv(self.features, name="downsample")(x)
        y = conv(width, name="conv1")(y)
        y = conv(width, 3, self.strides, groups, name="conv2")(activation(y))
        y = conv(width, 3, 1, groups, name="conv3")(activation(y))
        y = conv(self.features, name="conv4")(activation(y))
        gate_conv = functools.partial(
            conv_layer, dtype=self.layers.dtype, kernel_init=nn.initializers.lecun_normal()
        )
        y = 2 * blocks.SqueezeExcite(int(self.features * self.se_ratio), gate_conv, name="se")(y)
        y = blocks.drop_branch(self, y)
        skip_gain = self.param("skip_gain", nn.initializers.zeros, ())
        return x + y * (self.alpha * skip_gain).astype(y.dtype)


class Stem(nn.Module):
    """Four 3x3 convolutions, the first and the last at stride 2; `"cifar"`: all at stride 1."""

    kind: str
    features: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        strides = strides_for(self.kind, (2, 1, 1, 2))
        x = image
        for number, features in enumerate((16, 32, 64, self.features), 1):
            x = x if number == 1 else self.layers.activation(x)
            x = self.layers.conv(features, 3, strides[number - 1], name=f"conv{number}")(x)
        return x


class NFNet(nn.Module):
    """NFNet: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage.
      stage_features: channels of each stage.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 192 pixels, `"cifar"` for 28 to 64 pixels.
      activation: a name of `SCALED_ACTIVATIONS`, or a function that keeps unit variance.
      alpha: weight of each block's branch.
      group_width: channels of a group of the 3x3 convolutions.
      se_ratio: channels inside the gate per channel.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0. What is kept is scaled up;
        the authors' code does not.
      dtype: of the computation; `None` is that of image and parameters, which are float32.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    stage_features: Sequence[int] = (256, 512, 1536, 1536)
    num_classes: int | None = 1000
    stem: str = "imagenet"
    activation: str | Activation = "gelu"
    alpha: float = 0.2
    group_width: int = 128
    se_ratio: float = 0.5
    dropout_rate: float = 0.2
    stochastic_depth_rate: float = 0.25
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "NFNet")
        layers = Factories(
            conv=functools.partial(WSConv, dtype=self.dtype),
            norm=norm_layer("none", train=train),
            activation=scaled_activation(self.activation),
            train=train,
            dtype=self.dtype,
            remat=self.remat and train,
        )
        x = Stem(self.stem, self.stage_features[0] // 2, layers, name="stem")(image)
        expected_variance = 1.0
        stages: list[list[Factory]] = []
        for depth, features in zip(self.stage_sizes, self.stage_features, strict=True):
            stages.append([])
            for index in range(depth):
                block = functools.partial(
                    NFBlock,
                    features,
                    strides=2 if index == 0 and len(stages) > 1 else 1,
                    beta=expected_variance**-0.5,
                    alpha=self.alpha,
                    group_width=self.group_width,
                    se_ratio=self.se_ratio,
                )
                stages[-1].append(block)
                # The shortcut of a stage's first block starts from a normalized signal again.
                expected_variance = self.alpha**2 + (1.0 if index == 0 else expected_variance)
        x = blocks.run_stages(x, stages, layers, stochastic_depth_rate=self.stochastic_depth_rate)
        x = layers.activation(layers.conv(2 * self.stage_features[-1], name="last")(x))
        return blocks.classify(
            x,
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=nn.initializers.normal(0.01),
        )


nfnet = functools.partial(row, NFNet, source=TIMM)

ROWS = {
    "nfnet_f0": nfnet(
        71_489_284,
        0,
        12_384_198_656,
        image=(256, 256, 3),
        stage_sizes=(1, 2, 6, 3),
        also={"timm": "dm_nfnet_f0"},
    ),
}
