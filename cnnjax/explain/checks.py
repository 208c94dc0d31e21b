"""Whether a map can be believed: does it depend on the network, and do its pixels count?"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax import rng, trees
from cnnjax.devices import backend
from cnnjax.errors import UserError
from cnnjax.explain import taps
from cnnjax.explain.targets import Target


def completeness(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    map_: jax.Array,
    *,
    baseline: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of each map, and what it should be: the target's difference to the baseline.

    Sundararajan et al. 2017 (arXiv 1703.01365), proposition 1, for maps whose channels are summed.

    Args:
      model, variables, image, target: as for the method.
      map_: `[batch, height, width]`.
      baseline: that the method had.

    Returns:
      Two arrays `[batch]`.
    """
    start = jnp.broadcast_to(jnp.asarray(baseline, image.dtype), image.shape)
    here, there = (taps.score(model, variables, x, target) for x in (image, start))
    return jnp.sum(map_, (1, 2)), here - there


def deletion_curve(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    map_: jax.Array,
    *,
    steps: int = 20,
    baseline: jax.Array | float = 0.0,
) -> jax.Array:
    """The target while pixels are hidden, those first that the map ranks highest.

    Petsiuk et al. 2018 (arXiv 1806.07421), section 3.3. A good map makes it fall soon: its mean is
    low. Compare it with the curve of a random map.

    Args:
      model, variables, image, target: as for the method.
      map_: `[batch, height, width]`.
      steps: in which the pixels are hidden, as many in each, one after another.
      baseline: what hides a pixel: a number or an image.

    Returns:
      `[steps + 1, batch]`, from the whole image to the baseline.

    Raises:
      UserError: fewer than one step, or a map that does not fit the image.
    """
    hidden = jnp.asarray(baseline, image.dtype)
    return _curve(model, variables, image, target, map_, steps, first=image, last=hidden)


def insertion_curve(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    map_: jax.Array,
    *,
    steps: int = 20,
    baseline: jax.Array | float = 0.0,
) -> jax.Array:
    """The target while pixels are shown on the baseline, those first that the map ranks highest.

    A good map makes it rise soon: its mean is high. All else as for `deletion_curve`.
    """
    hidden = jnp.asarray(baseline, image.dtype)
    return _curve(model, variables, image, target, map_, steps, first=hidden, last=image)


def _curve(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    map_: jax.Array,
    steps: int,
    *,
    first: jax.Array,
    last: jax.Array,
) -> jax.Array:
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}.")
    _check_map(map_, image.shape)
    flat = map_.reshape(len(map_), -1)
    order = jnp.argsort(-flat, axis=-1)
    # The place of each pixel in that order, from 0 for the highest.
    rank = jnp.argsort(order, axis=-1).reshape(map_.shape)

    def score(count: jax.Array) -> jax.Array:
        seen = jnp.where((rank < count)[..., None], last, first)
        return taps.score(model, variables, seen, target)

    counts = jnp.round(jnp.linspace(0, flat.shape[1], steps + 1)).astype(jnp.int32)
    return jax.lax.map(score, counts)


def _check_map(map_: jax.Array, image_shape: tuple[int, ...]) -> None:
    if map_.shape != image_shape[:3]:
        raise UserError(
            f"a map of shape {tuple(map_.shape)} does not fit images of {tuple(image_shape)}."
        )


def infidelity(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    attributions: jax.Array,
    *,
    noise: float = 0.2,
    samples: int = 50,
) -> jax.Array:
    """The mean squared error with which attributions foretell the effect of random changes.

    Yeh et al. 2019 (arXiv 1901.09392), definition 2.1, for Gaussian changes of the image.

    Args:
      key: of the changes.
      model, variables, image, target: as for the method.
      attributions: `[batch, height, width, channels]` (`channels="keep"`), per unit of the image.
      noise: standard deviation of the changes.
      samples: number of changes, one after another.

    Returns:
      `[batch]`; 0 for the gradient of a linear model.
    """
    if attributions.shape != image.shape:
        raise UserError(
            f"infidelity needs attributions of each channel, {tuple(image.shape)} and not "
            f'{tuple(attributions.shape)}: channels="keep".'
        )

    score = functools.partial(taps.score, model, variables, target=target)
    whole = score(image)

    def add(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        change = noise * jax.random.normal(key, image.shape, image.dtype)
        foretold = jnp.sum(change * attributions, (1, 2, 3))
        return total + jnp.square(foretold - (whole - score(image - change))), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(whole), jax.random.split(key, samples))
    return total / samples


