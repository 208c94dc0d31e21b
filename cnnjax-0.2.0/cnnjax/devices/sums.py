"""Sums over the devices of a mapped axis."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

PyTree = Any


# Of a leaf that is summed over devices together with others.
MAX_PACKED_BYTES = 2**18


def sum_over_devices(tree: PyTree, axis_name: str | None) -> PyTree:
    """Returns the sum over the mapped axis of each leaf; the tree as it is for no axis.

    Small leaves are summed as one array: the devices of a CPU wait for each other once an array,
    which for a small network's many would take longer than its gradient. Integers among them, such
    as counts of pixels, are exact as far as their sum fits: they are packed as two numbers each, of
    which float32 holds the sums.
    """
    if axis_name is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    small = [leaf.size * leaf.dtype.itemsize <= MAX_PACKED_BYTES for leaf in leaves]
    packed, unpack = ravel_pytree([_halves(leaf) for leaf in itertools.compress(leaves, small)])
    large = [leaf for leaf, packs in zip(leaves, small, strict=True) if not packs]
    dtypes = [leaf.dtype for leaf in itertools.compress(leaves, small)]
    packed_leaves = map(_whole, unpack(jax.lax.psum(packed, axis_name)), dtypes)
    # Each by itself, so that a compiler may begin with the first while it computes the next.
    large_leaves = iter([jax.lax.psum(leaf, axis_name) for leaf in large])
    totals = [next(packed_leaves if packs else large_leaves) for packs in small]
    return jax.tree.unflatten(structure, totals)


def _halves(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Returns an integer array as floats, its multiples of 4096 and the rest; a float as it is."""
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return (leaf,)
    return (leaf >> 12).astype(jnp.float32), (leaf & 4095).astype(jnp.float32)


def _whole(halves: tuple[jax.Array, ...], dtype: Any) -> jax.Array:
    """Undoes `_halves`, of sums of them, too."""
    if len(halves) == 1:
        return halves[0]
    high, low = (half.astype(dtype) for half in halves)
    return (high << 12) + low
