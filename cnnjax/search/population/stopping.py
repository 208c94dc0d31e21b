"""Which members end before the others: those that diverge, stand still, or are among the worst."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError

WATCHED = ("loss", "gradient_norm", "update_norm")


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943, algorithm 1).

    Attributes:
      min_epochs: after so many epochs, times each power of `factor`, the best 1 / `factor` stay.
      factor: of members and of epochs.
    """

    min_epochs: int = 1
    factor: int = 3

    def stay(self, epoch: int, count: int) -> int:
        """Returns how many of `count` members go on after an epoch."""
        at = self.min_epochs
        while at < epoch:
            at *= self.factor
        return -(-count // self.factor) if at == epoch else count


def halving(*, min_epochs: int = 1, factor: int = 3) -> Halving:
    """The best 1 / `factor` go on after `min_epochs` epochs, and again at each `factor` times."""
    if min_epochs < 1 or factor < 2:
        raise UserError(
            f"min_epochs={min_epochs}, factor={factor}: give min_epochs of 1 or more and a factor "
            "of 2 or more"
        )
    return Halving(min_epochs, factor)


def never() -> None:
    """All members go on."""


PRUNERS: spec.Registry = {"none": never, "halving": halving}


def read_pruner(text: str) -> Halving | None:
    """Reads `halving(min_epochs=1, factor=3)` or `none`."""
    return spec.call(spec.parse_one(text, "pruner"), PRUNERS, "pruner")


def ranked(scores: Mapping[int, float], *, lower_is_better: bool) -> list[int]:
    """Returns the members, the best first; NaN is the worst, and of equal ones the first is best.

    `scores` are by member.
    """
    sign = 1 if lower_is_better else -1

    def order(member: int) -> tuple[bool, float, int]:
        score = scores[member]
        return (True, 0.0, member) if math.isnan(score) else (False, sign * score, member)

    return sorted(scores, key=order)


def worst(
    scores: Mapping[int, float], pruner: Halving | None, epoch: int, *, lower_is_better: bool
) -> list[int]:
    """Returns the members that end after an epoch because others are better."""
    if pruner is None or not scores:
        return []
    stay = max(1, pruner.stay(epoch, len(scores)))
    return sorted(ranked(scores, lower_is_better=lower_is_better)[stay:])


def diverged(metrics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns bool `[members]`: whose loss or norms are not finite in some step.

    `metrics` are pairs of `[members, steps]`.
    """
    found = [np.isfinite(metrics[name][0]).all(axis=1) for name in WATCHED if name in metrics]
    return ~np.logical_and.reduce(found)


def take_steps(metrics: Mapping[str, Sequence[np.ndarray]], member: int) -> dict[str, tuple]:
    """Returns one member's metrics, summed over steps: name -> (sum, count)."""
    return {
        name: (total[member].sum(0), count[member].sum(0))
        for name, (total, count) in metrics.items()
    }
