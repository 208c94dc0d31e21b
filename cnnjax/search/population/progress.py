"""Where a population's run stands, as its checkpoints and its record have it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cnnjax.search.population.pbt import Copied
from cnnjax.search.population.varied import Member
from cnnjax.search.space import Value
from cnnjax.train.loop import Best

# Why a member ended.
FINISHED, STOPPED, DIVERGED, WORST = "finished", "early stopping", "diverged", "pruned"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known besides the states, after an epoch.

    Attributes:
      epoch: how many are done.
      active: the members that still train.
      chosen: the settings of each member now.
      best: the best validation of each so far.
      ended: why each of the others ended, and after how many epochs.
      scores: for each member the monitored validation score of each epoch that had one.
      copies: after which epoch who copied whom, with the new settings.
      seconds: that the whole run has taken.
    """

    epoch: int
    active: tuple[int, ...]
    chosen: Mapping[int, Mapping[str, Value]]
    best: Mapping[int, Best]
    ended: Mapping[int, tuple[str, int]]
    scores: Mapping[int, Sequence[tuple[int, float]]]
    copies: Sequence[tuple[int, Copied]]
    seconds: float = 0.0

    def as_notes(self) -> dict[str, Any]:
        """Returns it as JSON can hold it: keys are texts."""
        notes = dataclasses.asdict(self)
        for name in ("chosen", "best", "ended", "scores"):
            notes[name] = {str(key): value for key, value in notes[name].items()}
        return notes


def start(members: Sequence[Member]) -> Progress:
    """Returns where a new run stands."""
    numbers = tuple(each.number for each in members)
    return Progress(
        epoch=0,
        active=numbers,
        chosen={each.number: dict(each.chosen) for each in members},
        best={number: Best() for number in numbers},
        ended={},
        scores={number: () for number in numbers},
        copies=(),
    )


def from_notes(notes: Mapping[str, Any]) -> Progress:
    """Reads what `as_notes` returned, and JSON has held."""
    return Progress(
        epoch=notes["epoch"],
        active=tuple(notes["active"]),
        chosen={int(key): value for key, value in notes["chosen"].items()},
        best={int(key): Best(**value) for key, value in notes["best"].items()},
        ended={int(key): (why, epoch) for key, (why, epoch) in notes["ended"].items()},
        scores={
            int(key): tuple((epoch, score) for epoch, score in value)
            for key, value in notes["scores"].items()
        },
        copies=tuple((epoch, Copied(**copied)) for epoch, copied in notes["copies"]),
        seconds=notes["seconds"],
    )
