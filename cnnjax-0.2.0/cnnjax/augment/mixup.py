"""Mixing the images and labels of a batch: mixup and CutMix.

Each example is mixed with its neighbor: 0 with 1, 2 with 3, and so on. The batch is a random draw
already, so this is a random partner; and it is the same one on any number of devices, and no image
has to move between them, as long as each holds an even number. (Of an odd number the last stays as
it is.) Each example draws its own share from its own key.

A way to mix is `weights(key, height, width) -> share`, float `[height, width, 1]` or `[1, 1, 1]`:
how much of each pixel is the example's own. The label's share is the mean of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cnnjax.augment.change import check_magnitude
from cnnjax.augment.corrupt import box
from cnnjax.rng import example_keys

Batch = dict[str, jax.Array]
Weights = Callable[[jax.Array, int, int], jax.Array]


def mixup(alpha: float) -> Weights:
    """Averages two images and their labels: `l a + (1 - l) b`, `l` from Beta(alpha, alpha).

    Zhang et al. 2018 (arXiv 1710.09412), equation (1); 0.2 to 0.4 for ImageNet, 1 for CIFAR-10. The
    paper draws one `l` a batch in its code; here every example has its own. 0 does not mix.
    """
    check_magnitude(alpha=alpha)

    def weights(key: jax.Array, height: int, width: int) -> jax.Array:
        del height, width
        return _beta(key, alpha).reshape(1, 1, 1)

    return weights


def cutmix(alpha: float) -> Weights:
    """Replaces a box of an image by that of another, and as much of its label.

    Yun et al. 2019 (arXiv 1905.04899), equations (1) and (2): the box has the image's proportions
    and a share `1 - l` of its area, `l` from Beta(alpha, alpha) (1 in the paper); its center is
    uniform, and what lies outside is cut off, which the labels take into account. 0 does not mix.
    """
    check_magnitude(alpha=alpha)

    def weights(key: jax.Array, height: int, width: int) -> jax.Array:
        share_key, place_key = jax.random.split(key)
        side = jnp.sqrt(1.0 - _beta(share_key, alpha))
        center = jax.random.uniform(place_key, (2,))
        sizes = jnp.array([height, width], jnp.float32)
        start = jnp.round(sizes * (center - side / 2))
        end = start + jnp.round(sizes * side)
        return 1.0 - box(height, width, start[0], start[1], end[0], end[1]).astype(jnp.float32)

    return weights


def mix_neighbors(
    key: jax.Array,
    batch: Batch,
    ways: Sequence[Weights],
    *,
    num_classes: int,
    first_index: jax.Array | int = 0,
) -> Batch:
    """Mixes each example with its neighbor, by one of the ways, each as likely.

    Args:
      key: the step's key.
      batch: `image` float `[batch, height, width, channels]`; `label` int `[batch]`, or float
        `[batch, classes]`; and `mask`: padding is mixed with nothing.
      ways: such as `(mixup(0.2), cutmix(1.0))`.
      num_classes: the logits of the model; 1 for a binary task.
      first_index: the position of the first example in the whole batch. A device that holds a part
        of the batch gives it, and each example's draw is the same on any number of devices.

    Returns:
      The batch with mixed images and labels, float `[batch, classes]`; of a binary task `[batch]`,
      the probability of class 1.
    """
    image, label = batch["image"], batch["label"]
    if label.ndim == 1:
        binary = num_classes == 1
        label = label.astype(image.dtype) if binary else jax.nn.one_hot(label, num_classes)
    height, width = image.shape[1:3]

    def share_of(key: jax.Array) -> jax.Array:
        choice, draw = jax.random.split(key)
        shares = [way(draw, height, width) for way in ways]
        if len(shares) == 1:
            return shares[0]
        chosen = jax.random.randint(choice, (), 0, len(shares))
        return jnp.select([chosen == index for index in range(len(shares))], shares)

    indices = first_index + jnp.arange(len(image))
    share = jax.vmap(share_of)(example_keys(key, indices))
    partner = _neighbors(batch["mask"])
    share = jnp.where(partner[:, None, None, None], share, 1.0).astype(image.dtype)
    of_label = share.mean(axis=(1, 2, 3)).reshape(-1, *[1] * (label.ndim - 1)).astype(label.dtype)
    return {
        **batch,
        "image": _blend(image, share),
        "label": _blend(label, of_label),
    }


def _blend(own: jax.Array, share: jax.Array) -> jax.Array:
    other = _neighbors(own)
    # At a weight of 1 the example's own bits, whatever the other holds.
    return jnp.where(share == 1.0, own, share * own + (1.0 - share) * other)


def _neighbors(values: jax.Array) -> jax.Array:
    """Swaps rows 0 and 1, 2 and 3, ...; a last one without a neighbor keeps its place."""
    even = len(values) // 2 * 2
    pairs = values[:even].reshape(even // 2, 2, *values.shape[1:])
    swapped = pairs[:, ::-1].reshape(even, *values.shape[1:])
    return swapped if even == len(values) else jnp.concatenate([swapped, values[even:]])


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    if alpha == 0:
        return jnp.ones(())
    if alpha == 1:  # Beta(1, 1) is uniform, and needs no rejection sampling.
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)
