"""Two-dimensional convolution: one function, one meaning, several lowerings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops import choice, forms, primitive
from cnnjax.ops.geometry import Geometry, lax_conv2d, make_geometry


def conv2d(
    image: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    kernel_dilation: tuple[int, int] = (1, 1),
    feature_group_count: int = 1,
    bias: jax.Array | None = None,
    precision: Any = None,
    lowering: str | None = None,
) -> jax.Array:
    """Convolves (as all of deep learning says; in mathematics, correlates) a batch of images.

    `output[b, y, x, o] = bias[o] + sum over i, j, c of
    padded[b, y * stride + i * dilation, x * stride + j * dilation, c] * kernel[i, j, c, o]`

    Equal to `lax.conv_general_dilated` with ("NHWC", "HWIO", "NHWC") up to rounding, gradients of
    every order included; products of 16-bit floats are accumulated in float32.

    Args:
      image: `[batch, height, width, channels]`.
      kernel: `[kernel height, kernel width, channels / feature_group_count, features]`.
      strides: step of the window down and right.
      padding: "SAME", "SAME_LOWER", "VALID" or ((top, bottom), (left, right)), which may be
        negative. "SAME" at stride 2 is asymmetric; PyTorch's padding is given as pairs.
      kernel_dilation: distance between neighboring taps of the window.
      feature_group_count: groups of channels that do not see each other.
      bias: `[features]`, added to each position.
      precision: a `jax.lax.Precision`, as in `lax`.
      lowering: a name of `cnnjax.ops.LOWERINGS`; None: the context's, else by platform and shape.

    Returns:
      `[batch, output height, output width, features]` in the dtype of `image`.

    Raises:
      UserError: shapes, dtypes or settings that do not fit, or an unknown lowering.
    """
    geometry = make_geometry(
        image, kernel, strides, padding, kernel_dilation, feature_group_count, precision
    )
    result = _convolve(image, kernel, geometry, choice.requested(lowering))
    return result if bias is None else result + bias


def _convolve(image: jax.Array, kernel: jax.Array, geometry: Geometry, name: str) -> jax.Array:
    empty = 0 in (image.size, kernel.size, *geometry.output_size(image, kernel))
    if empty or not jnp.issubdtype(image.dtype, jnp.floating):
        return lax_conv2d(image, kernel, geometry)
    if name in ("auto", "once", "onednn"):
        return primitive.convolution(image, kernel, geometry, name)
    if name == "winograd" and not choice.winograd_fits(kernel, geometry):
        name = "lax"
    if name == "taps" and not choice.taps_fits(image, geometry):
        name = "lax"
    return forms.FORMS[name](image, kernel, geometry)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated`, by `conv2d` where it is a plain NHWC x HWIO convolution.

    Made for `flax.linen.Conv(conv_general_dilated=...)`. Other ranks, layouts, transposed
    convolutions, batch groups and a `preferred_element_type` go to `lax` as they are.
    """
    plain = (
        lhs.ndim == 4
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        and tuple(lhs_dilation or (1, 1)) == (1, 1)
        and batch_group_count == 1
        and preferred_element_type is None
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    row_stride, column_stride = window_strides
    row_dilation, column_dilation = rhs_dilation or (1, 1)
    return conv2d(
        lhs,
        rhs,
        strides=(row_stride, column_stride),
        padding=padding,
        kernel_dilation=(row_dilation, column_dilation),
        feature_group_count=feature_group_count,
        precision=precision,
    )
