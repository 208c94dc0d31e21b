"""Values with several consumers, computed once."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cnnjax.ops import choice


@jax.custom_jvp
def computed_once(x: jax.Array) -> jax.Array:
    """Returns `x`, on a CPU written to memory in the order of its axes before anything reads it.

    The window of a convolution reads its image once for each tap. XLA:CPU fuses what made the image
    (a transpose, normalization, augmentation, a max pool) into each of these readers and computes
    it as many times over; what a residual block adds to its input, in every block behind it. It
    removes optimization barriers before it fuses; a constraint on the layout is what stops it. Of a
    batch that is divided by the compiler the constraint would gather all examples on each device,
    so there is none; nor in a program for export, which another version of XLA may run.
    """
    return computed_once_both_ways(x)


@computed_once.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Of derivatives there is one reader, with which the compiler may well fuse them.
    return computed_once(primals[0]), tangents[0]


def computed_once_both_ways(x: jax.Array) -> jax.Array:
    """Returns `x`, on a CPU written to memory before anything reads it; so is its cotangent."""
    return written_p.bind(x)


# Whether there is a constraint is known when the program is lowered: for which platform, and with
# or without a batch divided by the compiler.
written_p = Primitive("cnnjax_written")
written_p.def_impl(lambda x: x)
written_p.def_abstract_eval(lambda aval: aval)
ad.deflinear2(written_p, lambda cotangent, _: [computed_once_both_ways(cotangent)])
batching.defvectorized(written_p)


def _lower_for_cpu(ctx: Any, x: Any) -> Any:
    module = ctx.module_context
    if not choice.batch_is_whole(module.axis_context) or module.lowering_parameters.for_export:
        return [x]
    layout = Layout(major_to_minor=tuple(range(ctx.avals_in[0].ndim)))
    constrain = lambda x: with_layout_constraint(x, layout)  # noqa: E731
    return mlir.lower_fun(constrain, multiple_results=False)(ctx, x)


mlir.register_lowering(written_p, lambda ctx, x: [x])
mlir.register_lowering(written_p, _lower_for_cpu, platform="cpu")
