"""The Fréchet distance of two sets of features: how far generated images are from real ones.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium" (arXiv 1706.08500), equation 6. What they call FID is this distance of the features of
Inception v3 trained on ImageNet; with those of another network the numbers do not compare with
theirs, so a score needs its yardsticks: two sets of real images, and noise.

All on the host in float64: the trace of a root is a small difference of large sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cnnjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Moments:
    """The Gaussian that a set of features is taken for.

    Attributes:
      mean: float64 `[features]`.
      covariance: float64 `[features, features]`, divided by the number of examples less one.
      num_examples: how many there were.
    """

    mean: np.ndarray
    covariance: np.ndarray
    num_examples: int


def moments(features: Any) -> Moments:
    """Returns the moments of `features [examples, features]`.

    Raises:
      UserError: another rank, fewer than two examples, or a number that is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(
            f"features are {list(features.shape)}: give [examples, features], 2 examples or more."
        )
    if not np.isfinite(features).all():
        raise UserError("the features hold a number that is not finite: the network diverged.")
    mean = features.mean(axis=0)
    centered = features - mean
    return Moments(mean, centered.T @ centered / (len(features) - 1), len(features))


def frechet_distance(one: Moments, other: Moments) -> float:
    """Returns `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`, at least 0.

    It is the squared 2-Wasserstein distance of the two Gaussians (Dowson and Landau 1982). The
    trace of `(C1 C2)^(1/2)` is the sum of the singular values of `C1^(1/2) C2^(1/2)`: two symmetric
    eigendecompositions, and no complex rounding to cut off. Covariances may be singular.

    Raises:
      UserError: the two have different numbers of features.
    """
    if one.mean.shape != other.mean.shape:
        raise UserError(
            f"{len(one.mean)} and {len(other.mean)} features: take both sets from one network."
        )
    product = _root(one.covariance) @ _root(other.covariance)
    trace_of_root = np.linalg.svd(product, compute_uv=False).sum()
    distance = (
        np.square(one.mean - other.mean).sum()
        + np.trace(one.covariance)
        + np.trace(other.covariance)
        - 2 * trace_of_root
    )
    return max(float(distance), 0.0)


def halves_distance(features: Any) -> float:
    """Returns the distance of the features at even places from those at odd ones.

    What two sets of real images have: a generator cannot be told to be nearer than that. The fewer
    the examples, the larger it is: the distance of two finite samples of one distribution falls
    about as one over their number, so a set of all examples is compared more strictly.
    """
    features = np.asarray(features)
    return frechet_distance(moments(features[::2]), moments(features[1::2]))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Returns the symmetric root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
