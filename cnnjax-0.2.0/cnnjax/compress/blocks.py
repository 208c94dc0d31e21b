"""Whole residual blocks: which of a network's modules may be left out, and how much they do.

A module may go if it returns its input when all its parameters are zero. That is what a residual
block does, whatever is in its branch, where its shortcut has no layer of its own; it is tried, and
no list of kinds of blocks is needed.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.compress import couplings as coupled
from cnnjax.compress.channels import TOLERANCE, Smaller, largest_difference
from cnnjax.errors import UserError
from cnnjax.models.interceptors import intercept_methods
from cnnjax.models.reshaped import reshaped
from cnnjax.models.summary import summary
from cnnjax.trees import from_named_leaves, named_leaves

PyTree = Any


def removable(model: Any, variables: PyTree, image: jax.Array) -> dict[str, float]:
    """Returns the modules that may be left out, and how much each changes what passes through it.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: `params` and `batch_stats`.
      image: `[batch, height, width, channels]`, as the model expects them.

    Returns:
      path -> the norm of what the module adds, relative to that of its input, over these images.
      Of modules in each other, only the innermost.
    """
    leaves = named_leaves(variables["params"])
    candidates = [
        path
        for path, call in coupled.calls(model, image.shape[1:]).items()
        if path
        and call.input_shape == call.output_shape
        and any(leaf.startswith(f"{path}/") for leaf in leaves)
    ]
    passed = jax.jit(lambda variables: _passed(model, variables, image, candidates))
    found: dict[str, float] = {}
    real = passed(variables)
    for path in candidates:
        zero = {
            leaf: np.zeros_like(value) if leaf.startswith(f"{path}/") else value
            for leaf, value in leaves.items()
        }
        before, after = passed({**variables, "params": from_named_leaves(zero)})[path]
        if not bool(jnp.array_equal(before, after)):
            continue
        before, after = real[path]
        found[path] = float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))
    return {
        path: change
        for path, change in found.items()
        if not any(other.startswith(f"{path}/") for other in found)
    }


def _passed(model: Any, variables: PyTree, image: Any, paths: list[str]) -> dict[str, Any]:
    """Returns input and output of modules."""
    found: dict[str, Any] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if path in paths and context.method_name == "__call__":
            found[path] = (args[0], output)
        return output

    with intercept_methods(note):
        model.apply(variables, image, train=False)
    return found


def choose(
    model: Any,
    changes: dict[str, float],
    image_shape: tuple[int, int, int],
    *,
    count: int = 0,
    macs: float = 0.0,
) -> list[str]:
    """Returns the blocks to remove, those that change least first.

    Args:
      model: the network.
      changes: what `removable` returned.
      image_shape: `[height, width, channels]`.
      count: how many; 0 for as many as `macs` asks.
      macs: the fraction of the multiply-accumulates that may stay.

    Raises:
      UserError: there are too few.
    """
    order = sorted(changes, key=lambda path: changes[path])
    if count:
        if count > len(order):
            raise UserError(
                f"blocks(count={count}): {len(order)} blocks can be removed"
                + (f" ({', '.join(order)})" if order else ", none has a bare shortcut")
                + ": give fewer."
            )
        return order[:count]
    rows = summary(model, image_shape).rows
    full = left = sum(row.macs for row in rows)
    for number, path in enumerate(order, 1):
        left -= sum(row.macs for row in rows if row.path.startswith(f"{path}/"))
        if left <= macs * full:
            return order[:number]
    raise UserError(
        f"blocks(macs={macs:g}): without all {len(order)} blocks that can be removed, "
        f"{left / full:.1%} of the multiply-accumulates stay: give more."
    )


def remove(
    model: nn.Module, variables: PyTree, image_shape: tuple[int, int, int], paths: list[str]
) -> Smaller:
    """Returns the network without some blocks, when it was seen to compute the same.

    Raises:
      UserError: it computes something else than with their parameters at zero.
    """

    def is_gone(leaf: str) -> bool:
        return any(leaf.partition("/")[2].startswith(f"{path}/") for path in paths)

    leaves = named_leaves(variables)
    zero = {
        leaf: np.zeros_like(value) if is_gone(leaf) and leaf.startswith("params/") else value
        for leaf, value in leaves.items()
    }
    masked = {**variables, **from_named_leaves(zero)}
    kept = {leaf: value for leaf, value in leaves.items() if not is_gone(leaf)}
    smaller = {**{name: {} for name in variables}, **from_named_leaves(kept)}
    shallow = reshaped(model, {path: {"skip": True} for path in paths})
    difference = largest_difference(model, masked, shallow, smaller, image_shape)
    if not difference <= TOLERANCE:
        raise UserError(
            f"without {', '.join(paths)} the network computes something else than with their "
            f"parameters at zero (by {difference:.1e}): leave them in."
        )
    return Smaller(shallow, smaller, masked, difference)
