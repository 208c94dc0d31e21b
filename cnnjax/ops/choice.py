"""Which form of a convolution is compiled: one mathematical meaning, several lowerings.

The forms give the same values and gradients up to rounding and differ in speed:

* `lax`: `lax.conv_general_dilated`, the compiler's own convolution. The choice on GPU and TPU.
* `im2col`: patches and one matrix product, in the layout that suits the shape. XLA:CPU runs
  `lax` convolutions without its fast kernel and without threads inside a loop (`lax.scan`,
  `lax.while_loop`); matrix products are fast everywhere.
* `winograd`: 3x3 at stride 1 with 2.25 times fewer multiplications, as matrix products.
* `onednn`: the library that jaxlib carries for x86 (see `cnnjax.ops.onednn`).
* `once`: as `auto`, of a program that is not compiled into a loop: there XLA:CPU's own convolution
  is fast, and is taken where it is the fastest forward.
* `taps`: a depthwise convolution (one group a channel) as a sum of elementwise products, one for
  each tap of the window.

A form that cannot compute a convolution leaves it to `lax`.
`python benchmarks/convolutions.py` measures them all; `for_cpu` holds what it found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from cnnjax.errors import unknown_name
from cnnjax.ops import onednn
from cnnjax.ops.geometry import Geometry, Shaped

if TYPE_CHECKING:
    from cnnjax.ops.primitive import Form

# What a convolution or a derivative of it gives: see `cnnjax.ops.primitive`.
IMAGE, KERNEL, RESULT = range(3)
LOWERINGS = ("auto", "im2col", "lax", "once", "onednn", "taps", "winograd")

# JAX keys its caches on these, so a function compiled under one value is not reused under another.
_lowering = jax.make_user_context("auto")
_whole_batch = jax.make_user_context(None)


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Within the context, the convolutions and pools of this thread are traced in the form `name`.

    A function that was compiled before under another choice is recompiled, so the order of
    calls does not matter. A `lowering=` argument has the last word; "auto" restores the choice by
    platform and shape. Raises UserError for an unknown name.
    """
    with _lowering(checked_name(name)):
        yield


@contextlib.contextmanager
def outside_loops() -> Iterator[None]:
    """Within the context, "auto" is "once": what is traced runs a network once, in no loop."""
    with _lowering("once" if _lowering.value == "auto" else _lowering.value):
        yield


def checked_name(name: str) -> str:
    """Returns `name` if it is a lowering; raises UserError if not."""
    if name not in LOWERINGS:
        raise unknown_name("lowering", name, LOWERINGS)
    return name


def requested(argument: str | None) -> str:
    """Returns the lowering asked for by the argument, else by the context, else "auto"."""
    return _lowering.value if argument is None else checked_name(argument)


@contextlib.contextmanager
def whole_batch(whole: bool) -> Iterator[None]:
    """Within the context, what is traced is known to have its whole batch, or not to."""
    with _whole_batch(whole):
        yield


def batch_may_be_sharded() -> bool:
    """Whether the compiler may divide the batch over devices, as far as tracing can know.

    It may not with one device, nor inside `shard_map` and `pmap`, where each program has its own.
    """
    if _whole_batch.value is not None:
        return not _whole_batch.value
    return jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes


def batch_is_whole(context: Any) -> bool:
    """Whether a program that JAX lowers in this context is one device's own.

    There is only one device, or `shard_map` or `pmap` have made a program for each.
    """
    if isinstance(context, mlir.SPMDAxisContext):
        return set(context.mesh.axis_names) == set(context.manual_axes)
    return getattr(context, "num_devices", 1) == 1


# Measured on two AVX-512 cores with benchmarks/convolutions.py. Winograd's transforms are paid
# back by this many channels, and its many small products by this many output positions. Batch-last
# patches pay while they and the output fit the cache, taps-first patches while they do. `lax` is
# never chosen, although in a single call it is up to 1.5 times faster than patches on some shapes:
# in a loop it is fifty times slower.
WINOGRAD_CHANNELS = 32
WINOGRAD_POSITIONS = 1024
BATCH_LAST_BYTES = 12 * 2**20
TAPS_FIRST_CHANNELS, TAPS_FIRST_BYTES = 4, 16 * 2**20
ONCE_FEATURES = 32
FUSED_CHANNELS, FUSED_FEATURES_PER_TAP = 16, 16
# The same on two AVX2 cores, for the gradient of the image, that of the kernel, and the result.
NARROW_WINOGRAD_CHANNELS = (32, 128, 64)
NARROW_WINOGRAD_POSITIONS, NARROW_WINOGRAD_SIZE = (256, 1024, 256), 4
# Winograd's transforms take a second or two to compile, and each step gains a few milliseconds from
# so many multiplications on.
NARROW_WINOGRAD_MULTIPLICATIONS = 10**8


def for_cpu(form: Form, image: Shaped, kernel: Shaped, *, own_kernels: bool) -> str:
    """Returns the lowering measured to be fastest on a CPU for a convolution or a gradient of it.

    Args:
      form: which of them, and how it was asked for.
      image: its shape and dtype.
      kernel: its shape and dtype.
      own_kernels: whether the program may call kernels that are not XLA's: no batch is divided by
        the compiler, and the program is run here.
    """
    geometry = form.geometry
    callable_here = own_kernels and onednn.available(str(image.dtype))
    if form.lowering == "onednn":
        return "onednn" if callable_here else "lax"
    if callable_here:
        if image.dtype != jnp.float32 or geometry.feature_group_count > 1:
            return "onednn"
        if not onednn.wide_vectors():
            return for_narrow_vectors(form, image, kernel)
        if not products_are_faster(form, image, kernel):
            return "onednn"
    if taps_fits(image, geometry):
        return "taps"
    if form.lowering == "once" and not callable_here and window_fits(image, kernel, geometry):
        return "lax"
    pays = winograd_pays(image, kernel, geometry, WINOGRAD_CHANNELS, WINOGRAD_POSITIONS)
    return "winograd" if pays else "im2col"


