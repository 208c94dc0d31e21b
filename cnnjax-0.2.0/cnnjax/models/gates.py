"""Gates that residual networks put behind a branch or between stages.

- ECA: Wang et al. 2020, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural
  Networks" (arXiv 1910.03151), section 3.
- CBAM: Woo et al. 2018, "CBAM: Convolutional Block Attention Module" (arXiv 1807.06521), section 3.
  As in timm, the perceptron has no biases and the spatial convolution a normalization.
- BAM: Park et al. 2018, "BAM: Bottleneck Attention Module" (arXiv 1807.06514), section 3. The two
  branches are added as in the paper (the authors' code multiplies them); which layers are followed
  by a normalization is the code's.

All take and return `[batch, height, width, channels]`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models.blocks import SqueezeExcite
from cnnjax.models.layers import Array, Factories

# Of a branch's output, or (bam) of a stage's.
ATTENTIONS = ("none", "eca", "cbam", "bam")
# timm's gates are never narrower.
MINIMUM_GATE = 8


def gate_branch(y: Array, layers: Factories, attention: str, se_reduction: int) -> Array:
    """Gates the output of a branch by layers `se`, `eca` or `cbam` of the calling module.

    Args:
      y: the output.
      layers: of the gate.
      attention: `"eca"`, `"cbam"`; any other name does nothing.
      se_reduction: the factor of a squeeze-and-excite gate; 0 for none.
    """
    if se_reduction:
        width = max(MINIMUM_GATE, y.shape[-1] // se_reduction)
        y = SqueezeExcite(width, layers.conv, name="se")(y)
    if attention == "eca":
        y = EfficientChannelAttention(layers, name="eca")(y)
    if attention == "cbam":
        y = ConvBlockAttention(layers, name="cbam")(y)
    return y


def eca_kernel_size(channels: int) -> int:
    """Returns the odd number near `(log2(channels) + 1) / 2`, at least 3 (equation 12)."""
    size = int((math.log2(channels) + 1) / 2)
    return max(size if size % 2 else size + 1, 3)


class EfficientChannelAttention(nn.Module):
    """Each channel's gate is computed from the means of its few neighbors, by one convolution."""

    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        means = jnp.mean(x, axis=(1, 2))[:, None, :, None]
        window = (1, eca_kernel_size(x.shape[-1]))
        gates = self.layers.conv(1, window, use_bias=False, name="conv")(means)
        return x * nn.sigmoid(gates.transpose(0, 1, 3, 2))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: Array, axis: int) -> Array:
    """Maximum along an axis, which is kept; the first of equal ones has the derivative."""
    return jnp.max(x, axis, keepdims=True)


@largest.defjvp
def _(axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # By its place: JAX's own rule looks for values equal to the maximum, and a compiler that
    # computes `x` again, rounded otherwise, finds none.
    (x,), (change,) = primals, tangents
    place = jnp.argmax(x, axis, keepdims=True)
    return largest(x, axis), jnp.take_along_axis(change, place, axis)


class ConvBlockAttention(nn.Module):
    """A gate for each channel, then one for each position.

    The first is a perceptron's of the channels' means plus the same one's of their maxima; the
    second a 7x7 convolution's of mean and maximum over the channels.
    """

    layers: Factories
    reduction: int = 16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, channels = self.layers, x.shape[-1]
        conv = functools.partial(layers.conv, use_bias=False)
        # Both at once, as two positions.
        positions = x.reshape(x.shape[0], 1, -1, channels)
        means = jnp.mean(positions, axis=2, keepdims=True)
        pooled = jnp.concatenate([means, largest(positions, 2)], axis=1)
        hidden = conv(max(1, channels // self.reduction), 1, name="fc1")(pooled)
        gates = conv(channels, 1, name="fc2")(layers.activation(hidden))
        gates = jnp.sum(gates, axis=1, keepdims=True)
        x = x * nn.sigmoid(gates)
        pooled = jnp.concatenate([jnp.mean(x, axis=-1, keepdims=True), largest(x, 3)], axis=-1)
        gates = layers.conv(1, 7, name="conv")(pooled)
        return x * nn.sigmoid(layers.norm(name="norm")(gates))


class BottleneckAttention(nn.Module):
    """`x + x * sigmoid(channel gates + position gates)`, between two stages.

    The gates of the channels are a perceptron's of their means. Those of the positions come from a
    1x1 convolution to fewer channels, two 3x3 ones with holes of `dilation`, and a 1x1 one.
    """

    layers: Factories
    reduction: int = 16
    dilation: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, width = self.layers, max(1, x.shape[-1] // self.reduction)

        def hidden(y: Array, kernel_size: int, name: str, dilation: int = 1) -> Array:
            conv = layers.conv(
                width, kernel_size, dilation=dilation, use_bias=True, name=f"{name}_conv"
            )
            return layers.activation(layers.norm(name=f"{name}_norm")(conv(y)))

        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        channel = hidden(means, 1, "channel1")
        channel = layers.conv(x.shape[-1], 1, use_bias=True, name="channel2")(channel)
        position = hidden(x, 1, "position1")
        for number in (2, 3):
            position = hidden(position, 3, f"position{number}", self.dilation)
        position = layers.conv(1, 1, use_bias=True, name="position4")(position)
        return x + x * nn.sigmoid(channel + position)
