"""Linen layers on `cnnjax.ops`, with the parameters, names and initializers of Flax's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from cnnjax.errors import unknown_name
from cnnjax.ops.convolution import conv2d, conv_general_dilated
from cnnjax.ops.fused import conv2d_activation_max_pool
from cnnjax.ops.pooling import avg_pool

POOLS = ("average", "max")


class Conv(nn.Conv):
    """`flax.linen.Conv`, compiled in the form that `cnnjax.ops` chooses; all else is Flax's."""

    conv_general_dilated: Any = conv_general_dilated


class Dense(nn.Dense):
    """`flax.linen.Dense`, compiled in the form that `cnnjax.ops` chooses; all else is Flax's.

    In bfloat16 its product is a convolution of one tap, which is faster than XLA's products on a
    CPU, and the gradient of its bias is summed in float32.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """As `nn.Dense.__call__`."""
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        inputs, kernel = promote_dtype(inputs, kernel, dtype=self.dtype)
        if kernel.dtype == jnp.bfloat16 and inputs.ndim > 1:
            image = inputs
            if inputs.ndim != 4:
                image = inputs.reshape(inputs.shape[0], 1, -1, inputs.shape[-1])
            result = conv2d(image, kernel[None, None], precision=self.precision)
            result = result.reshape(*inputs.shape[:-1], self.features)
        else:
            result = jnp.dot(inputs, kernel, precision=self.precision)
        if not self.use_bias:
            return result
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return result + jnp.broadcast_to(bias, result.shape).astype(result.dtype)


class ConvPool(nn.Module):
    """Convolution, bias, activation and 2x2 pool; parameters `kernel` and `bias` as `nn.Conv`'s.

    Attributes:
      features: channels of the output.
      kernel_size: height and width of the kernel.
      padding: of the convolution, as in `conv2d`; the pool has none.
      activation: a function of one array, elementwise.
      pool: "max" or "average".
      use_bias: whether there is a bias.
      dtype: of the computation; None: that of image and parameters.
      param_dtype: of the parameters.
      precision: as in `conv2d`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.

    Call: `image [batch, height, width, channels]` -> `[batch, pooled height, pooled width,
    features]`. Raises UserError for an unknown pool.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: str | Sequence[tuple[int, int]] = "SAME"
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    pool: str = "max"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., jax.Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        if self.pool not in POOLS:
            raise unknown_name("pool", self.pool, POOLS)
        shape = (*self.kernel_size, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        image, kernel, bias = promote_dtype(image, kernel, bias, dtype=self.dtype)
        options = {"padding": self.padding, "precision": self.precision}
        if self.pool == "max":
            return conv2d_activation_max_pool(
                image, kernel, bias, activation=self.activation, **options
            )
        return avg_pool(
            self.activation(conv2d(image, kernel, bias=bias, **options)), (2, 2), (2, 2)
        )
