"""Which form of a convolution is compiled: one mathematical meaning, several lowerings.

The forms give the same values and gradients up to rounding and differ in speed:

* `lax`: `lax.conv_general_dilated`, the compiler's own convolution. The choice on GPU and TPU.
* `im2col`: patches and one matrix product, in the layout that suits the shape. XLA:CPU runs
  `lax` convolutions without its fast kernel and without threads inside a loop (`lax.scan`,
  `lax.while_loop`); matrix products are fast everywhere.
* `winograd`: 3x3 at stride 1 with 2.25 times fewer multiplications, as matrix products.
* `taps`: a depthwise convolution (one group a channel) as a sum of elementwise products, one for
  each tap of the window.

A form that cannot compute a convolution leaves it to `lax`.
`python benchmarks/convolutions.py` measures them all; `for_convolution` holds what it found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax

from cnnjax.errors import unknown_name
from cnnjax.ops.geometry import Geometry

LOWERINGS = ("auto", "im2col", "lax", "taps", "winograd")

# JAX keys its caches on this, so a function compiled under one value is not reused under another.
_lowering = jax.make_user_context("auto")


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Within the context, the convolutions and pools of this thread are traced in the form `name`.

    A function that was compiled before under another choice is recompiled, so the order of
    calls does not matter. A `lowering=` argument has the last word; "auto" restores the choice by
    platform and shape. Raises UserError for an unknown name.
    """
    with _lowering(checked_name(name)):
        yield


def checked_name(name: str) -> str:
    """Returns `name` if it is a lowering; raises UserError if not."""
    if name not in LOWERINGS:
        raise unknown_name("lowering", name, LOWERINGS)
    return name


def requested(argument: str | None) -> str:
    """Returns the lowering asked for by the argument, else by the context, else "auto"."""
    return _lowering.value if argument is None else checked_name(argument)


def on_cpu() -> bool:
    """Whether what is traced now will run on the CPU, as far as tracing can know.

    A default device that was set (`jax.default_device`) counts before the default backend. A
    wrong guess costs speed, never correctness: every lowering runs on every platform.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() == "cpu"
    return (device if isinstance(device, str) else device.platform) == "cpu"


def batch_may_be_sharded() -> bool:
    """Whether the compiler may divide the batch over devices, as far as tracing can know.

    It may not with one device, nor inside `shard_map` and `pmap`, where each program has its own.
    """
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes


# Measured on two AVX-512 cores with benchmarks/convolutions.py. Winograd's transforms are paid
# back by this many channels, and its many small products by this many output positions. Batch-last
# patches pay while they and the output fit the cache, taps-first patches while they do. `lax` is
# never chosen, although in a single call it is up to 1.5 times faster than patches on some shapes:
# in a loop it is fifty times slower.
WINOGRAD_CHANNELS = 32
WINOGRAD_POSITIONS = 1024
BATCH_LAST_BYTES = 12 * 2**20
TAPS_FIRST_CHANNELS, TAPS_FIRST_BYTES = 4, 16 * 2**20
FUSED_CHANNELS, FUSED_FEATURES_PER_TAP = 16, 16


def for_convolution(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> str:
    """Returns the lowering measured to be fastest for these shapes on this platform."""
    if not on_cpu():
        return "lax"
    if 1 < geometry.feature_group_count == image.shape[3]:
        return "taps"
    positions = image.shape[0] * math.prod(geometry.output_size(image, kernel))
    enough = min(kernel.shape[2:]) >= WINOGRAD_CHANNELS and positions >= WINOGRAD_POSITIONS
    return "winograd" if enough and winograd_fits(kernel, geometry) else "im2col"


def winograd_fits(kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether this is a convolution that `winograd` can compute: 3x3 at stride 1, ungrouped."""
    return (
        kernel.shape[:2] == (3, 3)
        and geometry.strides == (1, 1)
        and geometry.kernel_dilation == (1, 1)
        and geometry.feature_group_count == 1
    )


def taps_first(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether patches are copied faster as rows of the image than as its channels."""
    channels = image.shape[3]
    positions = image.shape[0] * math.prod(geometry.output_size(image, kernel))
    patch_bytes = positions * math.prod(kernel.shape[:2]) * channels * image.dtype.itemsize
    few = geometry.feature_group_count == 1 and channels <= TAPS_FIRST_CHANNELS
    return few and math.prod(kernel.shape[:2]) > 1 and patch_bytes <= TAPS_FIRST_BYTES


def batch_last(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether patches are copied faster with the batch innermost than with the channels."""
    batch, channels = image.shape[0], image.shape[3]
    positions = math.prod(geometry.output_size(image, kernel)) * batch
    window = math.prod(kernel.shape[:2])
    values = positions * max(window * channels, kernel.shape[3])
    small = values * image.dtype.itemsize <= BATCH_LAST_BYTES
    return window > 1 and channels <= 32 and batch >= 16 and small


def fuses(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> bool:
    """Whether convolution (of stride 1) and 2x2 max pool are fastest as one function."""
    return on_cpu() and batch_last(image, kernel, geometry)


def fused_row_stride(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> int:
    """Returns the stride of the rows of patches in convolution and max pool as one function.

    At stride 1 the matrix product has `k / (k + 1)` times the operations, and there are
    `2 k / (k + 1)` times the patches to copy, which must not need to be made block by block.
    """
    rows, _, channels, features = kernel.shape
    worth = channels >= FUSED_CHANNELS and features >= FUSED_FEATURES_PER_TAP * (rows - 1)
    return 1 if worth and batch_last(image, kernel, geometry) else 2


def slices_max_pool(name: str, window: tuple[int, int]) -> bool:
    """Whether max pool is a maximum of strided slices, not `lax.reduce_window`.

    XLA:CPU is slow at the gradient of `reduce_window` (`select_and_scatter`); the slices are as
    many as the window has positions, so a large window stays with `lax`.
    """
    return name == "im2col" or (name == "auto" and on_cpu() and math.prod(window) <= 9)
