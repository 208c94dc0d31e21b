"""JPEG compression as a function of arrays: what an image has lost when it is read again.

ITU-T T.81 with the tables of its annex K, scaled by the quality as libjpeg does; chroma at half the
size. Nothing is written, and the entropy coding, which loses nothing, is left out. The values are
those of Pillow within rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 8
# T.81, tables K.1 and K.2.
LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMINANCE = np.full((SIDE, SIDE), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# JFIF: red, green, blue -> luma, blue and red difference.
TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]]
)
PRECISION = jax.lax.Precision.HIGHEST


def jpeg_compression(key: jax.Array, image: jax.Array, quality: int) -> jax.Array:
    """Returns what is read of `[height, width, 1 or 3]` in [0, 1] saved as JPEG.

    Nothing is random: `key` is not used.
    """
    del key
    stored = jnp.round(255.0 * jnp.clip(image, 0, 1))
    luminance, chrominance = (scaled_table(table, quality) for table in (LUMINANCE, CHROMINANCE))
    if image.shape[-1] == 1:
        return _clipped(_coded(stored[..., 0], luminance))[..., None] / 255.0
    planes = jnp.round(jnp.einsum("kc,yxc->kyx", TO_YCC.astype(np.float32), stored))
    luma = _clipped(_coded(planes[0], luminance))
    blue, red = (_chroma(plane + 128.0, chrominance) - 128.0 for plane in planes[1:])
    colors = (
        luma + 1.402 * red,
        luma - 0.344136286 * blue - 0.714136286 * red,
        luma + 1.772 * blue,
    )
    return _clipped(jnp.stack(colors, -1)) / 255.0


def scaled_table(table: np.ndarray, quality: int) -> np.ndarray:
    """Returns the table of a quality from 1 to 100, as libjpeg's `jpeg_quality_scaling`."""
    factor = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((table * factor + 50) // 100, 1, 255)


def _chroma(plane: jax.Array, table: np.ndarray) -> jax.Array:
    """Codes a plane of differences at half its size, and enlarges it again."""
    height, width = plane.shape
    halves = (height + 1) // 2, (width + 1) // 2
    # Columns are filled up before they are halved, rows (but for an odd last one) after.
    pad = 2 * halves[0] - height, -width % (2 * SIDE)
    whole = jnp.pad(plane, ((0, pad[0]), (0, pad[1])), mode="edge")
    sums = whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]
    # libjpeg rounds halves down and up in turns.
    small = jnp.floor((sums + 1.0 + np.arange(sums.shape[1]) % 2) / 4.0)
    coded = _clipped(_coded(small, table))[:, : halves[1]]
    large = _enlarged(_enlarged(coded, 0), 1)[:height, :width]
    return jnp.floor(large + 0.5)


def _enlarged(plane: jax.Array, axis: int) -> jax.Array:
    """Doubles an axis by triangles: each value is 3/4 of the nearest and 1/4 of the next one."""
    size = plane.shape[axis]
    before = jnp.take(plane, np.maximum(np.arange(size) - 1, 0), axis)
    behind = jnp.take(plane, np.minimum(np.arange(size) + 1, size - 1), axis)
    pairs = jnp.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * behind], axis + 1)
    shape = list(plane.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)


def _coded(plane: jax.Array, table: np.ndarray) -> jax.Array:
    """Rounds the cosine transform of each block of 8 x 8 to multiples of the table."""
    height, width = plane.shape
    padded = jnp.pad(plane, ((0, -height % SIDE), (0, -width % SIDE)), mode="edge") - 128.0
    rows, columns = (size // SIDE for size in padded.shape)
    blocks = padded.reshape(rows, SIDE, columns, SIDE)
    place = np.arange(SIDE)
    cosine = np.cos((2 * place + 1) * place[:, None] * np.pi / (2 * SIDE)) / 2
    cosine[0] /= np.sqrt(2)
    cosine = cosine.astype(np.float32)
    waves = jnp.einsum("ui,vj,ricj->rucv", cosine, cosine, blocks, precision=PRECISION)
    divisor = table[:, None].astype(np.float32)
    # Halves go away from zero.
    kept = jnp.sign(waves) * jnp.floor(jnp.abs(waves) / divisor + 0.5) * divisor
    blocks = jnp.einsum("ui,vj,rucv->ricj", cosine, cosine, kept, precision=PRECISION)
    return jnp.round(blocks.reshape(padded.shape) + 128.0)[:height, :width]


def _clipped(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(values), 0.0, 255.0)
