"""The page of a search: what was tried, what came of it, and what mattered."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax.explain import markup
from cnnjax.search import study as studies
from cnnjax.search.plan import Search

if TYPE_CHECKING:
    import optuna

ROWS = 50


def write_report(search: Search, study: optuna.Study) -> Path:
    """Draws the figures of a search and writes `report/index.html`, which opens without a server.

    Returns:
      The path of the page.
    """
    import warnings

    directory = search.directory / "report"
    directory.mkdir(parents=True, exist_ok=True)
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, title, draw in _figures(search, study):
            content = _drawn(draw)
            if content is not None:
                (directory / f"{name}.png").write_bytes(content)
                shown.append((title, content))
    page = directory / "index.html"
    page.write_text(_page(search, study, shown), encoding="utf-8")
    return page


def importances(study: optuna.Study) -> dict[str, float]:
    """Returns how much of the objective's variance each setting explains, by fANOVA.

    Hutter et al. 2014. Empty where too few trials have ended, or with several objectives.
    """
    optuna = studies.optuna_module()
    if len(study.directions) > 1:
        return {}
    complete = (optuna.trial.TrialState.COMPLETE,)
    if len(study.get_trials(deepcopy=False, states=complete)) < 4:
        return {}
    try:
        return dict(
            optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
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


def _figures(search: Search, study: optuna.Study) -> list[tuple[str, str, Callable[[], Any]]]:
    optuna = studies.optuna_module()
    drawn = optuna.visualization.matplotlib
    name = search.objectives[0].name
    if len(search.objectives) > 1:
        names = [each.name for each in search.objectives]
        return [
            (
                "pareto",
                "What no other trial beats in all",
                lambda: drawn.plot_pareto_front(study, target_names=names),
            )
        ]
    found = [
        (
            "history",
            "History",
            lambda: drawn.plot_optimization_history(study, target_name=name),
        ),
        ("curves", "Learning curves", lambda: drawn.plot_intermediate_values(study)),
        (
            "parallel",
            "Settings and objective",
            lambda: drawn.plot_parallel_coordinate(study, target_name=name),
        ),
        ("slices", "One setting each", lambda: drawn.plot_slice(study, target_name=name)),
    ]
    if importances(study):
        figure = (
            "importances",
            "Share of the variance that a setting explains",
            lambda: drawn.plot_param_importances(study, target_name=name),
        )
        found.insert(1, figure)
    return found


def _drawn(draw: Callable[[], Any]) -> bytes | None:
    """The figure as PNG; None where the trials are too few for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        draw()
        file = io.BytesIO()
        plt.gcf().savefig(file, format="png", dpi=110, bbox_inches="tight")
        return file.getvalue()
    except (ValueError, RuntimeError, IndexError):
        return None
    finally:
        plt.close("all")


def _page(search: Search, study: optuna.Study, figures: list[tuple[str, bytes]]) -> str:
    best = {each.number for each in best_trials(study)}
    found = sorted(studies.counted(study), key=lambda each: _order(search, each))
    names = [each.name for each in search.space.dimensions]
    head = ["trial", "", *(each.name for each in search.objectives), "epochs", *names]
    rows = "".join(
        f"<tr{' class=best' if each.number in best else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(search, each, names))
        + "</tr>"
        for each in found[:ROWS]
    )
    images = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="{markup.uri(content)}">'
        for title, content in figures
    )
    more = f"<p>The first {ROWS} of {len(found)}.</p>" if len(found) > ROWS else ""
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    values = {
        "TITLE": html.escape(f"Search of {search.experiment}"),
        "SUMMARY": html.escape(summary_line(search, study)),
        "FIGURES": images,
        "HEAD": titles,
        "ROWS": rows,
        "MORE": more,
    }
    return markup.filled(_PAGE, values)


def summary_line(search: Search, study: optuna.Study) -> str:
    """Returns how many trials ended how, and the best, in a sentence."""
    states = [each.state.name.lower() for each in studies.counted(study)]
    counts = ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states))
    best = best_trials(study)
    if not best:
        return f"{len(states)} trials: {counts or 'none'}."
    shown = "; ".join(
        f"trial {each.number}: "
        + ", ".join(
            f"{objective.name} {value:.6g}"
            for objective, value in zip(search.objectives, each.values, strict=True)
        )
        for each in best[:10]
    )
    return f"{len(states)} trials: {counts}. Best on validation: {shown}."


def settings_of(trial: Any) -> str:
    """Returns what was chosen in a trial, as text."""
    return "  ".join(f"{name}={_short(value)}" for name, value in trial.params.items())


def _cells(search: Search, trial: Any, names: list[str]) -> list[str]:
    values = trial.values or [math.nan] * len(search.objectives)
    if trial.values is None and trial.intermediate_values:
        values = [list(trial.intermediate_values.values())[-1], *values[1:]]
    scores = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
    params = [_short(trial.params[name]) if name in trial.params else "" for name in names]
    epochs = str(max(trial.intermediate_values, default=""))
    return [str(trial.number), trial.state.name.lower(), *scores, epochs, *params]


def _order(search: Search, trial: Any) -> tuple[bool, float, int]:
    """The best first, then what was pruned or failed."""
    if trial.values is None:
        return True, 0.0, trial.number
    sign = 1 if search.objectives[0].is_minimized else -1
    return False, sign * trial.values[0], trial.number


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_best(search: Search, study: optuna.Study) -> Path:
    """Writes `best.json`: the best trials, their settings and values."""
    path = search.directory / "best.json"
    content = [
        {
            "trial": each.number,
            "settings": each.params,
            "values": {
                objective.name: value
                for objective, value in zip(search.objectives, each.values, strict=True)
            },
            "run": str(search.trial_directory(each.number)),
        }
        for each in best_trials(study)
    ]
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


_PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>@TITLE@</title>
<style>
{markup.STYLE}
img {{ max-width: 100%; background: white; }}
div.wide {{ overflow-x: auto; }}
tr.best {{ font-weight: bold; }}
</style></head><body>
<h1>@TITLE@</h1><p>@SUMMARY@</p>
@FIGURES@
<h2>Trials</h2><div class="wide"><table><tr>@HEAD@</tr>@ROWS@</table></div>@MORE@
</body></html>
"""
