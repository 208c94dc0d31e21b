"""What the learning curves of a search say of what was not trained to its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cnnjax.evaluation.extrapolation import FEWEST, Forecast, extrapolate
from cnnjax.search import study as studies
from cnnjax.search.plan import Search

if TYPE_CHECKING:
    import optuna

# A pruned trial with a smaller chance of passing the best is not spoken of.
SMALL_CHANCE = 0.05
# More curves than this are not looked at: each takes some hundredths of a second.
MOST_CURVES = 40


def sentences(search: Search, study: optuna.Study) -> list[str]:
    """Returns what can be said of pruned trials and of longer training; [] where nothing can.

    With several objectives, or curves of fewer than five epochs, there is nothing.
    """
    state = studies.optuna_module().trial.TrialState
    if len(search.objectives) != 1:
        return []
    trials = studies.counted(study)
    complete = [each for each in trials if each.state == state.COMPLETE and _curve(each)]
    if not complete:
        return []
    epochs = max(len(_curve(each)) for each in complete)
    pruned = [each for each in trials if each.state == state.PRUNED and len(_curve(each)) >= FEWEST]
    whole = [each for each in complete if len(_curve(each)) == epochs]
    found = [_check(search, whole, epochs), *_pruned(search, study, pruned, epochs)]
    if search.settings.get("schedule") == "constant":
        found.append(_longer(search, study, whole, epochs))
    return [each for each in found if each]


def _check(search: Search, whole: Sequence[Any], epochs: int) -> str:
    """How often the interval from the first half of a complete curve held its last value."""
    half = epochs // 2
    if half < FEWEST:
        return ""
    held = 0
    for each in whole[:MOST_CURVES]:
        curve = _curve(each)
        forecast = _forecast(search, curve[:half], epochs)
        held += forecast.low <= curve[-1] <= forecast.high
    count = len(whole[:MOST_CURVES])
    return (
        f"Curves: from epoch {half}, the 95% interval held the value of epoch {epochs} in {held} "
        f"of {count} complete trials"
        + ("" if held >= 0.8 * count else "; forecasts are not to be trusted here")
        + "."
    )


def _pruned(search: Search, study: optuna.Study, pruned: Sequence[Any], epochs: int) -> list[str]:
    """Which pruned trials had a chance of passing the best."""
    if not pruned:
        return []
    best, best_value = study.best_trial, study.best_value
    minimized = search.objectives[0].is_minimized
    chances = []
    for each in pruned[-MOST_CURVES:]:
        forecast = _forecast(search, _curve(each), epochs)
        above = forecast.chance_above(best_value)
        chances.append((1 - above if minimized else above, each, forecast))
    likely = sorted(
        (each for each in chances if each[0] >= SMALL_CHANCE), key=lambda each: -each[0]
    )
    if not likely:
        return [
            f"Curves: none of {len(chances)} trials that were pruned after {FEWEST} epochs or more "
            f"had a chance of {SMALL_CHANCE:.0%} to pass the best."
        ]
    return [
        f"Curves: trial {each.number}, pruned after epoch {len(_curve(each))}, would be at "
        f"{_told(forecast)} after epoch {epochs}: a chance of {chance:.0%} to pass trial "
        f"{best.number} ({best_value:.4g})."
        for chance, each, forecast in likely[:3]
    ]


def _longer(search: Search, study: optuna.Study, whole: Sequence[Any], epochs: int) -> str:
    """What twice as many epochs would bring the best trial, where the learning rate is constant."""
    best = study.best_trial
    curve = _curve(best)
    if len(curve) < FEWEST or best not in whole:
        return ""
    now, later = (_forecast(search, curve, end) for end in (epochs, 2 * epochs))
    return (
        f"Curves: trial {best.number} would be at {_told(later)} after {2 * epochs} epochs; its "
        f"curve, without the noise of one validation, is at {now.value:.4g} after {epochs}."
    )


def _forecast(search: Search, curve: Sequence[float], epochs: int) -> Forecast:
    """Extrapolates a validation score, within the bounds that its values suggest."""
    least = 0.0 if min(curve) >= 0 else -math.inf
    most = 1.0 if max(curve) <= 1 and not search.objectives[0].is_minimized else math.inf
    return extrapolate(curve, epochs, least=least, most=most)


def _curve(trial: Any) -> list[float]:
    return [value for _, value in sorted(trial.intermediate_values.items())]


def _told(forecast: Forecast) -> str:
    return f"{forecast.value:.4g} [{forecast.low:.4g}, {forecast.high:.4g}]"
