"""Which form of a convolution is compiled: one mathematical meaning, several lowerings.

The forms give the same values and gradients up to rounding and differ in speed:

* `lax`: `lax.conv_general_dilated`, the compiler's own convolution. The choice on GPU and TPU.
* `im2col`: patches and one matrix product, in the layout that suits the shape. XLA:CPU runs
  `lax` convolutions without its fast kernel and without threads inside a loop (`lax.scan`,
  `lax.while_loop`); matrix products are fast everywhere.
* `taps`: `lax` forward, and the gradient of the kernel by one matrix product per tap. A depthwise
  convolution (one group a channel) is a sum of elementwise products, one per tap; with other groups
  it is `lax`.

`python scripts/bench_ops.py` measures them all; `for_convolution` holds what it found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import jax

from cnnjax.errors import unknown_name
from cnnjax.ops.geometry import Geometry

LOWERINGS = ("auto", "im2col", "lax", "taps")

# JAX keys its caches on these, so a function compiled under one value is not reused under another.
_lowering = jax.make_user_context("auto")
_inside_loop = jax.make_user_context(False)


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Within the context, the convolutions and pools of this thread are traced in the form `name`.

    A function that was compiled before under another choice is compiled anew, so the order of
    calls does not matter. A `lowering=` argument has the last word; "auto" restores the choice by
    platform and shape. Raises UserError for an unknown name.
    """
    with _lowering(checked_name(name)):
        yield


@contextlib.contextmanager
def inside_loop() -> Iterator[None]:
    """Within the context, the automatic choice is made for the body of a compiled loop.

    Tracing cannot see that a step will become the body of `lax.scan` or `lax.while_loop`; whoever
    builds the loop can say so.
    """
    with _inside_loop(True):
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


# Measured on two AVX-512 cores with scripts/bench_ops.py. Batch-last patches pay while they and the
# output fit the cache; taps pay for images that do not, unless the channels are so few that each
# tap's product is mostly copying. Small convolutions stay with patches even where `lax` is up to
# twice as fast in a single call: in a loop that nobody announced it is fifty times slower.
BATCH_LAST_BYTES = 12 * 2**20
TAPS_BYTES = 4 * 2**20


def for_convolution(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> str:
    """Returns the lowering measured to be fastest for these shapes on this platform."""
    if not on_cpu():
        return "lax"
    if 1 < geometry.feature_group_count == image.shape[3]:
        return "taps"
    large = image.size * image.dtype.itemsize >= TAPS_BYTES and image.shape[3] > 8
    window = math.prod(kernel.shape[:2])
    if large and window > 1 and geometry.feature_group_count == 1 and not _inside_loop.value:
        return "taps"
    return "im2col"


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


def slices_max_pool(name: str, window: tuple[int, int]) -> bool:
    """Whether max pool is a maximum of strided slices, not `lax.reduce_window`.

    XLA:CPU is slow at the gradient of `reduce_window` (`select_and_scatter`); the slices are as
    many as the window has positions, so a large window stays with `lax`.
    """
    return name in ("im2col", "taps") or (name == "auto" and on_cpu() and math.prod(window) <= 9)
