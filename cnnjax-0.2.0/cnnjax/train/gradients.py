"""Gradients over microbatches, and uphill of the parameters (SAM).

In parts, one after another, a batch takes the memory of one part and gives the sum of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cnnjax.errors import UserError

PyTree = Any


def in_parts(
    compute: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carried: PyTree,
    batch: PyTree,
    num_parts: int,
) -> tuple[PyTree, PyTree]:
    """Calls `compute(carried, part) -> (sums, carried)` for each part of a batch, in order.

    Part `p` of `n` holds the examples `p`, `p + n`, `p + 2 n` ... Thus it is the same set of
    examples on any number of devices, each of which holds a run of the batch, and none has to move.

    Args:
      compute: see above; its `sums` are added up.
      carried: what each part hands to the next, such as BatchNorm's running statistics.
      batch: arrays whose first axis is the examples.
      num_parts: a divisor of their number.

    Returns:
      The sum of the `sums`, and what the last part carried.

    Raises:
      UserError: the parts would not be of one size.
    """
    if num_parts == 1:
        return compute(carried, batch)
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    check_parts(num_examples, num_parts, num_devices=1)
    columns = jax.tree.map(
        lambda x: x.reshape(num_examples // num_parts, num_parts, *x.shape[1:]), batch
    )

    def part(index: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), columns
        )

    def body(carry: tuple[PyTree, PyTree], index: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        total, carried = carry
        sums, carried = compute(carried, part(index))
        return (jax.tree.map(jnp.add, total, sums), carried), None

    # A loop, because only a loop makes the compiler use the memory of one part for the next.
    shapes, _ = jax.eval_shape(compute, carried, part(jnp.int32(0)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (total, carried), _ = jax.lax.scan(body, (zeros, carried), jnp.arange(num_parts))
    return total, carried


def ascend(params: PyTree, gradient: PyTree, radius: float) -> PyTree:
    """Returns the parameters at which sharpness-aware minimization takes the gradient.

    `params + radius * gradient / |gradient|`, the highest loss to first order within a ball. Foret
    et al. 2021 (arXiv 2010.01412), equation (2) with p = 2 and algorithm 1: the gradient at that
    point then updates `params`. The norm is over all parameters, and the gradient that of the whole
    batch (the paper's section 4.1 takes each device's own, its "m-sharpness").

    Args:
      params: the parameters.
      gradient: the objective's gradient at them.
      radius: `rho`, positive; the paper uses 0.05.
    """
    norm = optax.tree.norm(gradient)
    # Where the gradient is 0 there is no uphill.
    scale = radius / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, gradient)


def check_parts(batch_size: int, num_parts: int, *, num_devices: int) -> None:
    """Raises a UserError unless each device can cut its part of a batch into equal microbatches."""
    if num_parts < 1:
        raise UserError(f"accumulate {num_parts}: give 1 (the whole batch at once) or more.")
    share = batch_size // num_devices
    if share % num_parts:
        fits = [parts for parts in range(1, share + 1) if share % parts == 0]
        nearest = min(fits, key=lambda parts: (abs(parts - num_parts), -parts))
        raise UserError(
            f"batch size {batch_size} over {num_devices} device(s) is {share} examples each, which "
            f"do not divide into {num_parts} equal parts: use --accumulate {nearest}, or a batch "
            f"size that is a multiple of {num_parts * num_devices}."
        )
