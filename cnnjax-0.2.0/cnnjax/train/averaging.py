"""Averages of the parameters along training, and BatchNorm's statistics for them.

An average is a function `num_updates -> share`: after the update that follows `num_updates` others,
`average <- average + share * (params - average)`. It lives in `TrainState.ema`, whichever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.errors import UserError

PyTree = Any
Averaging = Callable[[jax.Array], jax.Array]


def exponential(decay: float) -> Averaging:
    """The exponential moving average: `average <- d * average + (1 - d) * params`.

    `d` rises as `(1 + num_updates) / (10 + num_updates)` up to `decay`, so that the average forgets
    the initial parameters early (as TensorFlow's `ExponentialMovingAverage` does).
    """

    def share(num_updates: jax.Array) -> jax.Array:
        return 1.0 - jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))

    return share


def stochastic(first_update: int, every_updates: int) -> Averaging:
    """Stochastic weight averaging: the plain mean of parameters along the end of training.

    Izmailov et al. 2018 (arXiv 1803.05407), algorithm 1: the parameters after updates
    `first_update`, `first_update + every_updates`, ... have equal weights. Before `first_update`
    the average is the parameters themselves. The paper keeps the learning rate constant and high,
    or cyclic, while it averages, and recalibrates BatchNorm at the end.

    Args:
      first_update: the number of updates after which the first parameters are taken; at least 1.
      every_updates: the distance of those that follow, the paper's cycle length `c`.

    Raises:
      UserError: either is less than 1.
    """
    for name, value in (("first_update", first_update), ("every_updates", every_updates)):
        if value < 1:
            raise UserError(f"{name}={value}: give 1 or more")

    def share(num_updates: jax.Array) -> jax.Array:
        since = num_updates + 1 - first_update
        taken = since // every_updates + 1
        due = since % every_updates == 0
        return jnp.where(since <= 0, 1.0, jnp.where(due, 1.0 / jnp.maximum(taken, 1), 0.0))

    return share


def mix_in(average: PyTree, params: PyTree, share: jax.Array) -> PyTree:
    """Returns `average + share * (params - average)`; `params`, bit for bit, at a `share` of 1."""

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(share == 1.0, new, old + (new - old) * jnp.asarray(share, old.dtype))

    return jax.tree.map(mixed, average, params)
