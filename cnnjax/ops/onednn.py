"""Convolutions by oneDNN, the library of CPU kernels that jaxlib carries for x86 on Linux.

XLA itself no longer chooses it, but compiles a custom call by its name: `__onednn$convolution`
computes a convolution in the layout that it is given, with threads and inside loops alike. There is
only the forward one. Both gradients are made of it:

* that of the image is a convolution of the cotangent with the flipped kernel, at stride 1; at
  stride s one for each of the s x s places that a pixel can have under the window's steps;
* that of the kernel is a convolution of the image with the cotangent as a large kernel. There the
  contracted axis is the batch, and the channels stand side by side with the columns.

The call ends the process on a shape or dtype that oneDNN refuses, and programs with it cannot be
kept in JAX's compilation cache on disk (jax 0.10): see `available` and `cnnjax.ops.choice`.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import sys
import warnings

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax.ops.geometry import Geometry, Pads, Shaped, with_pads_inside

# The call is no public interface of jaxlib: what its numbers mean has been tried in these only.
JAXLIB_VERSIONS = ("0.10.2",)
# Of a kernel's gradient: about half of what the cores share (measured with 32 MiB).
CACHED_BYTES = 16 * 2**20
# Where vectors are narrow, examples are divided, not rows: below these bytes not those of a small
# batch, and into as many at a time.
NARROW_CACHED_BYTES, SMALL_BATCH, FEW_EXAMPLES = 8 * 2**20, 8, 4
# Channels of a group from which on groups one by one are faster than examples one by one.
WIDE_GROUP = 16


@functools.cache
def available(dtype: str) -> bool:
    """Whether oneDNN can be called for this dtype, and is fast: "float32" or "bfloat16"."""
    import jaxlib

    known = jaxlib.__version__ in JAXLIB_VERSIONS
    if not known or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    # JAX tries to keep each program on disk, and says so where it cannot: nothing is lost by it.
    warnings.filterwarnings(
        "ignore", "Error writing persistent compilation cache entry .* MemoryError"
    )
    return dtype == "float32" or (dtype == "bfloat16" and _multiplies_bfloat16())


@functools.cache
def wide_vectors() -> bool:
    """Whether the processor has vectors of 16 floats (AVX-512), for which other forms are best."""
    return "avx512f" in _processor_flags()


def _multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16; without, oneDNN may have none."""
    return not _processor_flags().isdisjoint(("avx512_bf16", "amx_bf16"))


