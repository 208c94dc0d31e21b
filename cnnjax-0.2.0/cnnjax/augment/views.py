"""Two views of each image, for losses that compare them.

Chen et al. 2020 (arXiv 2002.05709), section 2.1: two draws of the same family of changes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.augment.policy import Batch, BatchAugment
from cnnjax.errors import UserError
from cnnjax.rng import stream_key

STREAMS = ("first view", "second view")


def two_views(augment: BatchAugment | None) -> BatchAugment:
    """Returns `(key, batch, first_index) -> batch`: two draws of `augment` from each image.

    The batch's `image` becomes the first view, and `view` is the second. Each is a function of
    `key` and the example's position in the whole batch, as `augment` is.

    Args:
      augment: what `make_augment` returned, of a policy that mixes no examples.

    Raises:
      UserError: there is no augmentation, so that both views would be equal.
    """
    if augment is None:
        raise UserError(
            "two views of an image differ by augmentation alone, but there is none: name changes, "
            "such as rotate:15,crop:4."
        )

    def views(key: jax.Array, batch: Batch, first_index: jax.Array) -> Batch:
        images = [
            augment(stream_key(key, stream, 0), batch, first_index)["image"] for stream in STREAMS
        ]
        return batch | dict(zip(("image", "view"), images, strict=True))

    return views


def fixed_views(
    images: np.ndarray, augment: BatchAugment, *, seed: int, draw: int = 0, batch_size: int = 512
) -> np.ndarray:
    """Returns one augmented view of each image, a function of (seed, draw, the image's place).

    For evaluation, which draws nothing.

    Args:
      images: `[examples, height, width, channels]`.
      augment: what `make_augment` returned.
      seed: of the draws.
      draw: which of the views.
      batch_size: images that are changed at once.

    Returns:
      NumPy array of the images' shape and dtype.
    """
    key = stream_key(seed, "fixed views", draw)

    @jax.jit
    def view(images: jax.Array, first_index: jax.Array) -> jax.Array:
        return augment(key, {"image": images}, first_index)["image"]

    parts = [
        np.asarray(view(images[start : start + batch_size], jnp.int32(start)))
        for start in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts) if parts else images
