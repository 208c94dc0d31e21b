"""Low-rank changes of kernels, computed on the parameters: any layer, any model, as it is.

    kernel' = kernel + alpha / rank * (a @ b).reshape(kernel.shape)

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section
4.1. A kernel `[..., out]` counts as the matrix `[product of the others, out]`, so that `a` is
`[height * width * in, rank]` and `b` is `[rank, out]` for a convolution (grouped and depthwise ones
included) and `[in, rank]`, `[rank, out]` for a dense layer. `b` starts at zero: the changed model
is at first the model itself. They are leaves `lora_a` and `lora_b` next to the kernel.

The gradient of the whole kernel is computed on the way to those of `a` and `b`. What is saved is
the optimizer's state and the size of checkpoints, not the time of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.trees import from_named_leaves, label_by_path, named_leaves

PyTree = Any
Ranks = Sequence[tuple[str, int]]


def init_lora(params: PyTree, ranks: Ranks, key: jax.Array) -> dict[str, Any]:
    """Draws the factors of kernels.

    Args:
      params: the parameters that are frozen (of a fully trained kernel no factors are needed).
      ranks: pairs (pattern, rank) over the paths of kernels with at least two dimensions; the first
        that matches decides, rank 0 and no match at all leave a kernel as it is. A rank above that
        of the matrix itself is lowered to it: more could express no more.
      key: typed key; each kernel's draw depends on its path alone.

    Returns:
      Nested dicts with `lora_a`, normal of variance 1 / rows, and `lora_b`, zero.

    Raises:
      UserError: a pattern that matches no kernel, a negative rank, or no kernel is changed.
    """
    for pattern, rank in ranks:
        if rank < 0:
            raise UserError(f"LoRA rank {rank} of {pattern!r} is negative: use 1 or more, or 0.")
    kernels = {
        path: leaf
        for path, leaf in named_leaves(params).items()
        if path.rpartition("/")[2] == "kernel" and len(leaf.shape) >= 2
    }
    chosen = named_leaves(label_by_path(from_named_leaves(kernels), ranks, default=0))
    leaves = {}
    for path, rank in chosen.items():
        if rank == 0:
            continue
        rows, columns = _matrix_shape(kernels[path].shape)
        rank = min(rank, rows, columns)
        layer = path.removesuffix("kernel")
        normal = jax.random.normal(stream_key(key, f"lora {path}", 0), (rows, rank))
        leaves[f"{layer}lora_a"] = normal / math.sqrt(rows)
        leaves[f"{layer}lora_b"] = jnp.zeros((rank, columns))
    if not leaves:
        raise UserError(f"the LoRA ranks {dict(ranks)} change no kernel: give one a rank above 0.")
    return from_named_leaves(leaves)


def merge_lora(params: PyTree, alpha: float) -> dict[str, Any]:
    """Returns the parameters with the factors multiplied into their kernels, and no factors.

    Args:
      params: nested dicts with kernels and their `lora_a` and `lora_b`; without any they are
        returned as they are.
      alpha: see the module.
    """
    leaves = named_leaves(params)
    merged = {p: leaf for p, leaf in leaves.items() if not p.endswith(("lora_a", "lora_b"))}
    for path, a in leaves.items():
        if path.endswith("lora_a"):
            layer = path.removesuffix("lora_a")
            kernel, b = leaves[f"{layer}kernel"], leaves[f"{layer}lora_b"]
            # At full precision: accelerators would round the factors to fewer bits.
            change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            merged[f"{layer}kernel"] = kernel + alpha / a.shape[-1] * change.reshape(kernel.shape)
    return from_named_leaves(merged)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def parse_ranks(words: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Reads ranks such as `stage4/.*=16`.

    Raises:
      UserError: a word that is no such rank.
    """
    ranks = []
    for word in words:
        pattern, equals, number = word.rpartition("=")
        if not equals or not number.isdecimal():
            raise UserError(
                f"LoRA rank {word!r}: write it as PATTERN=RANK, such as 'stage4/.*=16'."
            )
        ranks.append((pattern, int(number)))
    return tuple(ranks)
