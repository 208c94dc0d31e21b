"""Layers as products of smaller ones: the SVD of dense and 1x1 layers, Tucker-2 of convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import numpy as np

from cnnjax import ops
from cnnjax.compress import couplings as coupled
from cnnjax.errors import UserError
from cnnjax.models.reshaped import CORE, EXPAND, REDUCE, reshaped
from cnnjax.trees import from_named_leaves, mask_by_path, named_leaves

PyTree = Any
Factors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Factored:
    """What became of a layer.

    Attributes:
      layer: its path.
      ranks: channels between its factors; () where it is whole.
      error: of its kernel: the norm of the difference relative to that of the kernel.
      macs, new_macs: multiply-accumulates for one image, before and after.
      why_whole: why it was left whole; "" where it was not.
    """

    layer: str
    ranks: tuple[int, ...]
    error: float
    macs: int
    new_macs: int
    why_whole: str = ""


def rank_of(singular_values: np.ndarray, energy: float) -> int:
    """Returns the least rank whose singular values have that fraction of the sum of squares."""
    squares = np.square(singular_values.astype(np.float64))
    total = squares.sum()
    if total == 0:
        return 1
    # Rounding may leave the whole sum short of itself.
    return min(
        int(np.searchsorted(np.cumsum(squares), energy * total * (1 - 1e-12))) + 1, len(squares)
    )


def split_matrix(kernel: np.ndarray, energy: float) -> Factors:
    """Returns `[in, rank]` and `[rank, out]`, whose product is nearest to a matrix `[in, out]`.

    The square roots of the singular values go to both sides, so that both learn at one rate.
    """
    left, values, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    rank = rank_of(values, energy)
    root = np.sqrt(values[:rank])
    return {REDUCE: left[:, :rank] * root, EXPAND: root[:, None] * right[:rank]}


def tucker2(kernel: np.ndarray, energy: float, *, both: bool = True, sweeps: int = 3) -> Factors:
    """Returns the factors of a convolution's kernel `[height, width, in, out]`.

    `kernel ~ core [height, width, r, s]` times `reduce [in, r]` and `expand [s, out]` (Kim et al.
    2016, arXiv 1511.06530, section 3.1). The ranks are those of the kernel's two unfoldings at that
    energy; the bases start at their singular vectors and are improved in turn (higher-order
    orthogonal iteration: De Lathauwer et al. 2000).

    Args:
      kernel: of the convolution.
      energy: the fraction of the sum of squares that each unfolding keeps.
      both: whether there is a factor on the side of the input too.
      sweeps: of the iteration.
    """
    whole = kernel.astype(np.float64)
    _, outputs = _basis(whole, 3, energy)
    if not both:
        return {CORE: whole @ outputs, EXPAND: outputs.T}
    _, inputs = _basis(whole, 2, energy)
    for _ in range(sweeps):
        _, outputs = _basis(np.einsum("hwio,ir->hwro", whole, inputs), 3, outputs.shape[1])
        _, inputs = _basis(whole @ outputs, 2, inputs.shape[1])
    core = np.einsum("hwio,ir,os->hwrs", whole, inputs, outputs)
    return {REDUCE: inputs, CORE: core, EXPAND: outputs.T}


def _basis(kernel: np.ndarray, axis: int, size: float | int) -> tuple[np.ndarray, np.ndarray]:
    """Returns singular values, and vectors of an unfolding: of an energy, or as many as given."""
    unfolded = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    vectors, values, _ = np.linalg.svd(unfolded, full_matrices=False)
    rank = size if isinstance(size, int) else rank_of(values, size)
    return values, vectors[:, :rank]


def product(factors: Factors) -> np.ndarray:
    """Returns the kernel that factors stand for."""
    core = factors.get(CORE)
    if core is None:
        return factors[REDUCE] @ factors[EXPAND]
    if REDUCE in factors:
        core = np.einsum("hwrs,ir->hwis", core, factors[REDUCE])
    return core @ factors[EXPAND] if EXPAND in factors else core


def decompose(
    model: nn.Module,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    *,
    energy: float,
    layers: str = ".*",
) -> tuple[nn.Module, PyTree, list[Factored]]:
    """Factors the layers of a network where that makes them smaller.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: `params` and perhaps `batch_stats`.
      image_shape: `[height, width, channels]`.
      energy: the fraction of each kernel's sum of squares that stays, in (0, 1].
      layers: pattern of the layers' paths.

    Returns:
      The network and its variables, of which those that are factored have children, and what became
      of each layer.

    Raises:
      UserError: an energy out of range, a pattern that matches no layer, or no layer that gets
        smaller.
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy={energy:g}: give a number above 0 and at most 1.")
    calls = coupled.calls(model, image_shape)
    leaves = named_leaves(variables["params"])
    found = {p.rpartition("/")[0]: leaf for p, leaf in leaves.items() if p.endswith("/kernel")}
    chosen = named_leaves(mask_by_path({path: 0 for path in found}, [layers]))
    changes: dict[str, dict[str, Any]] = {}
    report = []
    for path, kernel in found.items():
        if not chosen[path]:
            continue
        factors, row = _smallest(path, np.asarray(kernel), calls.get(path), energy)
        report.append(row)
        if not factors:
            continue
        changes[path] = {"ranks": list(row.ranks)}
        bias = leaves.pop(f"{path}/bias", None)
        del leaves[f"{path}/kernel"]
        for name, factor in factors.items():
            one_by_one = kernel.ndim == 4 and factor.ndim == 2
            shaped = factor[None, None] if one_by_one else factor
            leaves[f"{path}/{name}/kernel"] = shaped.astype(kernel.dtype)
        if bias is not None:
            leaves[f"{path}/{list(factors)[-1]}/bias"] = bias
    if not changes:
        raise UserError(
            f"energy={energy:g}: no layer has fewer multiply-accumulates in factors of that "
            f"energy ({report[0].layer}: {report[0].why_whole}): give less."
        )
    new = {**variables, "params": from_named_leaves(leaves)}
    return reshaped(model, changes), new, report


