"""The memory layout of one leaf in another framework, as data usable in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


def _same(shape: Shape) -> Shape:
    return shape


@dataclasses.dataclass(frozen=True)
class Layout:
    """Our array, its axes regrouped by `inner`, transposed by `axes`, regrouped by `outer`: theirs.

    Attributes:
      axes: which of the regrouped axes is the first of theirs, and so on.
      inner: our shape -> the shape that is transposed; as many elements, in the same order.
      outer: the transposed shape -> their shape.
    """

    axes: tuple[int, ...]
    inner: Callable[[Shape], Shape] = _same
    outer: Callable[[Shape], Shape] = _same

    def their_shape(self, shape: Shape) -> Shape:
        """Returns the shape that a leaf of ours has in the other framework."""
        return self.outer(self._transposed(shape))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns our array in their layout, contiguous."""
        regrouped = array.reshape(self.inner(array.shape)).transpose(self.axes)
        # Not `ascontiguousarray`, which gives scalars an axis.
        return np.array(regrouped, order="C", copy=None).reshape(self.their_shape(array.shape))

    def to_ours(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """Returns their array as ours of that shape, contiguous."""
        inverse = tuple(int(axis) for axis in np.argsort(self.axes))
        regrouped = array.reshape(self._transposed(shape)).transpose(inverse)
        return np.array(regrouped, order="C", copy=None).reshape(shape)

    def _transposed(self, shape: Shape) -> Shape:
        regrouped = self.inner(shape)
        return tuple(regrouped[axis] for axis in self.axes)


def unchanged(rank: int) -> Layout:
    """The same axes in the same order."""
    return Layout(tuple(range(rank)))


# Kernels of convolutions: HWIO here, OIHW in PyTorch; depthwise ones too (HW1O, O1HW).
OIHW = Layout((3, 2, 0, 1))
# Kernels of dense layers: [in, out] here, [out, in] in PyTorch.
DENSE = Layout((1, 0))
# Kernels of convolutions along a line: 1 by its length here, without the first axis in PyTorch.
WINDOW = Layout((3, 2, 1, 0), outer=lambda shape: shape[:3])
# A dense layer here that is a 1x1 convolution in PyTorch.
DENSE_AS_1X1 = Layout((1, 0), outer=lambda shape: (*shape, 1, 1))
# A dense layer here that is a 1x1 convolution in Keras.
KERNEL_1X1 = Layout((0, 1), outer=lambda shape: (1, 1, *shape))
# Kernels of depthwise convolutions: HW1C here, HWC1 in Keras.
DEPTHWISE = Layout((0, 1, 3, 2))
# A number for each channel, with axes of size one behind it.
CHANNEL_11 = Layout((0,), outer=lambda shape: (*shape, 1, 1))
CHANNEL_111 = Layout((0,), outer=lambda shape: (*shape, 1, 1, 1))


def flattened(channels: int) -> Layout:
    """A dense layer behind a flattened image: height, width, channels here, channels first there.

    Args:
      channels: of the image that is flattened.
    """
    return Layout(
        (2, 1, 0),
        inner=lambda shape: (shape[0] // channels, channels, shape[1]),
        outer=lambda shape: (shape[0], shape[1] * shape[2]),
    )