def sensitivity_n(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    map_: jax.Array,
    *,
    fraction: float = 0.1,
    subsets: int = 32,
    baseline: jax.Array | float = 0.0,
) -> jax.Array:
    """How well sums of a map over random pixels foretell what hiding these pixels takes away.

    Ancona et al. 2018 (arXiv 1711.06104), section 3.3: the correlation (Pearson's) over random
    subsets of n pixels between the map's sum and the fall of the target.

    Args:
      key: of the subsets, which all images share.
      model, variables, image, target: as for the method.
      map_: `[batch, height, width]`.
      fraction: n, as a fraction of the pixels.
      subsets: their number, one after another.
      baseline: what hides a pixel: a number or an image.

    Returns:
      `[batch]`; 1 for the contributions of a linear model; 0 where one of both is constant.

    Raises:
      UserError: fewer than two subsets, a fraction outside (0, 1), or a map that does not fit.
    """
    if subsets < 2 or not 0 < fraction < 1:
        raise UserError(
            f"subsets={subsets} must be 2 or more, and fraction={fraction} between 0 and 1."
        )
    _check_map(map_, image.shape)
    height, width = image.shape[1:3]
    count = max(1, round(fraction * height * width))
    whole = taps.score(model, variables, image, target)

    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = (jax.random.permutation(key, height * width) < count).reshape(height, width)
        seen = jnp.where(hidden[..., None], jnp.asarray(baseline, image.dtype), image)
        fall = whole - taps.score(model, variables, seen, target)
        return jnp.sum(map_ * hidden, (1, 2)), fall

    sums, falls = jax.lax.map(sample, jax.random.split(key, subsets))
    return _correlation(sums.T, falls.T)


def pointing_game(map_: jax.Array, mask: jax.Array, *, tolerance: int = 15) -> jax.Array:
    """Whether the largest value of a map lies in, or close to, what it should point at.

    Zhang et al. 2016 (arXiv 1608.00507), section 4.1; the accuracy is the mean over images.

    Args:
      map_: `[batch, height, width]`; of equal largest values the first counts.
      mask: bool `[batch, height, width]`, the object, such as `class_map == 3` of a segmentation
        dataset. An image without an object counts as missed.
      tolerance: distance in pixels that still counts, as published.

    Returns:
      bool `[batch]`.

    Raises:
      UserError: a mask of another shape, or a negative tolerance.
    """
    if map_.shape != mask.shape or map_.ndim != 3 or tolerance < 0:
        raise UserError(
            f"the pointing game needs maps and masks of one shape [batch, height, width] and a "
            f"tolerance of 0 or more, not {tuple(map_.shape)}, {tuple(mask.shape)}, {tolerance}."
        )
    flat = jnp.argmax(map_.reshape(len(map_), -1), -1)
    row, column = (each[:, None, None] for each in jnp.divmod(flat, map_.shape[2]))
    down = jnp.arange(map_.shape[1])[:, None] - row
    right = jnp.arange(map_.shape[2]) - column
    is_near = jnp.square(down) + jnp.square(right) <= tolerance**2
    return jnp.any(is_near & (mask != 0), (1, 2))


def reinitialized_from_the_top(
    key: jax.Array, model: nn.Module, variables: Any, image: jax.Array, *, cascade: bool = True
) -> Iterator[tuple[str, Any]]:
    """Yields variables of which layer after layer, from the last to the first, is initialized anew.

    Adebayo et al. 2018 (arXiv 1810.03292), section 3: a map of the changed network that looks like
    that of the trained one does not depend on what was learned there.

    Args:
      key: of the new parameters.
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image: whose shape the network is initialized for.
      cascade: whether those changed before stay changed; otherwise one layer at a time.

    Yields:
      (path of the layer, variables).
    """
    shapes = taps.layer_shapes(model, variables, image)
    keys = {"params": rng.stream_key(key, "reinitialize", 0), "dropout": key}
    fresh = trees.named_leaves(backend.jit_once(lambda: model.init(keys, image[:1], train=False))())
    known = trees.named_leaves(variables)
    owners = {path: path.partition("/")[2].rpartition("/")[0] for path in known}
    layers = [name for name in shapes if name in set(owners.values())]
    changed: set[str] = set()
    for layer in reversed(layers):
        changed = {*changed, layer} if cascade else {layer}
        leaves = {
            path: fresh[path] if owners[path] in changed else leaf for path, leaf in known.items()
        }
        yield layer, _like(variables, leaves)


def _like(tree: Any, leaves: dict[str, Any]) -> Any:
    names = list(trees.named_leaves(tree))
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in names])


def rank_correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Spearman's correlation of two maps `[batch, height, width]`, for each image; equal values
    share their mean rank."""
    return _correlation(*(_ranks(map_.reshape(len(map_), -1)) for map_ in (first, second)))


def _correlation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Pearson's, of each row; 0 of a constant one."""
    one, two = (each - jnp.mean(each, -1, keepdims=True) for each in (first, second))
    norms = jnp.sqrt(jnp.sum(jnp.square(one), -1) * jnp.sum(jnp.square(two), -1))
    return jnp.sum(one * two, -1) / jnp.where(norms == 0, 1, norms)


@jax.vmap
def _ranks(values: jax.Array) -> jax.Array:
    ordered = jnp.sort(values)
    low, high = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (low + high - 1).astype(jnp.float32) / 2
