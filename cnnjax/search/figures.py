"""The figures of a search."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cnnjax.search import study as studies
from cnnjax.search.plan import Search, validations

if TYPE_CHECKING:
    import optuna

# Complete trials below which no importances are told.
FEWEST = 10


def all_of(search: Search, study: optuna.Study) -> list[tuple[str, str, Callable[[], Any]]]:
    """Returns what may be drawn, if there is enough for it: (name of the file, title, function)."""
    names = [each.name for each in search.objectives]
    if len(names) == 1:
        found: list[tuple[str, str, Callable[[], Any]]] = [
            (
                "history",
                "History",
                lambda: _history(study, names[0]),
            ),
            ("curves", "Learning curves", lambda: _curves(search, study)),
        ]
    else:
        found = [
            (
                "pareto",
                "What no other trial beats in all",
                lambda: _pareto(study, names),
            ),
            ("curves", "Learning curves", lambda: _curves(search, study)),
        ]
    for index, name in enumerate(names):
        found += _of_objective(study, index, name, is_alone=len(names) == 1)
    return found


def _of_objective(
    study: optuna.Study, index: int, name: str, *, is_alone: bool
) -> list[tuple[str, str, Callable[[], Any]]]:
    """The figures of one objective and the settings."""
    suffix, title = ("", "") if is_alone else (f"_{name}", f" of {name}")

    found: list[tuple[str, str, Callable[[], Any]]] = [
        (
            f"parallel{suffix}",
            f"Settings and values{title}",
            lambda: _parallel(study, index, name),
        ),
        (
            f"slices{suffix}",
            f"Values{title} by one setting each",
            lambda: _slices(study, index, name),
        ),
    ]
    shares = importances(study, index)
    if shares:
        figure = (
            f"importances{suffix}",
            f"Share of the variance{title} that a setting explains, but those of some trials only",
            lambda: _bars(shares),
        )
        found.insert(0, figure)
    return found


def _points(study: optuna.Study, index: int) -> tuple[list[Any], list[Any]]:
    """Returns (trial, value) of the complete trials, and of the pruned ones with their last."""
    trials = studies.counted(study)
    complete = [(each, each.values[index]) for each in trials if each.state.name == "COMPLETE"]
    pruned = [
        (each, max(each.intermediate_values.items())[1])
        for each in trials
        if each.state.name == "PRUNED" and each.intermediate_values
    ]
    if not complete:
        raise ValueError("no trial has ended")
    return complete, pruned


def _history(study: optuna.Study, name: str) -> None:
    """Draws the value of each trial, and the best so far; of pruned trials the last, hollow."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    complete, pruned = _points(study, 0)
    _, axes = plt.subplots(figsize=(8, 4.5))
    numbers, values = zip(*((each.number, value) for each, value in complete), strict=True)
    is_maximized = study.direction.name == "MAXIMIZE"
    best = (np.maximum if is_maximized else np.minimum).accumulate(values)
    axes.step(numbers, best, where="post", color="#D55E00", label="best so far")
    axes.scatter(numbers, values, color="#0072B2", s=24, label="complete", zorder=3)
    if pruned:
        numbers, values = zip(*((each.number, value) for each, value in pruned), strict=True)
        axes.scatter(
            numbers, values, facecolors="none", edgecolors="#0072B2", s=24, label="pruned", zorder=3
        )
    axes.set_xlabel("trial")
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _slices(study: optuna.Study, index: int, name: str) -> None:
    """Draws the values against each setting; pruned trials, with their last value, are hollow."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    complete, pruned = _points(study, index)
    pruned = pruned if len(study.directions) == 1 else []
    distributions = {key: each for t, _ in complete for key, each in t.distributions.items()}
    columns = min(4, len(distributions))
    rows = -(-len(distributions) // columns)
    _, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 3.0 * rows), sharey=True, squeeze=False
    )
    for axes, (setting, distribution) in zip(grid.flat, distributions.items(), strict=False):
        choices = [str(each) for each in getattr(distribution, "choices", ())]
        for chosen, style in ((pruned, {"facecolors": "none"}), (complete, {})):
            found = [(t.params[setting], value) for t, value in chosen if setting in t.params]
            if choices:
                found = [(choices.index(str(x)), value) for x, value in found]
            if found:
                axes.scatter(*zip(*found, strict=True), edgecolors="#0072B2", s=24, **style)
        if choices:
            axes.set_xticks(range(len(choices)), choices)
            axes.set_xlim(-0.5, len(choices) - 0.5)
            if max(map(len, choices)) * len(choices) > 24:
                axes.tick_params("x", rotation=30)
        elif getattr(distribution, "log", False) and _spans_decade(
            [t.params[setting] for t, _ in (*pruned, *complete) if setting in t.params]
        ):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(setting.rpartition(".")[2])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(distributions) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(name)
    plt.tight_layout()


def _spans_decade(values: list[float]) -> bool:
    """Whether an axis in the logarithm would have more than one label."""
    return max(values) >= 10 * min(values)


def _pareto(study: optuna.Study, names: list[str]) -> None:
    """Draws the first objective against each other one; those that nothing beats in all, named."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    complete = (studies.optuna_module().trial.TrialState.COMPLETE,)
    trials = study.get_trials(deepcopy=False, states=complete)
    best = best_trials(study)
    if not best:
        raise ValueError("no trial has ended")
    _, grid = plt.subplots(
        1, len(names) - 1, figsize=(5.5 * (len(names) - 1), 4.2), sharey=True, squeeze=False
    )
    for index, axes in enumerate(grid[0], 1):
        for chosen, color, label in ((trials, "#0072B2", "trials"), (best, "#D55E00", "the front")):
            points = [(each.values[index], each.values[0]) for each in chosen]
            axes.scatter(*zip(*points, strict=True), color=color, s=24, label=label, zorder=2)
        for each in best:
            axes.annotate(
                str(each.number),
                (each.values[index], each.values[0]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
        if len(names) == 2:
            steps = sorted((each.values[1], each.values[0]) for each in best)
            axes.plot(*zip(*steps, strict=True), color="#D55E00", linewidth=1, zorder=1)
        axes.set_xlabel(names[index])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel(names[0])
    grid[0][0].legend(frameon=False)


def _curves(search: Search, study: optuna.Study) -> None:
    """Draws the validation score of every trial by epoch; those that were pruned end early."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    _, axes = plt.subplots(figsize=(8, 4.5))
    best = {each.number for each in best_trials(study)}
    first = search.objectives[0]
    shown = 0
    for each in studies.counted(study):
        found = validations(search.trial_directory(each.number), first.name)
        if not found and each.intermediate_values:
            found = [value for _, value in sorted(each.intermediate_values.items())]
        if not found:
            continue
        shown += 1
        is_best = each.number in best
        axes.plot(
            range(1, len(found) + 1),
            found,
            color="#D55E00" if is_best else "#0072B2",
            alpha=1.0 if is_best else 0.35,
            linewidth=2.0 if is_best else 1.0,
            zorder=3 if is_best else 2,
            marker="o" if len(found) == 1 else None,
            markersize=3,
            label=f"trial {each.number}" if is_best and len(best) <= 5 else None,
        )
    if not shown:
        plt.close("all")
        raise ValueError("no trial has been validated")
    axes.set_xlabel("epoch")
    axes.set_ylabel(first.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, title="best")


def _parallel(study: optuna.Study, index: int, name: str) -> None:
    """Draws a line a trial through its settings and its value; the best are on top and yellow."""
    import matplotlib.pyplot as plt
    import numpy as np

    optuna = studies.optuna_module()
    complete = (optuna.trial.TrialState.COMPLETE,)
    sign = 1 if study.directions[index] == optuna.study.StudyDirection.MAXIMIZE else -1
    trials = study.get_trials(deepcopy=False, states=complete)
    trials = sorted(trials, key=lambda trial: sign * trial.values[index])
    if len(trials) < 2:
        raise ValueError("too few trials have ended")
    distributions = {name: each for t in trials for name, each in t.distributions.items()}
    axes_names = [name, *distributions]
    columns = [[trial.values[index] for trial in trials]]
    columns += [[trial.params.get(each) for trial in trials] for each in distributions]
    _, axes = plt.subplots(figsize=(2.0 + 1.6 * len(axes_names), 4.5))
    scaled = []
    for place, (column, label) in enumerate(zip(columns, axes_names, strict=True)):
        is_log = getattr(distributions.get(label), "log", False) if place else False
        choices = getattr(distributions.get(label), "choices", ()) if place else ()
        heights, ticks = _heights(column, is_log, list(map(str, choices)))
        scaled.append(heights)
        axes.axvline(place, color="black", linewidth=0.8)
        for height, text in ticks:
            axes.annotate(
                text,
                (place, height),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                zorder=3,
                bbox={"color": "white", "alpha": 0.7, "pad": 1},
            )
    rows = np.array(scaled, np.float64).T
    colors = plt.get_cmap("viridis")(np.linspace(0, 1, len(rows)))
    for row, color in zip(rows, colors, strict=True):
        axes.plot(range(len(axes_names)), row, color=color, alpha=0.8, linewidth=1.4)
    axes.set_xticks(range(len(axes_names)), axes_names, rotation=20, ha="right")
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(axes_names) - 0.5)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _heights(
    column: list[Any], is_log: bool, choices: list[str]
) -> tuple[list[float], list[tuple[float, str]]]:
    """Returns heights from 0 to 1 of values, NaN for none, and the labels of an axis."""
    known = [each for each in column if each is not None]
    if choices:
        places = {text: number / (len(choices) - 1) for number, text in enumerate(choices)}
        ticks = [(height, text) for text, height in places.items()]
        return [math.nan if x is None else places[str(x)] for x in column], ticks
    change = math.log if is_log else float
    low, high = change(min(known)), change(max(known))
    width = high - low or 1.0
    heights = [math.nan if each is None else (change(each) - low) / width for each in column]
    ends = [low + width * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    values = [math.exp(each) if is_log else each for each in ends]
    return heights, [(share / 4, f"{value:.3g}") for share, value in enumerate(values)]


def _bars(shares: dict[str, float]) -> None:
    """Draws the importance of each setting, the largest on top."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(8, 0.8 + 0.4 * len(shares)))
    bars = axes.barh(list(shares), list(shares.values()), color="#0072B2")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1 * max(shares.values()))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share of the variance")


def drawn(draw: Callable[[], Any]) -> bytes | None:
    """The figure as PNG; None where the trials are too few for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        # Optuna's have a style of their own, which they would leave behind.
        with plt.style.context("default"):
            draw()
        file = io.BytesIO()
        for axes in plt.gcf().axes:
            axes.set_title("")  # The page has titles.
        plt.gcf().suptitle("")
        plt.gcf().savefig(file, format="png", dpi=110, bbox_inches="tight")
        return file.getvalue()
    except (ValueError, RuntimeError, IndexError):
        return None
    finally:
        plt.close("all")


def importances(study: optuna.Study, index: int = 0) -> dict[str, float]:
    """Returns how much of an objective's variance each setting explains, by fANOVA.

    Hutter et al. 2014. Of settings that are chosen in some trials only nothing is known. Empty
    where fewer than `FEWEST` trials have ended: of few, noise looks like importance.

    Args:
      study: the study.
      index: of the objective.
    """
    optuna = studies.optuna_module()
    complete = (optuna.trial.TrialState.COMPLETE,)
    if len(study.get_trials(deepcopy=False, states=complete)) < FEWEST:
        return {}
    try:
        return dict(
            optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                target=lambda trial: trial.values[index],
            )
        )
    except (ValueError, RuntimeError):
        return {}


def best_trials(study: optuna.Study) -> list[Any]:
    """Returns the best trial; of several objectives, those that no other is better than in all."""
    state = studies.optuna_module().trial.TrialState.COMPLETE
    if not study.get_trials(deepcopy=False, states=(state,)):
        return []
    return [study.best_trial] if len(study.directions) == 1 else study.best_trials