def _smallest(
    path: str, kernel: np.ndarray, call: coupled.Call | None, energy: float
) -> tuple[Factors, Factored]:
    """Returns the factors of a layer with the fewest multiply-accumulates; {} to leave it whole."""
    if call is None or not isinstance(call.module, nn.Dense | nn.Conv | ops.ConvPool):
        return {}, Factored(path, (), 0.0, 0, 0, "no convolution or dense layer")
    before, after = _positions(call)
    macs = kernel.size * after
    if getattr(call.module, "feature_group_count", 1) > 1:
        return {}, Factored(path, (), 0.0, macs, macs, "its channels are in groups")
    if kernel.ndim == 2 or kernel.shape[:2] == (1, 1):
        matrix = kernel.reshape(kernel.shape[-2:])
        options = [split_matrix(matrix, energy)]
    elif kernel.ndim == 4:
        options = [tucker2(kernel, energy, both=both) for both in (True, False)]
    else:
        return {}, Factored(path, (), 0.0, macs, macs, f"its kernel has {kernel.ndim} axes")

    def cost(factors: Factors) -> int:
        first = before if CORE in factors else after
        sizes = {name: factor.size for name, factor in factors.items()}
        return sizes.pop(REDUCE, 0) * first + sum(sizes.values()) * after

    best = min(options, key=cost)
    ranks = tuple(
        best[name].shape[axis] if name in best else 0
        for name, axis in (((REDUCE, 1), (EXPAND, 0)) if CORE in best else ((REDUCE, 1),))
    )
    if cost(best) >= macs:
        why = f"ranks {', '.join(map(str, ranks))} would compute more"
        return {}, Factored(path, (), 0.0, macs, macs, why)
    whole = product(best).reshape(kernel.shape)
    error = float(np.linalg.norm(whole - kernel)) / max(float(np.linalg.norm(kernel)), 1e-30)
    return best, Factored(path, ranks, error, macs, cost(best))


def _positions(call: coupled.Call) -> tuple[int, int]:
    """Returns the positions of a layer's input and output, before a pool of its own."""
    inside = int(np.prod(call.input_shape[1:-1]))
    outside = int(np.prod(call.output_shape[1:-1]))
    if isinstance(call.module, ops.ConvPool):
        height, width = call.input_shape[1:3]
        rows, columns = call.module.kernel_size
        same = call.module.padding == "SAME"
        outside = height * width if same else (height - rows + 1) * (width - columns + 1)
    return inside, outside


def table(report: list[Factored]) -> str:
    """Returns what became of each layer, as text."""
    width = max(len(row.layer) for row in report)
    lines = []
    for row in report:
        what = row.why_whole and f"whole: {row.why_whole}"
        what = what or (
            f"ranks {'x'.join(map(str, row.ranks))}, error {row.error:.3f}, "
            f"{row.macs:,} -> {row.new_macs:,} MACs"
        )
        lines.append(f"{row.layer:{width}}  {what}")
    return "\n".join(lines)
