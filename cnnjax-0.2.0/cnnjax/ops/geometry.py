"""The shape arithmetic of a two-dimensional convolution, checked once."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.errors import UserError

Pads = tuple[tuple[int, int], tuple[int, int]]
Shaped = jax.Array | jax.ShapeDtypeStruct
NHWC = ("NHWC", "HWIO", "NHWC")


class Geometry(NamedTuple):
    """Everything about a convolution that is known before its arrays; hashable."""

    strides: tuple[int, int]
    pads: Pads
    kernel_dilation: tuple[int, int]
    feature_group_count: int
    precision: Any

    def axes(
        self, image: Shaped, kernel: Shaped
    ) -> Iterator[tuple[int, int, int, int, tuple[int, int]]]:
        """Yields (size, taps, dilation, stride, pads) of the rows and of the columns."""
        return zip(
            image.shape[1:3],
            kernel.shape[:2],
            self.kernel_dilation,
            self.strides,
            self.pads,
            strict=True,
        )

    def output_size(self, image: Shaped, kernel: Shaped) -> tuple[int, int]:
        """Returns (output height, output width), zero where the window does not fit."""
        height, width = (
            max(0, (size + low + high - (taps - 1) * dilation - 1) // stride + 1)
            for size, taps, dilation, stride, (low, high) in self.axes(image, kernel)
        )
        return height, width


def make_geometry(
    image: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
    kernel_dilation: tuple[int, int],
    feature_group_count: int,
    precision: Any,
) -> Geometry:
    """Checks shapes and makes padding explicit; raises UserError naming what does not fit."""
    if image.ndim != 4 or kernel.ndim != 4:
        raise UserError(
            "conv2d needs an image [batch, height, width, channels] and a kernel [height, width, "
            f"in, out], not shapes {image.shape} and {kernel.shape}"
        )
    if image.dtype != kernel.dtype:
        raise UserError(
            f"conv2d needs image and kernel of one dtype, not {image.dtype} and {kernel.dtype}; "
            "cast one of them, or set the layer's dtype"
        )
    channels, groups = image.shape[3], feature_group_count
    if groups < 1 or channels != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise UserError(
            f"channels do not fit: image {image.shape} has {channels} channels, kernel "
            f"{kernel.shape} takes {kernel.shape[2]} in each of {groups} groups and gives "
            f"{kernel.shape[3]}; channels must be in * groups, and out a multiple of groups"
        )
    strides = checked_pair("strides", strides)
    kernel_dilation = checked_pair("kernel_dilation", kernel_dilation)
    window = [
        (size - 1) * dilation + 1
        for size, dilation in zip(kernel.shape[:2], kernel_dilation, strict=True)
    ]
    pads = explicit_pads(image.shape[1:3], window, strides, padding)
    return Geometry(strides, pads, kernel_dilation, groups, precision)


def checked_pair(name: str, pair: tuple[int, int]) -> tuple[int, int]:
    """Returns `pair` as two positive ints; raises UserError naming it otherwise."""
    try:
        first, second = (operator.index(value) for value in pair)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a pair such as (2, 2), not {pair!r}") from None
    if first < 1 or second < 1:
        raise UserError(f"{name} must be positive, not {pair!r}")
    return first, second


def explicit_pads(
    size: Sequence[int],
    window: Sequence[int],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
) -> Pads:
    """Returns ((top, bottom), (left, right)) for "SAME", "SAME_LOWER", "VALID" or explicit pairs.

    "SAME" at stride 2 pads more at the bottom and right, as TensorFlow and XLA do; PyTorch's
    symmetric padding is written out: `padding=((1, 1), (1, 1))`.
    """
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "SAME_LOWER", "VALID"):
            raise UserError(
                f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or ((top, bottom), (left, right)),"
                f" not {padding!r}"
            )
        rows, columns = lax.padtype_to_pads(size, window, strides, padding.upper())
        return rows, columns
    try:
        (top, bottom), (left, right) = (map(operator.index, pair) for pair in padding)
    except (TypeError, ValueError):
        raise UserError(
            f"padding must be ((top, bottom), (left, right)), not {padding!r}"
        ) from None
    return (top, bottom), (left, right)


def lax_conv2d(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """The compiler's own convolution: the definition that every other form must equal."""
    image, geometry = with_pads_inside(image, kernel, geometry)
    return lax.conv_general_dilated(
        image,
        kernel,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=NHWC,
        feature_group_count=geometry.feature_group_count,
        precision=geometry.precision,
    )


def with_pads_inside(
    image: jax.Array, kernel: Shaped, geometry: Geometry
) -> tuple[jax.Array, Geometry]:
    """Pads and cuts the image as far as the convolution cannot do it itself; see `_split_padding`.

    The pads that are left are not negative, and no larger than the window reaches.
    """
    rows, columns = (_split_padding(*axis) for axis in geometry.axes(image, kernel))
    before = [(*rows[0], 0), (*columns[0], 0)]
    if any(low or high for low, high, _ in before):
        image = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *before, (0, 0, 0)])
    return image, geometry._replace(pads=(rows[1], columns[1]))


def _split_padding(
    size: int, taps: int, dilation: int, stride: int, pads: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Splits one axis's padding into what is done before the convolution and what it does itself.

    XLA:CPU reads beyond the image where padding is negative at one end of an axis and positive at
    the other. So none is negative in the convolution, and none in its gradients: that of the image
    pads by window - 1 - padding, that of the kernel at the far end by what the last window reaches.
    """
    low, high = pads
    reach = (taps - 1) * dilation
    unread = max(0, size + low + high - reach - 1) % stride
    if low > 0 and high < unread:
        high -= unread
    inside = tuple(min(max(pad, 0), reach) for pad in (low, high))
    return (low - inside[0], high - inside[1]), (inside[0], inside[1])
