"""Values with several consumers, computed once."""

from __future__ import annotations

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from cnnjax.ops import choice


@jax.custom_jvp
def computed_once(x: jax.Array) -> jax.Array:
    """Returns `x`, written to memory in the order of its axes before anything reads it.

    The window of a convolution reads its image once for each tap. XLA:CPU fuses what made the image
    (a transpose, normalization, augmentation, a max pool) into each of these readers and computes
    it as many times over. It removes optimization barriers before it fuses; a constraint on the
    layout is what stops it. Of a batch that may be sharded the constraint would gather all
    examples on each device, so there is none.
    """
    return computed_once_both_ways(x)


@computed_once.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Of derivatives there is one reader, with which the compiler may well fuse them.
    return computed_once(primals[0]), tangents[0]


def computed_once_both_ways(x: jax.Array) -> jax.Array:
    """Returns `x`, written to memory before anything reads it; so is its cotangent."""
    if choice.batch_may_be_sharded():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
