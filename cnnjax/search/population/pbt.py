"""Population based training: members that do badly go on from those that do well.

Jaderberg et al. 2017, "Population Based Training of Neural Networks" (arXiv 1711.09846). Every few
epochs each member of the worst copies the weights, the optimizer's state and the settings of one
of the best (exploit, by truncation: appendix A.1), and changes those settings (explore: each is
drawn anew, or multiplied by 0.8 or 1.2). One run of the population finds a schedule of settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator
from cnnjax.search.population.stopping import ranked
from cnnjax.search.space import Choice, Dimension, Value, drawn_value

FACTORS = (0.8, 1.2)
# Ways to explore that break a constraint, before a member keeps the settings that it copies.
MOST_TRIES = 100


@dataclasses.dataclass(frozen=True)
class Rule:
    """When and how members copy each other.

    Attributes:
      every_epochs: after how many epochs.
      fraction: of the members, the worst and the best.
      resample: how likely a setting is drawn anew instead of multiplied.
    """

    every_epochs: int = 1
    fraction: float = 0.2
    resample: float = 0.25

    def is_due(self, epoch: int, last: int) -> bool:
        """Whether members copy after an epoch; after the last there is nothing left to learn."""
        return epoch < last and epoch % self.every_epochs == 0


def pbt(*, every_epochs: int = 1, fraction: float = 0.2, resample: float = 0.25) -> Rule:
    """The worst `fraction` copy of the best every few epochs; a setting is `resample`d at times."""
    if every_epochs < 1:
        raise UserError(f"every_epochs={every_epochs}: give 1 or more")
    if not 0 < fraction <= 0.5:
        raise UserError(f"fraction={fraction}: give more than 0, and at most 0.5")
    if not 0 <= resample <= 1:
        raise UserError(f"resample={resample}: give a probability from 0 to 1")
    return Rule(every_epochs, fraction, resample)


RULES: spec.Registry = {"pbt": pbt}


@dataclasses.dataclass(frozen=True)
class Copied:
    """One member that copied another.

    Attributes:
      member, source: who copied whom.
      chosen: its settings from now on.
    """

    member: int
    source: int
    chosen: Mapping[str, Value]


def copies(
    scores: Mapping[int, float],
    chosen: Mapping[int, Mapping[str, Value]],
    dimensions: Sequence[Dimension],
    rule: Rule,
    *,
    seed: int,
    epoch: int,
    lower_is_better: bool,
    allows: Callable[[Mapping[str, Value]], bool] = lambda chosen: True,
) -> list[Copied]:
    """Returns who copies whom after an epoch, and with which settings: a function of its arguments.

    Args:
      scores: of the validation, by member.
      chosen: the settings of each.
      dimensions: what of them is explored.
      rule: of `pbt`.
      seed, epoch: of the draws.
      lower_is_better: how scores rank.
      allows: chosen -> whether the constraints hold.
    """
    order = ranked(scores, lower_is_better=lower_is_better)
    count = min(max(1, round(rule.fraction * len(order))), len(order) // 2)
    generator = numpy_generator(seed, "pbt", epoch)
    found = []
    for member in sorted(order[len(order) - count :]) if count else []:
        source = order[int(generator.integers(count))]
        for _ in range(MOST_TRIES):
            settings = explored(chosen[source], dimensions, rule.resample, generator)
            if allows(settings):
                break
        else:
            settings = dict(chosen[source])
        found.append(Copied(member, source, settings))
    return found


def explored(
    chosen: Mapping[str, Value],
    dimensions: Sequence[Dimension],
    resample: float,
    generator: np.random.Generator,
) -> dict[str, Value]:
    """Returns settings near those of another: each drawn anew, or times 0.8 or 1.2 (section 4.1.1).

    They stay within their ranges, by at least a step where those have steps; one of several choices
    goes to the one before or behind it.
    """
    found = dict(chosen)
    for each in dimensions:
        anew, up = generator.uniform() < resample, int(generator.integers(2))
        domain, value = each.domain, chosen[each.name]
        if anew:
            found[each.name] = drawn_value(each, generator)
        elif isinstance(domain, Choice):
            place = domain.values.index(value) + (2 * up - 1)
            found[each.name] = domain.values[min(max(place, 0), len(domain.values) - 1)]
        else:
            found[each.name] = domain.nearest(float(value) * FACTORS[up])
            if domain.step is not None and found[each.name] == value:
                found[each.name] = domain.nearest(float(value) + (2 * up - 1) * domain.step)
    return found
