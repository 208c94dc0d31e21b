"""How much pruning each layer alone costs, and sparsities that spread a loss over the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnnjax.compress import masks as masking

PyTree = Any
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
# layer -> the score at each sparsity, the first of them 0.
Scan = dict[str, tuple[float, ...]]


def scan(
    variables: PyTree,
    score: Callable[[PyTree], float],
    *,
    layers: str = ".*kernel",
    sparsities: Sequence[float] = SPARSITIES,
) -> Scan:
    """Scores a network with one layer at a time pruned by magnitude, and the rest whole.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), section 3.2.

    Args:
      variables: of the network.
      score: variables -> such as the accuracy on validation images.
      layers: pattern of the leaves.
      sparsities: rising, each in (0, 1).

    Returns:
      path -> the score without pruning, then at each sparsity.
    """
    whole = score(variables)
    found: Scan = {}
    for path, leaf in masking.prunable(variables["params"], layers).items():
        row = [whole]
        for sparsity in sparsities:
            masks = masking.keep_highest({path: jnp.abs(leaf)}, sparsity)
            params = masking.apply(variables["params"], masks)
            row.append(score({**variables, "params": params}))
        found[path] = tuple(row)
    return found


def rates(
    found: Scan,
    sizes: Mapping[str, int],
    sparsity: float,
    sparsities: Sequence[float] = SPARSITIES,
) -> dict[str, float]:
    """Returns a sparsity for each layer: all layers lose the same score, together `sparsity`.

    Where that many weights cannot go at sparsities that were tried, all rise in proportion.

    Args:
      found: what `scan` returned.
      sizes: weights of each layer.
      sparsity: of all of them together.
      sparsities: those of the scan.
    """
    total = sum(sizes[path] for path in found)

    def at(loss: float) -> dict[str, float]:
        return {path: _tolerated(row, (0.0, *sparsities), loss) for path, row in found.items()}

    def share(chosen: Mapping[str, float]) -> float:
        return sum(chosen[path] * sizes[path] for path in chosen) / total

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(at(middle)) < sparsity else (low, middle)
    chosen = at(high)
    if share(chosen) == 0:
        return dict.fromkeys(found, sparsity)
    # What is kept shrinks, so that no layer loses all.
    if share(chosen) < sparsity:
        factor = (1 - sparsity) / (1 - share(chosen))
        return {path: 1 - (1 - rate) * factor for path, rate in chosen.items()}
    factor = sparsity / share(chosen)
    return {path: rate * factor for path, rate in chosen.items()}


def _tolerated(row: Sequence[float], sparsities: Sequence[float], loss: float) -> float:
    """Returns the largest sparsity at which no more than `loss` is lost, between those tried."""
    lost = np.maximum.accumulate([row[0] - value for value in row])
    for index in range(1, len(lost)):
        if lost[index] > loss:
            step = lost[index] - lost[index - 1]
            part = (loss - lost[index - 1]) / step if step > 0 else 0.0
            part = min(max(part, 0.0), 1.0)
            return sparsities[index - 1] + part * (sparsities[index] - sparsities[index - 1])
    return sparsities[-1]