def products_are_faster(form: Form, image: Shaped, kernel: Shaped) -> bool:
    """Whether XLA's products are faster than oneDNN at an ungrouped convolution of float32.

    Winograd's, with many channels; and those over patches: of a few channels for the gradient of
    the kernel, of many for that of the image at strides, which oneDNN computes in parts.
    """
    geometry, channels, batch = form.geometry, min(kernel.shape[2:]), image.shape[0]
    if kernel.shape[:2] == (1, 1):
        return False
    if form.of == IMAGE and geometry.strides != (1, 1):
        return channels >= 128
    if form.of == KERNEL:
        return taps_first(image, kernel, geometry)
    enough = channels >= 256 and (batch >= 32 or form.of == IMAGE)
    return winograd_fits(kernel, geometry) and enough


def for_narrow_vectors(form: Form, image: Shaped, kernel: Shaped) -> str:
    """Returns the fastest form of an ungrouped convolution of float32 where there is no AVX-512.

    A multiplication costs more there, so that Winograd's fewer pay from fewer channels on.
    """
    geometry = form.geometry
    if form.of == KERNEL and taps_first(image, kernel, geometry):
        return "im2col"
    channels, positions = NARROW_WINOGRAD_CHANNELS[form.of], NARROW_WINOGRAD_POSITIONS[form.of]
    size = geometry.output_size(image, kernel)
    multiplications = image.shape[0] * math.prod(size) * math.prod(kernel.shape)
    large = min(size) >= NARROW_WINOGRAD_SIZE and multiplications >= NARROW_WINOGRAD_MULTIPLICATIONS
    pays = large and winograd_pays(image, kernel, geometry, channels, positions)
    return "winograd" if pays else "onednn"


def window_fits(image: Shaped, kernel: Shaped, geometry: Geometry) -> bool:
    """Whether the window is no larger than the image: else XLA:CPU computes a hundredth as fast."""
    extents = [
        (size - 1) * dilation + 1
        for size, dilation in zip(kernel.shape[:2], geometry.kernel_dilation, strict=True)
    ]
    return extents[0] <= image.shape[1] and extents[1] <= image.shape[2]


def winograd_pays(
    image: Shaped, kernel: Shaped, geometry: Geometry, channels: int, positions: int
) -> bool:
    """Whether `winograd` can compute this, with so many channels and output positions at least."""
    there = image.shape[0] * math.prod(geometry.output_size(image, kernel))
    enough = min(kernel.shape[2:]) >= channels and there >= positions
    return enough and winograd_fits(kernel, geometry)


def winograd_fits(kernel: Shaped, geometry: Geometry) -> bool:
    """Whether this is a convolution that `winograd` can compute: 3x3 at stride 1, ungrouped."""
    return (
        kernel.shape[:2] == (3, 3)
        and geometry.strides == (1, 1)
        and geometry.kernel_dilation == (1, 1)
        and geometry.feature_group_count == 1
    )


def taps_fits(image: Shaped, geometry: Geometry) -> bool:
    """Whether this is a depthwise convolution, which `taps` can compute."""
    return 1 < geometry.feature_group_count == image.shape[3]


def taps_first(image: Shaped, kernel: Shaped, geometry: Geometry) -> bool:
    """Whether patches are copied faster as rows of the image than as its channels."""
    channels = image.shape[3]
    positions = image.shape[0] * math.prod(geometry.output_size(image, kernel))
    patch_bytes = positions * math.prod(kernel.shape[:2]) * channels * image.dtype.itemsize
    few = geometry.feature_group_count == 1 and channels <= TAPS_FIRST_CHANNELS
    return few and math.prod(kernel.shape[:2]) > 1 and patch_bytes <= TAPS_FIRST_BYTES


def batch_last(image: Shaped, kernel: Shaped, geometry: Geometry) -> bool:
    """Whether patches are copied faster with the batch innermost than with the channels."""
    batch, channels = image.shape[0], image.shape[3]
    positions = math.prod(geometry.output_size(image, kernel)) * batch
    window = math.prod(kernel.shape[:2])
    values = positions * max(window * channels, kernel.shape[3])
    small = values * image.dtype.itemsize <= BATCH_LAST_BYTES
    return window > 1 and channels <= 32 and batch >= 16 and small


def fuses(image: Shaped, kernel: Shaped, geometry: Geometry, name: str) -> bool:
    """Whether convolution (of stride 1) and 2x2 max pool are fastest as one function on a CPU."""
    if name == "once" and kernel.shape[3] >= ONCE_FEATURES:
        return False
    return name in ("auto", "once") and batch_last(image, kernel, geometry)


def fused_row_stride(image: Shaped, kernel: Shaped, geometry: Geometry) -> int:
    """Returns the stride of the rows of patches in convolution and max pool as one function.

    At stride 1 the matrix product has `k / (k + 1)` times the operations, and there are
    `2 k / (k + 1)` times the patches to copy, which must not need to be made block by block.
    """
    rows, _, channels, features = kernel.shape
    worth = channels >= FUSED_CHANNELS and features >= FUSED_FEATURES_PER_TAP * (rows - 1)
    return 1 if worth and batch_last(image, kernel, geometry) else 2
