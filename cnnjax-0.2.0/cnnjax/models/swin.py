"""Swin transformers v1 and v2: attention within windows, which shift from block to block.

- v1: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"
  (arXiv 2103.14030), section 3.
- v2: Liu et al. 2021, "Swin Transformer V2: Scaling Up Capacity and Resolution" (arXiv 2111.09883),
  section 3: norms behind the branches, cosine attention, biases computed from log-spaced distances.

Where an image has no whole number of windows, zeros fill it up below and at the right, as in the
authors' code and torchvision.

Names: torchvision's `features.1.0.attn.qkv` is `stage1/block1/attention/qkv`, `mlp.0` and `mlp.3`
are `mlp/expand` and `mlp/project`; `features.0.0` and `.2` are `stem/conv` and `stem/norm`,
`features.2` is `downsample1`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.attention import (
    Mlp,
    SelfAttention,
    bias_of_pairs,
    from_windows,
    to_windows,
    truncated_normal,
)
from cnnjax.models.images import require_image
from cnnjax.models.layers import Array, Factories, Layers, check_name
from cnnjax.models.rows import Row, row

VERSIONS = ("v1", "v2")
# What is added to the score of two tokens that are no neighbors: the authors' number.
APART = -100.0


def shifted_bias(height: int, width: int, window: int, shift: Sequence[int]) -> np.ndarray:
    """Returns the bias that keeps apart what a cyclic shift has brought into one window.

    Swin, section 3.2 and Figure 4. Args: size of the padded image, of a window, and the shift.

    Returns:
      `[windows, 1, window ** 2, window ** 2]`: 0, or `APART` for tokens from opposite edges.
    """
    regions = np.zeros((2, max(height, width)))
    for axis, (side, step) in enumerate(zip((height, width), shift, strict=True)):
        if step:
            regions[axis, side - window : side - step] = 1
            regions[axis, side - step : side] = 2
    region = 3 * regions[0, :height, None] + regions[1, None, :width]
    parts = region.reshape(height // window, window, width // window, window)
    cut = parts.transpose(0, 2, 1, 3).reshape(-1, 1, window * window)
    return np.where(cut[..., :, None] == cut[..., None, :], 0.0, APART)


def log_distances(window: int) -> np.ndarray:
    """Returns `[1, 2 * window - 1, 2 * window - 1, 2]`: distances down and right, log-spaced.

    `sign(d) log2(1 + 8 |d|) / log2(8)` with `d` from -1 to 1: v2, equation 4, and its code.
    """
    steps = 8.0 * np.arange(1 - window, window) / (window - 1)
    spaced = np.sign(steps) * np.log2(np.abs(steps) + 1) / 3
    return np.stack(np.meshgrid(spaced, spaced, indexing="ij"), axis=-1)[None]


class WindowAttention(nn.Module):
    """Self-attention in each window, with a bias for each distance (section 3.2).

    Attributes:
      window: pixels along a side of a window.
      shift: how many pixels the windows are moved down and right.
      num_heads: of the attention.
      version: `"v1"` or `"v2"`.

    Call: `[batch, height, width, features]` to the same shape.
    """

    window: int
    shift: int
    num_heads: int
    version: str
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        window, (height, width) = self.window, x.shape[1:3]
        below, right = -height % window, -width % window
        x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
        padded_height, padded_width = size = x.shape[1:3]
        # There is nothing to shift in an image of one window.
        shift = tuple(self.shift if side > window else 0 for side in size)
        x = jnp.roll(x, (-shift[0], -shift[1]), axis=(1, 2)) if any(shift) else x
        bias = self._distance_bias()
        if any(shift):
            apart = shifted_bias(padded_height, padded_width, window, shift)
            bias = bias + jnp.asarray(apart, bias.dtype)
        attention = SelfAttention(
            self.num_heads, self.layers, cosine=self.version == "v2", name="attention"
        )
        x = attention(to_windows(x, window), bias)
        x = from_windows(x, window, padded_height, padded_width)
        x = jnp.roll(x, shift, axis=(1, 2)) if any(shift) else x
        return x[:, :height, :width]

    def _distance_bias(self) -> Array:
        if self.version == "v1":
            shape = ((2 * self.window - 1) ** 2, self.num_heads)
            table = self.param("position_bias", truncated_normal, shape)
            return bias_of_pairs(table, self.window)
        dense = functools.partial(ops.Dense, dtype=self.layers.dtype, kernel_init=truncated_normal)
        dtype = self.layers.dtype or jnp.float32
        hidden = nn.relu(
            dense(512, name="position1")(jnp.asarray(log_distances(self.window), dtype))
        )
        table = dense(self.num_heads, use_bias=False, name="position2")(hidden)
        bias = bias_of_pairs(table.reshape(-1, self.num_heads), self.window)
        return 16 * jax.nn.sigmoid(bias.astype(jnp.promote_types(bias.dtype, jnp.float32)))


class SwinBlock(nn.Module):
    """Attention within windows, then dense layers, each added (Figure 3b; v2, Figure 1).

    v1: `x + branch(norm(x))`, v2: `x + norm(branch(x))`. Attributes as in `WindowAttention`.
    """

    window: int
    shift: int
    num_heads: int
    version: str
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        branches = (
            WindowAttention(
                self.window, self.shift, self.num_heads, self.version, layers, name="windows"
            ),
            Mlp(4 * x.shape[-1], layers, name="mlp"),
        )
        for number, branch in enumerate(branches, 1):
            norm = layers.norm(name=f"norm{number}")
            y = branch(norm(x)) if self.version == "v1" else norm(branch(x))
            drop = blocks.StochasticDepth(self.stochastic_depth_rate, name=f"drop{number}")
            x = x + drop(y, train=layers.train)
        return x


class PatchMerging(nn.Module):
    """Four neighbors become one token of twice the features (v1, section 3.1).

    The norm stands before the dense layer in v1, behind it in v2.
    """

    version: str
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        height, width, features = x.shape[1:]
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        columns = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = jnp.concatenate(columns, axis=-1)
        dense = nn.Dense(
            2 * features,
            use_bias=False,
            dtype=self.layers.dtype,
            kernel_init=truncated_normal,
            name="dense",
        )
        norm = self.layers.norm(name="norm")
        return dense(norm(x)) if self.version == "v1" else norm(dense(x))


class Swin(nn.Module):
    """Swin transformer: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage; the windows of every second are shifted by half a window.
      num_heads: of each stage's attentions.
      features: of the first stage; each further one halves the resolution and doubles them.
      num_classes: of the head; `None` returns the pooled features.
      version: `"v1"` or `"v2"`.
      window: patches along a side of a window.
      patch_size: pixels along a side of a patch; 1 or 2 for images of 28 to 64 pixels.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image is smaller than a patch.
    """

    stage_sizes: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (3, 6, 12, 24)
    features: int = 96
    num_classes: int | None = 1000
    version: str = "v1"
    window: int = 7
    patch_size: int = 4
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers(norm="layer", activation="gelu")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "Swin", minimum=self.patch_size)
        check_name("version", self.version, VERSIONS)
        layers = self.layers.factories(train=train, kernel_init=truncated_normal, conv_bias=True)
        x = PatchEmbedding(self.patch_size, self.features, layers, name="stem")(image)
        block = functools.partial(SwinBlock, self.window, version=self.version)
        x = blocks.run_stages(
            x,
            [
                [
                    functools.partial(block, self.window // 2 * (index % 2), num_heads)
                    for index in range(depth)
                ]
                for depth, num_heads in zip(self.stage_sizes, self.num_heads, strict=True)
            ],
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
            between=lambda stage, x: PatchMerging(self.version, layers, name=f"downsample{stage}")(
                x
            ),
        )
        return blocks.classify(
            layers.norm(name="norm")(x),
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=truncated_normal,
        )


class PatchEmbedding(nn.Module):
    """A convolution with one output a patch, then the norm (section 3.1)."""

    patch_size: int
    features: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        size = self.patch_size
        x = self.layers.conv(self.features, size, size, valid=True, name="conv")(image)
        return self.layers.norm(name="norm")(x)


SOURCE = "torchvision's num_params; its _ops less the products of attention"
swin = functools.partial(row, Swin, source=SOURCE)
deep = functools.partial(swin, stage_sizes=(2, 2, 18, 2))
wide = functools.partial(deep, features=128, num_heads=(4, 8, 16, 32))


def v2(rows: Callable[..., Row]) -> Callable[..., Row]:
    """Rows of the second version."""
    return functools.partial(rows, version="v2", window=8, image=(256, 256, 3))


# parameters, running statistics, multiply-accumulates without the products of queries with keys and
# of weights with values; the rates are torchvision's, of its training
ROWS = {
    "swin_t": swin(28_288_354, 0, 4_350_425_088, stochastic_depth_rate=0.2),
    "swin_s": deep(49_606_258, 0, 8_512_223_232, stochastic_depth_rate=0.3),
    "swin_b": wide(87_768_224, 0, 15_126_077_440, stochastic_depth_rate=0.5),
    "swin_v2_t": v2(swin)(28_351_570, 0, 5_700_615_168, stochastic_depth_rate=0.2),
    "swin_v2_s": v2(deep)(49_737_442, 0, 11_155_786_752, stochastic_depth_rate=0.3),
    "swin_v2_b": v2(wide)(87_930_848, 0, 19_805_040_640, stochastic_depth_rate=0.5),
}
