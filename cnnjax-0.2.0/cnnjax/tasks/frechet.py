"""The Fréchet distance of two sets of features: how far generated images are from real ones.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium" (arXiv 1706.08500), equation 6. What they call FID is this distance of the features of
Inception v3 trained on ImageNet; with those of another network the numbers do not compare with
theirs, so a score needs its yardsticks: two sets of real images, and noise. The fewer the examples,
the larger it is: that of two samples of one distribution falls as one over their number.

All on the host in float64: the distance is a small difference of large sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moments:
    """The Gaussian that a set of features is taken for.

    Attributes:
      mean: float64 `[features]`.
      covariance: float64 `[features, features]`, divided by the number of examples less one; NaN
        for fewer than two.
      num_examples: how many there were.
    """

    mean: np.ndarray
    covariance: np.ndarray
    num_examples: int


def moments(features: Any) -> Moments:
    """Returns the moments of `features [examples, features]`.

    Raises:
      UserError: another rank.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UserError(f"features are {list(features.shape)}: give [examples, features].")
    centered = features - features.mean(axis=0)
    return _moments(features.mean(axis=0), centered.T @ centered, len(features))


def products(features: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the sum over examples of `weight * outer([1, x], [1, x])`, for a compiled step.

    It holds the number of examples, the sum of their features and of the products of these, and is
    added up over batches and devices; `from_products` makes moments of it.

    Args:
      features: `[examples, features]`.
      weights: `[examples]`, 0 or 1.
    """
    ones = jnp.ones((len(features), 1), features.dtype)
    rows = jnp.concatenate([ones, features], axis=1)
    # Selected, not multiplied: a NaN in the padding must not reach the sum.
    rows = jnp.where(weights[:, None] != 0, rows, 0)
    return jnp.matmul(rows.T, rows, precision="highest")


def from_products(total: np.ndarray) -> Moments:
    """Returns the moments of all examples whose `products` were added up, in float64."""
    total = np.asarray(total, np.float64)
    num_examples = int(total[0, 0])
    mean = total[0, 1:] / max(num_examples, 1)
    return _moments(mean, total[1:, 1:] - num_examples * np.outer(mean, mean), num_examples)


def _moments(mean: np.ndarray, scatter: np.ndarray, num_examples: int) -> Moments:
    divisor = num_examples - 1 if num_examples > 1 else np.nan
    return Moments(mean, scatter / divisor, num_examples)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Returns `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, at least 0.

    It is the squared 2-Wasserstein distance of the two Gaussians (Dowson and Landau 1982). The
    trace of `(C1 C2)^(1/2)` is the sum of the singular values of `C1^(1/2) C2^(1/2)`: two symmetric
    eigendecompositions, and no complex rounding to cut off. Covariances may be singular. NaN where
    a moment is not finite.

    Raises:
      UserError: the two have different numbers of features.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(
            f"{len(one.mean)} and {len(other.mean)} features: take both sets from one network."
        )
    if not all(np.isfinite(x).all() for each in (one, other) for x in (each.mean, each.covariance)):
        return float("nan")
    product = _root(one.covariance) @ _root(other.covariance)
    trace_of_root = np.linalg.svd(product, compute_uv=False).sum()
    distance = (
        np.square(one.mean - other.mean).sum()
        + np.trace(one.covariance)
        + np.trace(other.covariance)
        - 2 * trace_of_root
    )
    return max(float(distance), 0.0)


def _root(matrix: np.ndarray) -> np.ndarray:
    """Returns the symmetric root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
