"""Attention among tokens, positions relative to each other, and windows of images.

Tokens are `[batch, ..., tokens, features]`: windows, which do not see each other, may stand between
batch and tokens. Within an attention a query is `[batch, ..., tokens, heads, features of a head]`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.layers import Array, Factories

truncated_normal = nn.initializers.truncated_normal(0.02)


def attend(query: Array, key: Array, value: Array, *, scale: Array | float, bias: Array) -> Array:
    """Returns `softmax(scale * query key^T + bias) value`, each head on its own.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1.

    Args:
      query: `[batch, ..., queries, heads, features]`.
      key, value: `[batch, ..., keys, heads, features]`.
      scale: a number, or one a head `[heads, 1, 1]`.
      bias: what is added, anything that broadcasts to `[batch, ..., heads, queries, keys]`.

    Returns:
      `[batch, ..., queries, heads, features]`.
    """
    scores = jnp.einsum("...qhf,...khf->...hqk", query, key)
    # Sums of many small exponentials: float32 also where the layers compute in half precision.
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)) * scale + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khf->...qhf", weights, value)


class SelfAttention(nn.Module):
    """Each token attends to all tokens beside it (arXiv 1706.03762, section 3.2.2).

    `out(attend(query, key, value))`, where one dense layer `qkv` computes query, key and value.

    Attributes:
      num_heads: heads; they share the features.
      layers: for the dtype.
      scale: of the scores; None: 1 over the root of a head's features.
      cosine: query and key are divided by their lengths, a learned scale of each head multiplies
        their product, at most 100, and keys have no bias: Swin v2 (arXiv 2111.09883), section 3.2.

    Call: `x [batch, ..., tokens, features]` to the same shape; `bias` is added to the scores
    `[batch, ..., heads, tokens, tokens]`.
    """

    num_heads: int
    layers: Factories
    scale: float | None = None
    cosine: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | float = 0.0) -> Array:
        features = x.shape[-1]
        dense = functools.partial(ops.Dense, dtype=self.layers.dtype, kernel_init=truncated_normal)
        qkv = dense(3 * features, use_bias=not self.cosine, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:-1], 3, self.num_heads, features // self.num_heads)
        if self.cosine:
            qkv = qkv + self._query_and_value_bias(qkv)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        scale = (features // self.num_heads) ** -0.5 if self.scale is None else self.scale
        if self.cosine:
            query, key, scale = unit_length(query), unit_length(key), self._learned_scale()
        y = attend(query, key, value, scale=scale, bias=jnp.asarray(bias))
        return dense(features, name="out")(y.reshape(x.shape))

    def _query_and_value_bias(self, qkv: Array) -> Array:
        bias = self.param("qkv_bias", nn.initializers.zeros, (math.prod(qkv.shape[-3:]),))
        bias = bias.reshape(qkv.shape[-3:]) * np.array([1, 0, 1]).reshape(3, 1, 1)
        return bias.astype(qkv.dtype)

    def _learned_scale(self) -> Array:
        start = nn.initializers.constant(math.log(10))
        logarithm = self.param("logit_scale", start, (self.num_heads, 1, 1))
        return jnp.exp(jnp.minimum(logarithm, math.log(100)))


def unit_length(x: Array) -> Array:
    """Returns `x [..., features]` divided by its length."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


class Mlp(nn.Module):
    """Dense, activation, dense, on each token (arXiv 1706.03762, section 3.3)."""

    hidden_features: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(ops.Dense, dtype=self.layers.dtype, kernel_init=truncated_normal)
        y = self.layers.activation(dense(self.hidden_features, name="expand")(x))
        return dense(x.shape[-1], name="project")(y)


class TransformerBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: the norm first, as in ViT.

    Dosovitskiy et al. 2020 (arXiv 2010.11929), equations 2 and 3.

    Attributes:
      num_heads: of the attention.
      hidden_features: of the two dense layers.
    """

    num_heads: int
    hidden_features: int
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers = self.layers
        drop = functools.partial(blocks.StochasticDepth, self.stochastic_depth_rate)
        y = SelfAttention(self.num_heads, layers, name="attention")(layers.norm(name="norm1")(x))
        x = x + drop(name="drop1")(y, train=layers.train)
        y = Mlp(self.hidden_features, layers, name="mlp")(layers.norm(name="norm2")(x))
        return x + drop(name="drop2")(y, train=layers.train)


def relative_positions(side: int) -> np.ndarray:
    """Returns which row of a table of biases two tokens of a window share.

    Args:
      side: of the window, in tokens.

    Returns:
      `[side ** 2, side ** 2]` integers below `(2 * side - 1) ** 2`: the difference of the two
      tokens' rows and columns, counted from the smallest (Swin, arXiv 2103.14030, section 3.2).
    """
    rows, columns = (axis.reshape(-1) for axis in np.mgrid[:side, :side])
    down = rows[:, None] - rows[None, :] + side - 1
    right = columns[:, None] - columns[None, :] + side - 1
    return down * (2 * side - 1) + right


def bias_of_pairs(table: Array, side: int) -> Array:
    """Returns the bias `[heads, side ** 2, side ** 2]` of each pair of a window's tokens.

    Args:
      table: `[(2 * side - 1) ** 2, heads]`.
      side: of the window.
    """
    return jnp.transpose(table[relative_positions(side)], (2, 0, 1))


def to_windows(image: Array, side: int) -> Array:
    """Cuts `[batch, height, width, features]` into windows of `side` times `side` pixels.

    Returns:
      `[batch, windows, side ** 2, features]`; `from_windows` undoes it.
    """
    batch, height, width, features = image.shape
    x = image.reshape(batch, height // side, side, width // side, side, features)
    return jnp.swapaxes(x, 2, 3).reshape(batch, -1, side * side, features)


def from_windows(windows: Array, side: int, height: int, width: int) -> Array:
    """Returns the image `[batch, height, width, features]` that `to_windows` has cut."""
    batch, features = windows.shape[0], windows.shape[-1]
    x = windows.reshape(batch, height // side, width // side, side, side, features)
    return jnp.swapaxes(x, 2, 3).reshape(batch, height, width, features)
