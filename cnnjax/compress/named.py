"""Pruning by name: what `--prune` takes, read and checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from cnnjax import spec
from cnnjax.compress.gradual import Pruning
from cnnjax.compress.gradual import check as check_pruning
from cnnjax.errors import UserError

KIND = "pruning"


@dataclasses.dataclass(frozen=True)
class Weights:
    """Single weights: see `gradual.Pruning`; `by_sensitivity` gives layers rates of a scan."""

    pruning: Pruning
    by_sensitivity: bool = False


@dataclasses.dataclass(frozen=True)
class Channels:
    """Whole channels: see `channels.choose`."""

    macs: float
    norm: str
    scope: str
    layers: str
    multiple: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Whole residual blocks: see `blocks.choose`."""

    count: int
    macs: float


Step = Weights | Channels | Blocks


def magnitude(
    sparsity: float,
    scope: Literal["global", "layer", "sensitivity"] = "global",
    layers: str = ".*kernel",
    end: float = 0.6,
) -> Step:
    """Removes the smallest weights (Han et al. 2015, arXiv 1506.02626).

    Args:
      sparsity: the fraction of weights that goes.
      scope: over all layers, the same of each, or by what a scan says that each bears.
      layers: pattern of the kernels.
      end: the fraction of training by which all are gone; they go by `gradual.cubic`.
    """
    return _weights("magnitude", sparsity, scope, layers, 0.0, end)


def movement(
    sparsity: float,
    scope: Literal["global", "layer"] = "global",
    layers: str = ".*kernel",
    start: float = 0.1,
    end: float = 0.7,
) -> Step:
    """Removes what training moves to zero (Sanh et al. 2020, arXiv 2005.07683)."""
    return _weights("movement", sparsity, scope, layers, start, end)


def random(
    sparsity: float,
    scope: Literal["global", "layer"] = "layer",
    layers: str = ".*kernel",
    end: float = 0.6,
) -> Step:
    """Removes weights at random: what any other criterion must improve on."""
    return _weights("random", sparsity, scope, layers, 0.0, end)


def channels(
    macs: float,
    norm: Literal["l2", "l1", "batchnorm", "taylor", "random"] = "l2",
    scope: Literal["global", "layer"] = "global",
    layers: str = ".*",
    multiple: int = 1,
) -> Step:
    """Removes whole channels, with those that they are coupled to.

    Args:
      macs: the fraction of the multiply-accumulates that stays.
      norm: what scores them.
      scope: over all layers, or the same fraction of each.
      layers: pattern of the layers that may lose channels.
      multiple: of the channels that stay in a layer that loses some; runtimes take 8 or 16 at a
        time, and the last few take as long as so many.
    """
    if not 0 < macs < 1:
        raise UserError(f"macs={macs:g}: give the fraction that stays, above 0 and below 1.")
    if multiple < 1:
        raise UserError(f"multiple={multiple}: give 1 or more, such as 8.")
    return Channels(macs, norm, scope, layers, multiple)


def blocks(count: int = 0, macs: float = 0.0) -> Step:
    """Removes whole residual blocks: `count`, or until a fraction `macs` of the work stays."""
    if (count > 0) == (macs > 0) or count < 0 or not 0 <= macs < 1:
        raise UserError(
            f"count={count}, macs={macs:g}: give one of a count above 0 and a fraction below 1."
        )
    return Blocks(count, macs)


PRUNINGS: dict[str, Callable[..., Step]] = {
    "magnitude": magnitude,
    "movement": movement,
    "random": random,
    "channels": channels,
    "blocks": blocks,
}


def read(text: str) -> list[Step]:
    """Reads such as `channels(macs=0.5), magnitude(sparsity=0.8)`, in order.

    Raises:
      UserError: unknown names or arguments, values out of range, single weights twice or before
        what changes shapes.
    """
    items = spec.parse(text, KIND)
    steps = [spec.call(item, PRUNINGS, KIND) for item in items]
    for step in steps[:-1]:
        if isinstance(step, Weights):
            raise UserError(
                f"{KIND} {text!r}: single weights go last, and once: what removes channels or "
                "blocks stands before them."
            )
    return steps


def of_round(step: Step, number: int, rounds: int) -> Step:
    """Returns a step as it is in one of several rounds, each of which removes the same fraction.

    That is of what is there: after round `r` of `n` a fraction `(1 - sparsity)^(r / n)` of the
    weights is left.

    Raises:
      UserError: blocks, which cannot be divided.
    """
    if rounds == 1:
        return step
    if isinstance(step, Weights):
        left = (1 - step.pruning.sparsity) ** (number / rounds)
        pruning = dataclasses.replace(step.pruning, sparsity=1 - left)
        return dataclasses.replace(step, pruning=pruning)
    if isinstance(step, Channels):
        return dataclasses.replace(step, macs=step.macs ** (1 / rounds))
    raise UserError("blocks are removed at once: give one round.")


def _weights(
    criterion: str, sparsity: float, scope: str, layers: str, start: float, end: float
) -> Step:
    by_sensitivity = scope == "sensitivity"
    pruning = Pruning(
        criterion, sparsity, "layer" if by_sensitivity else scope, layers, start=start, end=end
    )
    check_pruning(pruning)
    return Weights(pruning, by_sensitivity)
