"""What networks ask of their images and stems, and pools beyond those of `cnnjax.ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.errors import UserError, unknown_name

STEMS = ("imagenet", "cifar")
POOLS: dict[str, Callable[..., jax.Array]] = {"max": ops.max_pool, "average": ops.avg_pool}


def require_image(
    image: jax.Array, model: str, *, minimum: int = 1, exact: tuple[int, int] | None = None
) -> None:
    """Checks that `image` is `[batch, height, width, channels]` and large enough.

    Raises:
      UserError: another rank, a side below `minimum`, or a size other than `exact`.
    """
    if image.ndim != 4:
        raise UserError(
            f"{model} takes images [batch, height, width, channels], got shape {image.shape}."
        )
    height, width = image.shape[1:3]
    if exact is not None and (height, width) != exact:
        raise UserError(
            f"{model} takes images of {exact[0]}x{exact[1]} pixels, got {height}x{width}: "
            f"resize or pad them."
        )
    if min(height, width) < minimum:
        raise UserError(
            f"{model} takes images of at least {minimum}x{minimum} pixels, got {height}x{width}: "
            f"enlarge or pad them."
        )


def require_stem(stem: str) -> None:
    """Checks the name of a stem: `imagenet` for images of about 224 pixels, `cifar` for 28 to 64.

    Raises:
      UserError: another name.
    """
    if stem not in STEMS:
        raise unknown_name("stem", stem, STEMS)


def strides_for(stem: str, strides: Sequence[int]) -> list[int]:
    """Returns the strides of a network's stem and stages, in order, for the kind of stem.

    `"imagenet"` for images of about 224 pixels; `"cifar"` for 28 to 64 pixels: the first two
    strides of 2 (where there are so many) become 1. Raises UserError for an unknown stem.
    """
    require_stem(stem)
    result = list(strides)
    if stem == "cifar":
        for index in [index for index, stride in enumerate(strides) if stride == 2][:2]:
            result[index] = 1
    return result


def pool_function(pool: str) -> Callable[..., jax.Array]:
    """Returns `ops.max_pool` for `max` and `ops.avg_pool` for `average`.

    Raises:
      UserError: another name.
    """
    if pool not in POOLS:
        raise unknown_name("pool", pool, POOLS)
    return POOLS[pool]


def max_pool_ceil(image: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pool without padding whose last windows may hang over the edge.

    PyTorch's `ceil_mode=True`: `[batch, height, width, channels]` becomes
    `[batch, ceil((height - window) / stride) + 1, ..., channels]`.
    """
    overhang = [(0, -(size - window) % stride) for size in image.shape[1:3]]
    return ops.max_pool(image, (window, window), (stride, stride), overhang)


def adaptive_average_pool(image: jax.Array, size: int) -> jax.Array:
    """Averages `[batch, height, width, channels]` to `[batch, size, size, channels]`.

    PyTorch's `AdaptiveAvgPool2d`: cell i covers rows floor(i h / size) to ceil((i + 1) h / size),
    so that cells overlap where `size` does not divide the height, and repeat where it is larger.
    """
    if image.shape[1:3] == (size, size):
        return image
    rows, columns = (jnp.asarray(_cells(n, size), image.dtype) for n in image.shape[1:3])
    return jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, image)


def _cells(length: int, size: int) -> np.ndarray:
    """Returns the `[size, length]` matrix whose rows average the cells of one axis."""
    weights = np.zeros((size, length))
    for cell in range(size):
        start, stop = cell * length // size, -(-(cell + 1) * length // size)
        weights[cell, start:stop] = 1.0 / (stop - start)
    return weights
