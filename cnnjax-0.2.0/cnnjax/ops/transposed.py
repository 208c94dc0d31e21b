"""Transposed convolution: the gradient of a strided convolution, as a layer that enlarges images.

`lax` computes it as a convolution of the image with zeros put between its pixels. XLA:CPU has no
fast kernel for that (see `cnnjax.ops.choice`), and three of four products of stride 2 are with
zeros. Here it is one matrix product, each pixel times the whole kernel, whose windows are then
added where they overlap: as many shifted sums as a window has strides. Where none overlap, as those
of a 2x2 kernel at stride 2, the matrix product is all of it, on every platform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax

from cnnjax.errors import UserError
from cnnjax.ops import choice
from cnnjax.ops.geometry import NHWC, checked_pair
from cnnjax.ops.im2col import widened


def conv_transpose2d(
    image: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (2, 2),
    bias: jax.Array | None = None,
    turned: bool = False,
    precision: Any = None,
    lowering: str | None = None,
) -> jax.Array:
    """Enlarges a batch of images by its strides.

    Equal to `lax.conv_transpose(image, kernel, strides, "SAME")` up to rounding, gradients
    included; with `turned`, of the kernel turned by 180 degrees. That is PyTorch's
    `ConvTranspose2d`, of a 4x4 kernel at stride 2 with padding 1 or a 2x2 kernel with padding 0:

    `output[b, 2 y + i, 2 x + j, o] = bias[o] + sum over c of image[b, y, x, c] kernel[i, j, c, o]`

    Args:
      image: `[batch, height, width, channels]`.
      kernel: `[kernel height, kernel width, channels, features]`, at least as large as the strides.
      strides: the factors of height and width.
      bias: `[features]`, added to each position.
      turned: whether the kernel is PyTorch's, written into the output as it is.
      precision: a `jax.lax.Precision`, as in `lax`.
      lowering: `lax`, or any other name of `cnnjax.ops.LOWERINGS` for the matrix product; None: the
        context's, else by platform.

    Returns:
      `[batch, height * strides[0], width * strides[1], features]` in the dtype of `image`.

    Raises:
      UserError: shapes, dtypes or strides that do not fit, or an unknown lowering.
    """
    strides = checked_pair("strides", strides)
    _check(image, kernel, strides)
    name = choice.requested(lowering)

    def by_lax(image: jax.Array, kernel: jax.Array) -> jax.Array:
        window = kernel[::-1, ::-1] if turned else kernel
        return lax.conv_transpose(
            image, window, strides, "SAME", dimension_numbers=NHWC, precision=precision
        )

    def by_product(image: jax.Array, kernel: jax.Array) -> jax.Array:
        window = kernel if turned else kernel[::-1, ::-1]
        return _overlap_add(image, window, strides, precision)

    if name == "lax":
        result = by_lax(image, kernel)
    elif name in ("auto", "once") and kernel.shape[:2] != strides:
        result = lax.platform_dependent(image, kernel, cpu=by_product, default=by_lax)
    else:
        result = by_product(image, kernel)
    return result if bias is None else result + bias


class ConvTranspose(nn.Module):
    """`flax.linen.ConvTranspose` with SAME padding, compiled in the form that `ops` chooses.

    Attributes:
      features: channels of the output.
      kernel_size: height and width of the kernel.
      strides: the factors of height and width.
      use_bias: whether there is a bias.
      turned: whether the kernel is PyTorch's, which is Flax's turned by 180 degrees.
      dtype: of the computation; None: that of image and parameters.
      param_dtype: of the parameters.
      precision: as in `conv_transpose2d`.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.

    Call: `image [batch, height, width, channels]` -> `[batch, height * strides[0],
    width * strides[1], features]`.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (2, 2)
    use_bias: bool = True
    turned: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., jax.Array] = nn.linear.default_kernel_init
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        image, kernel, bias = promote_dtype(image, kernel, bias, dtype=self.dtype)
        return conv_transpose2d(
            image,
            kernel,
            strides=self.strides,
            bias=bias,
            turned=self.turned,
            precision=self.precision,
        )


def _overlap_add(
    image: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any
) -> jax.Array:
    """Writes pixel (i, j) times the kernel at (i, j) * strides, adds up, cuts the margin."""
    (height, width), features = image.shape[1:3], kernel.shape[3]
    # A window of whole strides: its blocks of stride x stride tile the output.
    blocks = [-(-size // stride) for size, stride in zip(kernel.shape[:2], strides, strict=True)]
    margins = [
        (0, count * stride - size)
        for count, stride, size in zip(blocks, strides, kernel.shape[:2], strict=True)
    ]
    window = jnp.pad(kernel, [*margins, (0, 0), (0, 0)])
    matrix = window.transpose(2, 0, 1, 3).reshape(image.shape[3], -1)
    windows = jnp.tensordot(widened(image), widened(matrix), axes=1, precision=precision)
    windows = windows.reshape(
        *image.shape[:3], blocks[0], strides[0], blocks[1], strides[1], features
    )
    total: Any = 0
    for row in range(blocks[0]):
        for column in range(blocks[1]):
            below, beside = blocks[0] - 1 - row, blocks[1] - 1 - column
            shifts = [(0, 0), (row, below), (column, beside), (0, 0), (0, 0), (0, 0)]
            total = total + jnp.pad(windows[:, :, :, row, :, column], shifts)
    # [batch, rows, columns, row within the stride, column within it, features]
    full = total.transpose(0, 1, 3, 2, 4, 5).reshape(
        image.shape[0],
        (height + blocks[0] - 1) * strides[0],
        (width + blocks[1] - 1) * strides[1],
        features,
    )
    top, left = (
        _crop(size, stride) for size, stride in zip(kernel.shape[:2], strides, strict=True)
    )
    cut = full[:, top : top + height * strides[0], left : left + width * strides[1]]
    return cut.astype(image.dtype)


def _crop(size: int, stride: int) -> int:
    """Returns what SAME of `lax.conv_transpose` leaves out at the start of an axis."""
    before = size - 1 if stride > size - 1 else -(-(size + stride - 2) // 2)
    return size - 1 - before


def _check(image: jax.Array, kernel: jax.Array, strides: Sequence[int]) -> None:
    if image.ndim != 4 or kernel.ndim != 4 or image.shape[3] != kernel.shape[2]:
        raise UserError(
            "conv_transpose2d needs an image [batch, height, width, channels] and a kernel "
            f"[height, width, channels, features], not shapes {image.shape} and {kernel.shape}"
        )
    if image.dtype != kernel.dtype:
        raise UserError(
            f"conv_transpose2d needs image and kernel of one dtype, not {image.dtype} and "
            f"{kernel.dtype}; cast one of them, or set the layer's dtype"
        )
    if any(size < stride for size, stride in zip(kernel.shape[:2], strides, strict=True)):
        raise UserError(
            f"a kernel {kernel.shape[:2]} at strides {tuple(strides)} leaves gaps in the output: "
            "give a kernel at least as large as the strides"
        )
