"""Images as points: what a layer says of each, brought to two dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax.errors import UserError, unknown_name
from cnnjax.explain import taps
from cnnjax.explain.inside import passes
from cnnjax.models import with_fields

METHODS = ("pca", "tsne")
# Fewer have no neighborhood to keep.
FEWEST = 4
# Of t-SNE, as van der Maaten and Hinton 2008 recommend 5 to 50; scikit-learn's.
PERPLEXITY = 30.0


def pooled_features(
    model: nn.Module,
    variables: Any,
    batches: Iterable[dict[str, jax.Array]],
    *,
    layer: str = "",
    normalize: Callable[[jax.Array], jax.Array] = lambda image: image,
) -> np.ndarray:
    """Returns what a layer says of each image, averaged over its positions, `[images, features]`.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      batches: as for `passes.fold`.
      layer: a stage or layer; "" for what enters the head.
      normalize: of stored images to what the model expects.

    Raises:
      UserError: an unknown layer, or no images.
    """
    headless = None if layer else with_fields(model, num_classes=None)

    @jax.jit
    def features(variables: Any, image: jax.Array) -> jax.Array:
        image = normalize(image)
        found: Any
        if headless is not None:
            found = headless.apply(variables, image, train=False)
        else:
            found = taps.tap(model, variables, image, [layer])[1][layer]
        return jnp.mean(passes.positions(found).astype(jnp.float32), 1)

    parts = []
    for batch in batches:
        mask = np.asarray(batch.get("mask", np.ones(len(batch["image"]), bool)))
        parts.append(np.asarray(features(variables, batch["image"]))[mask])
    if not parts:
        raise UserError("there are no images to embed: give at least one.")
    return np.concatenate(parts)


def embed(features: np.ndarray, method: str = "pca", *, seed: int = 0) -> np.ndarray:
    """Returns a point for each row of features, float `[images, 2]`, by scikit-learn.

    Args:
      features: `[images, features]`.
      method: "pca": the two directions of largest variance; "tsne": t-SNE (van der Maaten and
        Hinton 2008) of the first 50 principal components; distances between its clusters mean
        nothing.
      seed: of t-SNE; PCA has no random part.

    Raises:
      UserError: an unknown method, or fewer than four images.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method not in METHODS:
        raise unknown_name("method of embedding", method, METHODS)
    features = np.asarray(features, np.float64)
    count, width = features.shape
    if count < FEWEST:
        raise UserError(f"{count} images have no neighbors: embed at least {FEWEST}.")
    if not np.isfinite(features).all():
        raise UserError("features that are not finite numbers cannot be embedded.")
    if method == "pca":
        points = PCA(min(2, width), svd_solver="full").fit_transform(features)
        return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    if width > 50 and count > 50:
        features = PCA(50, svd_solver="full").fit_transform(features)
    perplexity = min(PERPLEXITY, (count - 1) / 3)
    start = "pca" if features.std() > 0 and width > 1 else "random"
    return TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(features)