def _processor_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return frozenset(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()


def convolution(
    image: jax.Array, kernel: jax.Array, geometry: Geometry, *, exchanged: bool = False
) -> jax.Array:
    """Convolution NHWC x HWIO -> NHWC of any strides, dilation and groups.

    `exchanged`: the kernel's last two axes are features and channels.
    """
    image, geometry = with_pads_inside(image, kernel, geometry)
    return _call(image, kernel, geometry, exchanged=exchanged)


def image_gradient(
    kernel: jax.Array, cotangent: jax.Array, size: tuple[int, int], geometry: Geometry
) -> jax.Array:
    """Gradient of the image, whose height and width are `size`.

    Pixel `s m + a` of the padded image is seen through the taps `a`, `a + s`, `a + 2 s` ... of the
    kernel, by the outputs `m`, `m - 1`, `m - 2` ...: a convolution at stride 1 for each `a`.
    """
    groups = geometry.feature_group_count
    if geometry.kernel_dilation != (1, 1) and geometry.strides != (1, 1):
        rows, columns = (stride - 1 for stride in geometry.strides)
        zero = jnp.zeros((), cotangent.dtype)
        spread = [(0, 0, 0), (0, 0, rows), (0, 0, columns), (0, 0, 0)]
        cotangent = lax.pad(cotangent, zero, spread)
        geometry = geometry._replace(strides=(1, 1))
    flipped = kernel[::-1, ::-1]
    if groups > 1:
        flipped = _with_channels_exchanged(flipped, groups)
    (row_stride, column_stride), ((top, _), (left, _)) = geometry.strides, geometry.pads
    # Counted from where the first window begins.
    steps = [
        -(-(length + max(low, 0)) // stride)
        for length, low, stride in zip(size, (top, left), geometry.strides, strict=True)
    ]
    phases = {
        (row, column): _phase(
            cotangent, _taps_of_phase(flipped, (row, column), geometry.strides), steps, geometry
        )
        for row in range(row_stride)
        for column in range(column_stride)
    }
    whole = _interleaved(phases, geometry.strides)
    zero = jnp.zeros((), whole.dtype)
    cut = [
        (-low, length + low - width, 0)
        for low, length, width in zip((top, left), size, whole.shape[1:3], strict=True)
    ]
    return lax.pad(whole, zero, [(0, 0, 0), *cut, (0, 0, 0)])


def _interleaved(
    phases: dict[tuple[int, int], jax.Array | None], strides: tuple[int, int]
) -> jax.Array:
    """Returns what has `phases[a, b]` at the pixels (s m + a, s n + b), else zero."""
    (first, known), *others = ((at, phase) for at, phase in phases.items() if phase is not None)
    if not others:
        spread = [(a, stride - 1 - a, stride - 1) for a, stride in zip(first, strides, strict=True)]
        return lax.pad(known, jnp.zeros((), known.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
    zeros = jnp.zeros_like(known)
    grid = jnp.stack([zeros if phase is None else phase for phase in phases.values()])
    batch, rows, columns, channels = known.shape
    grid = grid.reshape(*strides, batch, rows, columns, channels).transpose(2, 3, 0, 4, 1, 5)
    return grid.reshape(batch, rows * strides[0], columns * strides[1], channels)


def _taps_of_phase(
    flipped: jax.Array, phase: tuple[int, int], strides: tuple[int, int]
) -> jax.Array:
    """Returns every `stride`-th tap, counted from the flipped kernel's far end."""
    starts = [(size - 1 - a) % s for size, a, s in zip(flipped.shape, phase, strides, strict=False)]
    ends = [size - a for size, a in zip(flipped.shape, phase, strict=False)]
    return flipped[
        starts[0] : max(ends[0], 0) : strides[0], starts[1] : max(ends[1], 0) : strides[1]
    ]


def _phase(
    cotangent: jax.Array, taps: jax.Array, steps: list[int], geometry: Geometry
) -> jax.Array | None:
    """Returns `steps` outputs of the cotangent's convolution, the first seeing its first pixel.

    None where no tap reaches them.
    """
    if 0 in taps.shape:
        return None
    reaches = [
        (size - 1) * dilation
        for size, dilation in zip(taps.shape[:2], geometry.kernel_dilation, strict=True)
    ]
    rows, columns = (
        (reach, count - length)
        for reach, count, length in zip(reaches, steps, cotangent.shape[1:3], strict=True)
    )
    geometry = geometry._replace(strides=(1, 1), pads=(rows, columns))
    return convolution(cotangent, taps, geometry, exchanged=geometry.feature_group_count == 1)


def _with_channels_exchanged(kernel: jax.Array, groups: int) -> jax.Array:
    """Returns `[height, width, features / groups, channels]`, group by group."""
    height, width, inner, features = kernel.shape
    split = kernel.reshape(height, width, inner, groups, features // groups)
    return split.transpose(0, 1, 4, 3, 2).reshape(height, width, features // groups, -1)


def kernel_gradient(
    image: jax.Array, cotangent: jax.Array, window: tuple[int, int], geometry: Geometry
) -> jax.Array:
    """Gradient of the kernel, whose height and width are `window`."""
    kernel = jax.ShapeDtypeStruct((*window, 0, 0), image.dtype)
    image, geometry = with_pads_inside(image, kernel, geometry)
    groups = geometry.feature_group_count
    if _has_narrow_groups(image, geometry):
        return _kernel_gradient_of_narrow_groups(image, cotangent, window, geometry)
    if groups > 1:
        return _kernel_gradient_of_wide_groups(image, cotangent, window, geometry)
    if window == (1, 1) and geometry.pads == ((0, 0), (0, 0)):
        return _kernel_gradient_of_one_tap(image, cotangent, geometry)
    return _kernel_gradient_of_window(image, cotangent, window, geometry)


def _has_narrow_groups(image: Shaped, geometry: Geometry) -> bool:
    groups = geometry.feature_group_count
    return groups > 1 and image.shape[3] < WIDE_GROUP * groups


def examples_at_a_time(
    image: Shaped, cotangent: Shaped, window: tuple[int, int], geometry: Geometry
) -> int:
    """Returns how many examples of the batch `kernel_gradient` should be given at a time.

    Without AVX-512 oneDNN is up to five times slower with a long contracted axis, the batch, than
    with a few examples of it, as long as their sum, a kernel, is not much larger than they are.
    """
    batch = image.shape[0]
    if wide_vectors() or math.prod(window) == 1 or _has_narrow_groups(image, geometry):
        return batch
    itemsize = image.dtype.itemsize
    seen = (image.size + cotangent.size) * itemsize
    if batch <= SMALL_BATCH and seen <= NARROW_CACHED_BYTES:
        return batch
    channels = image.shape[3] // geometry.feature_group_count
    kernel_bytes = math.prod(window) * channels * cotangent.shape[3] * itemsize
    least = FEW_EXAMPLES if batch > SMALL_BATCH else 2
    wanted = min(batch, max(least, math.ceil(batch * kernel_bytes / (4 * seen))))
    divisor = min(n for n in range(wanted, batch + 1) if batch % n == 0)
    return divisor if divisor <= 2 * wanted else wanted


def _kernel_gradient_of_one_tap(
    image: jax.Array, cotangent: jax.Array, geometry: Geometry
) -> jax.Array:
    """One product of matrices: all pixels are contracted."""
    rows, columns = geometry.strides
    seen = image[:, ::rows, ::columns][:, : cotangent.shape[1], : cotangent.shape[2]]
    flat = cotangent.reshape(-1, cotangent.shape[3])
    product = transposed_product(seen.reshape(-1, image.shape[3]), flat)
    return product[None, None]


def _kernel_gradient_of_window(
    image: jax.Array, cotangent: jax.Array, window: tuple[int, int], geometry: Geometry
) -> jax.Array:
    """One convolution, which contracts the rows, columns and examples.

    Its image is `[1, rows, columns * channels, batch]`, where a column is `channels` steps wide;
    its window is the cotangent, `[rows, columns, batch, features]`, dilated by the strides; its
    result is `[1, window rows, window columns * channels, features]`. Where the cotangent is too
    large for the cache, blocks of its rows follow each other, and their results are summed.
    """
    image, (rows, (left, right)) = _as_far_as_seen(image, cotangent, window, geometry)
    batch, height, width, channels = image.shape
    sideways = image.reshape(batch, -1).T.reshape(height, width * channels, batch)
    cotangent = cotangent.transpose(1, 2, 0, 3)
    (stride, column_stride), (dilation, column_dilation) = (
        geometry.strides,
        geometry.kernel_dilation,
    )
    exchanged = Geometry(
        strides=(dilation, 1),
        pads=(rows, (left * channels, right * channels)),
        kernel_dilation=(stride, column_stride * channels),
        feature_group_count=1,
        precision=geometry.precision,
    )
    steps = len(cotangent)
    block = _rows_at_a_time(steps, cotangent.nbytes // steps)
    if block == steps:
        total = _call(sideways[None], cotangent, exchanged)
    else:
        exchanged = exchanged._replace(pads=((0, 0), exchanged.pads[1]))
        zero = jnp.zeros((), sideways.dtype)
        sideways = lax.pad(sideways, zero, [(*rows, 0), (0, 0, 0), (0, 0, 0)])
        span = (block - 1) * stride + (window[0] - 1) * dilation + 1

        def of_block(number: jax.Array) -> jax.Array:
            seen = lax.dynamic_slice_in_dim(sideways, number * block * stride, span)
            rows = lax.dynamic_slice_in_dim(cotangent, number * block, block)
            return _call(seen[None], rows, exchanged)

        shape = jax.eval_shape(of_block, jnp.zeros((), jnp.int32))
        total = lax.fori_loop(
            0,
            steps // block,
            lambda number, total: total + of_block(number).astype(jnp.float32),
            jnp.zeros(shape.shape, jnp.float32),
        ).astype(image.dtype)
    # A dilated window's columns are some of those between its ends.
    columns = total.reshape(window[0], -1, channels, cotangent.shape[3])
    return columns[:, ::column_dilation]


def _rows_at_a_time(steps: int, row_bytes: int) -> int:
    """Returns a divisor of `steps`: all of them, or where they are large as many as fit a cache."""
    if steps * row_bytes <= CACHED_BYTES:
        return steps
    fitting = [n for n in range(1, steps) if steps % n == 0 and n * row_bytes <= CACHED_BYTES // 2]
    # Blocks of very few rows have too little to compute.
    return max(fitting) if fitting and max(fitting) * row_bytes >= CACHED_BYTES // 16 else steps


def _as_far_as_seen(
    image: jax.Array, cotangent: jax.Array, window: tuple[int, int], geometry: Geometry
) -> tuple[jax.Array, Pads]:
    """Returns the image without what no window sees, and the pads to the end of the last one."""
    ends, pads = [], []
    for size, steps, taps, dilation, stride, (low, _) in zip(
        image.shape[1:3],
        cotangent.shape[1:3],
        window,
        geometry.kernel_dilation,
        geometry.strides,
        geometry.pads,
        strict=True,
    ):
        seen = (steps - 1) * stride + (taps - 1) * dilation + 1 - low
        ends.append(min(seen, size))
        pads.append((low, max(seen - size, 0)))
    return image[:, : ends[0], : ends[1]], (pads[0], pads[1])


def _kernel_gradient_of_wide_groups(
    image: jax.Array, cotangent: jax.Array, window: tuple[int, int], geometry: Geometry
) -> jax.Array:
    """A group at a time, each an ungrouped convolution."""

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(*array.shape[:3], groups, -1), 3, 0)

    groups, geometry = geometry.feature_group_count, geometry._replace(feature_group_count=1)
    gradients = lax.map(
        lambda pair: _kernel_gradient_of_window(pair[0], pair[1], window, geometry),
        (split(image), split(cotangent)),
    )
    return jnp.moveaxis(gradients, 0, 3).reshape(*gradients.shape[1:4], -1)


def _kernel_gradient_of_narrow_groups(
    image: jax.Array, cotangent: jax.Array, window: tuple[int, int], geometry: Geometry
) -> jax.Array:
    """An example at a time, each channel of the image with the features that it is used for.

    They are depthwise convolutions, as many as a group has channels, whose kernel is the cotangent.
    """
    groups, features = geometry.feature_group_count, cotangent.shape[3]
    inner = image.shape[3] // groups
    exchanged = Geometry(
        geometry.kernel_dilation, geometry.pads, geometry.strides, features, geometry.precision
    )

    def add(total: jax.Array, example: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        pixels, cotangent = (array.astype(jnp.float32) for array in example)
        split = pixels.reshape(*pixels.shape[:2], groups, inner).transpose(3, 0, 1, 2)
        channels = jnp.repeat(split, features // groups, axis=3)
        result = _call(channels, cotangent[:, :, None], exchanged)
        return total + result[:, : window[0], : window[1]], None

    start = jnp.zeros((inner, *window, features), jnp.float32)
    total, _ = lax.scan(add, start, (image, cotangent))
    return total.transpose(1, 2, 0, 3).astype(image.dtype)


def transposed_product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns `left.T @ right` of `[rows, n]` and `[rows, m]`."""
    result = jax.ShapeDtypeStruct((left.shape[1], right.shape[1]), left.dtype)
    config = {"onednn_matmul_config": {"transpose_a": True}}
    return _custom_call("matmul", result, config, left, right)


def _call(
    image: jax.Array, kernel: jax.Array, geometry: Geometry, *, exchanged: bool = False
) -> jax.Array:
    """Calls oneDNN; `exchanged`, the kernel's last two axes are features and channels."""
    inner, outer = (3, 2) if exchanged else (2, 3)
    if geometry.feature_group_count > 1 and geometry.kernel_dilation != (1, 1):
        # Its dilated depthwise kernels (of jaxlib 0.10.2) write outside of their arrays.
        gaps = [(0, 0, dilation - 1) for dilation in geometry.kernel_dilation]
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*gaps, (0, 0, 0), (0, 0, 0)])
        geometry = geometry._replace(kernel_dilation=(1, 1))
    size = geometry.output_size(image, kernel)
    result = jax.ShapeDtypeStruct((image.shape[0], *size, kernel.shape[outer]), image.dtype)
    layout = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
    filters = {"input_feature_dim": inner, "output_feature_dim": outer, "spatial_dims": [0, 1]}
    config = {
        "dims": 4,
        "input": layout,
        "kernel": {"filter": filters},
        "output": layout,
        "window": {
            "size": list(kernel.shape[:2]),
            "pad_left": [low for low, _ in geometry.pads],
            "pad_right": [high for _, high in geometry.pads],
            "strides": list(geometry.strides),
            "window_dilations": list(geometry.kernel_dilation),
        },
        "feature_groups": geometry.feature_group_count,
    }
    return _custom_call("convolution", result, {"onednn_conv_config": config}, image, kernel)


def _custom_call(
    name: str, result: jax.ShapeDtypeStruct, config: dict, *operands: jax.Array
) -> jax.Array:
    call = jax.ffi.ffi_call(
        f"__onednn${name}",
        result,
        custom_call_api_version=1,
        legacy_backend_config=json.dumps(config),
    )
    return call(*operands)
