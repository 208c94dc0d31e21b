"""Unstructured pruning: which single weights stay.

A mask is True where a weight stays. Masks are a table `{path: mask}` of the leaves that are pruned;
what is not in it stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.trees import label_by_path, mask_by_path, named_leaves

PyTree = Any
Masks = dict[str, jax.Array]
SCOPES = ("global", "layer")


def check_sparsity(sparsity: float) -> None:
    """Raises a UserError unless a sparsity is in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity={sparsity:g}: it is the fraction of weights that are removed: give 0 or "
            "more, and less than 1."
        )


def prunable(params: PyTree, layers: str = ".*kernel") -> dict[str, Any]:
    """Returns the leaves that a pattern selects, by path (see `cnnjax.trees`).

    Raises:
      UserError: it selects none; the nearest paths are named.
    """
    chosen = named_leaves(mask_by_path(params, [layers]))
    return {path: leaf for path, leaf in named_leaves(params).items() if chosen[path]}


def scores(criterion: str, leaves: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
    """Returns how much each weight counts: its `magnitude`, or `random` numbers."""
    if criterion == "random":
        return {
            path: jax.random.uniform(stream_key(key, path, 0), leaf.shape)
            for path, leaf in leaves.items()
        }
    return {path: jnp.abs(jnp.asarray(leaf)) for path, leaf in leaves.items()}


def keep_highest(
    values: Mapping[str, jax.Array],
    sparsity: jax.Array | float,
    *,
    scope: str = "global",
    rates: Mapping[str, float] | None = None,
) -> Masks:
    """Returns the masks of the weights with the highest scores; traceable.

    Args:
      values: path -> score of each weight.
      sparsity: the fraction of weights to remove, rounded down.
      scope: `global`, by score over all leaves; `layer`, the same fraction of each.
      rates: with the scope `layer`: path -> the leaf's own sparsity, relative to `sparsity`.
    """
    if scope == "global":
        together = jnp.concatenate([value.ravel() for value in values.values()])
        threshold = _threshold(together, sparsity)
        return {path: value > threshold for path, value in values.items()}
    masks = {}
    for path, value in values.items():
        own = sparsity * (rates or {}).get(path, 1.0)
        masks[path] = value > _threshold(value.ravel(), own)
    return masks


def _threshold(values: jax.Array, sparsity: jax.Array | float) -> jax.Array:
    """Returns the highest score that goes; below all of them where none does."""
    # In double, 0.9 of 10 is 9; in single it may be 8.999.
    count = jnp.floor(jnp.asarray(sparsity, jnp.float32) * values.size * (1 + 1e-6))
    count = jnp.clip(count.astype(jnp.int32), 0, values.size - 1)
    ordered = jnp.sort(values)
    return jnp.where(count > 0, ordered[jnp.maximum(count - 1, 0)], -jnp.inf)


def layer_rates(params: PyTree, layers: str, rules: Mapping[str, float]) -> dict[str, float]:
    """Returns path -> sparsity of its own, of rules `{pattern: sparsity}`; the first match wins.

    Raises:
      UserError: a pattern that matches nothing, or a sparsity outside [0, 1).
    """
    for sparsity in rules.values():
        check_sparsity(sparsity)
    labels = named_leaves(label_by_path(params, list(rules.items()), default=-1.0))
    return {path: labels[path] for path in prunable(params, layers) if labels[path] >= 0}


def apply(params: PyTree, masks: Mapping[str, Any]) -> PyTree:
    """Returns the parameters with what is masked at zero."""

    def of_leaf(key_path: Any, leaf: Any) -> Any:
        mask = masks.get(jax.tree_util.keystr(key_path, simple=True, separator="/"))
        return leaf if mask is None else jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def sparsity_by_layer(params: PyTree, layers: str = ".*kernel") -> dict[str, tuple[int, int]]:
    """Returns path -> (weights that are not zero, all weights)."""
    return {
        path: (int(np.count_nonzero(np.asarray(leaf))), int(leaf.size))
        for path, leaf in prunable(params, layers).items()
    }
