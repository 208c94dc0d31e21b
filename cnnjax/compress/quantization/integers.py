"""Numbers of few bits: scales, zero points, rounding and packing. Pure functions of arrays.

    q = clip(round(x / scale) + zero, smallest, largest)        x' = scale * (q - zero)

Rounding is half to even, as `jnp.round`, ONNX's `QuantizeLinear` and IEEE 754 do it; LiteRT rounds
halves away from zero, which differs at exact ties alone. Weights are symmetric (`zero` is 0) with a
scale for each output channel, and use `-largest ... largest`, so that -128 does not occur
(Jacob et al. 2018, arXiv 1712.05877, section 2 and appendix B). Activations have one scale and one
zero point a tensor, and use all codes; 0 is always a code, so that padding by zeros is exact.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.errors import UserError

Array = jax.Array
BITS = range(2, 9)
# Where a channel's weights are all zero any scale will do.
NO_RANGE = 1.0
# A range below this is none: its steps would be no normal numbers of float32.
NOTHING = 1e-30
# Fractions of the largest weight at which `weight_scale` may clip.
CLIPS = np.linspace(1.0, 0.3, 36)


def check_bits(bits: int, what: str) -> None:
    """Raises a UserError unless integers of that many bits are known here."""
    if bits not in BITS:
        raise UserError(
            f"{what}={bits}: give {BITS.start} to {BITS.stop - 1} bits; 16 are float16 or bfloat16."
        )


def largest(bits: int) -> int:
    """Returns the largest code of that many bits: 127 for 8."""
    return 2 ** (bits - 1) - 1


def smallest(bits: int, *, symmetric: bool = False) -> int:
    """Returns the smallest code of that many bits: -128 for 8, or -127 if symmetric."""
    return -largest(bits) - (0 if symmetric else 1)


def weight_scale(kernel: Array, bits: int, *, clip: str = "absmax") -> Array:
    """Returns the scale of each output channel of a kernel.

    Args:
      kernel: `[..., features]`.
      bits: of the codes.
      clip: `absmax`, no weight is clipped; or `mse`, the scale (of `CLIPS`) whose squared error
        over the channel is least: few bits gain by clipping the largest weights (Banner et al.
        2019, arXiv 1810.05723, section 3).

    Returns:
      float32 `[features]`, positive.
    """
    wide = jnp.asarray(kernel, jnp.float32).reshape(-1, kernel.shape[-1])
    bound = jnp.max(jnp.abs(wide), axis=0)
    scale = jnp.where(bound > 0, bound / largest(bits), NO_RANGE)
    if clip == "absmax":
        return scale
    if clip != "mse":
        raise UserError(f"weights={clip}: give absmax or mse.")

    def error(factor: Array) -> Array:
        rounded = dequantize_weight(quantize_weight(wide, scale * factor, bits), scale * factor)
        return jnp.sum(jnp.square(rounded - wide), axis=0)

    factors = jnp.asarray(CLIPS, jnp.float32)
    errors = jax.lax.map(error, factors)
    return scale * factors[jnp.argmin(errors, axis=0)]


def quantize_weight(kernel: Array, scale: Array, bits: int) -> Array:
    """Returns the codes of a kernel `[..., features]`, int8, by a scale for each feature."""
    bound = largest(bits)
    return jnp.clip(jnp.round(kernel / scale), -bound, bound).astype(jnp.int8)


@jax.jit
def dequantize_weight(codes: Array, scale: Array) -> Array:
    """Returns the weights, float32, that codes `[..., features]` stand for.

    In a traced program it is one call of this name, which `cnnjax.export` looks for.
    """
    return codes.astype(jnp.float32) * scale


def activation_scale(
    low: float, high: float, bits: int, *, symmetric: bool = False
) -> tuple[float, int]:
    """Returns the scale and the zero point of activations between two bounds.

    Args:
      low, high: the range; it is widened to hold 0.
      bits: of the codes.
      symmetric: whether the zero point is 0.

    Returns:
      A scale that float32 holds exactly, and a code.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if high - low < NOTHING:
        return NO_RANGE, 0
    if symmetric:
        return float(np.float32(max(-low, high) / largest(bits))), 0
    scale = np.float32((high - low) / (2**bits - 1))
    zero = round(smallest(bits) - low / float(scale))
    return float(scale), int(np.clip(zero, smallest(bits), largest(bits)))


@jax.jit
def round_to_codes(x: Array, scale: Array, zero: Any, low: Any, high: Any) -> Array:
    """Returns activations after they were rounded to codes, float32 of the shape of `x`.

    In a traced program it is one call of this name, which `cnnjax.export` looks for.

    Args:
      x: float.
      scale, zero: `x` is about `scale * (code - zero)`.
      low, high: the smallest and the largest code.
    """
    return _rounded(x / scale, low - zero, high - zero) * scale


def offsets(x: Array, scale: Any, zero: int, bits: int, *, symmetric: bool = False) -> Array:
    """Returns `q - zero`, whole numbers as float32: `x` is about `scale` times that.

    Its derivative is that of `x / scale` where nothing is clipped, and 0 elsewhere: straight
    through the rounding (Bengio et al. 2013, arXiv 1308.3432).
    """
    low, high = smallest(bits, symmetric=symmetric) - zero, largest(bits) - zero
    return _rounded(x.astype(jnp.float32) / scale, float(low), float(high))


@jax.custom_jvp
def _rounded(x: Array, low: float, high: float) -> Array:
    return jnp.clip(jnp.round(x), low, high)


@_rounded.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, low, high = primals
    inside = (x >= low) & (x <= high)
    return _rounded(x, low, high), jnp.where(inside, tangents[0], 0)


def quantize(x: Array, scale: Any, zero: int, bits: int) -> Array:
    """Returns the codes of activations, int8."""
    return (offsets(x, scale, zero, bits) + zero).astype(jnp.int8)


def dequantize(codes: Array, scale: Any, zero: int) -> Array:
    """Returns the activations, float32, that codes stand for."""
    return (codes.astype(jnp.float32) - zero) * scale


def stored_bits(bits: int) -> int:
    """Returns the bits that a code takes on the disk: 2, 4 or 8."""
    return next(size for size in (2, 4, 8) if bits <= size)


def pack(codes: Array, bits: int) -> Array:
    """Returns codes `[..., features]` as bytes: four a byte of 2 bits, two of 4, one of 8.

    The features of a byte follow each other, the first in the lowest bits.

    Returns:
      int8 as it is, or uint8 `[..., ceil(features / codes a byte)]`.
    """
    codes, size = jnp.asarray(codes, jnp.int8), stored_bits(bits)
    if size == 8:
        return codes
    per_byte = 8 // size
    missing = -codes.shape[-1] % per_byte
    padded = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    fields = padded.astype(jnp.uint8) & (2**size - 1)
    grouped = fields.reshape(*padded.shape[:-1], -1, per_byte)
    shifts = jnp.arange(per_byte, dtype=jnp.uint8) * size
    return jnp.sum(grouped << shifts, axis=-1, dtype=jnp.uint8)


def unpack(packed: Array, bits: int, features: int) -> Array:
    """Returns the codes, int8 `[..., features]`, that `pack` was given."""
    size = stored_bits(bits)
    if size == 8:
        return packed
    shifts = jnp.arange(8 // size, dtype=jnp.uint8) * size
    fields = (packed[..., None] >> shifts) & (2**size - 1)
    signed = fields.astype(jnp.int8)
    signed = jnp.where(signed >= 2 ** (size - 1), signed - 2**size, signed)
    return signed.reshape(*packed.shape[:-1], -1)[..., :features].astype(jnp.int8)
