"""The page of a search: what was tried, what came of it, and what mattered."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax.explain import markup
from cnnjax.search import figures
from cnnjax.search import study as studies
from cnnjax.search.figures import best_trials
from cnnjax.search.plan import Search, count_validations, lost_runs

if TYPE_CHECKING:
    import optuna

ROWS = 50


def write_report(search: Search, study: optuna.Study, notes: Sequence[str] = ()) -> Path:
    """Draws the figures of a search and writes `report/index.html`, which opens without a server.

    Args:
      search, study: what is reported.
      notes: sentences that stand above the figures.

    Returns:
      The path of the page.
    """
    import warnings

    directory = search.directory / "report"
    directory.mkdir(parents=True, exist_ok=True)
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, title, draw in figures.all_of(search, study):
            content = figures.drawn(draw)
            if content is not None:
                (directory / f"{name}.png").write_bytes(content)
                shown.append((title, content))
    page = directory / "index.html"
    page.write_text(_page(search, study, shown, notes), encoding="utf-8")
    return page


def _page(
    search: Search,
    study: optuna.Study,
    pictures: list[tuple[str, bytes]],
    notes: Sequence[str],
) -> str:
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
        for title, content in pictures
    )
    more = f"<p>The first {ROWS} of {len(found)}.</p>" if len(found) > ROWS else ""
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    values = {
        "TITLE": html.escape(f"Search of {search.experiment}"),
        "SUMMARY": html.escape(summary_line(search, study)),
        "NOTES": "".join(f"<p>{html.escape(each)}</p>" for each in notes),
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
    broken = sum(
        each.user_attrs.get(studies.SKIPPED) == studies.BROKEN
        for each in study.get_trials(deepcopy=False)
    )
    if broken:
        counts += f" ({broken} draws broke --where; their numbers are left out)"
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


def lost(search: Search, study: optuna.Study) -> list[str]:
    """Returns a sentence on trials whose runs are gone or damaged; none where all are whole."""
    numbers = [each.number for each in studies.counted(study) if each.state.name == "COMPLETE"]
    found = ", ".join(map(str, lost_runs(search, numbers)))
    if not found:
        return []
    return [f"Runs: those of trials {found} are gone or damaged; their scores are in the study."]


def settings_of(trial: Any) -> str:
    """Returns what was chosen in a trial, as text."""
    return "  ".join(f"{name}={_short(value)}" for name, value in trial.params.items())


def _cells(search: Search, trial: Any, names: list[str]) -> list[str]:
    values = trial.values or [math.nan] * len(search.objectives)
    if trial.values is None and trial.intermediate_values:
        values = [max(trial.intermediate_values.items())[1], *values[1:]]
    scores = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
    params = [_short(trial.params[name]) if name in trial.params else "" for name in names]
    # With several objectives nothing is reported to the study on the way.
    trained = max(trial.intermediate_values, default=0)
    trained = trained or count_validations(search.trial_directory(trial.number))
    epochs = str(trained or "")
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
<h1>@TITLE@</h1><p>@SUMMARY@</p>@NOTES@
@FIGURES@
<h2>Trials</h2><div class="wide"><table><tr>@HEAD@</tr>@ROWS@</table></div>@MORE@
</body></html>
"""
