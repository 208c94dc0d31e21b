"""What came of a population: a table by member, means and intervals by setting, figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnjax.evaluation.comparison import paired
from cnnjax.run import files
from cnnjax.search.population.prepare import Prepared
from cnnjax.search.population.progress import FINISHED, STOPPED, Progress
from cnnjax.search.population.stopping import ranked
from cnnjax.search.space import Value
from cnnjax.studies.tables import mean_interval

# With other images of the same dataset a member is one more draw of its setting.
DATA_SEED = "data_seed"


def write(prepared: Prepared, done: Progress, directory: Path) -> str:
    """Writes `members.json`, `population.md` and figures; returns the tables as text."""
    rows = member_rows(prepared, done)
    name, _ = prepared.monitor
    groups = groups_of(prepared)
    if done.copies:
        groups = {"all": [each.number for each in prepared.members]}
    tested = f"test_{name}" if any(f"test_{name}" in row for row in rows) else ""
    # What settings are chosen by cannot judge the one that was chosen: the test is told beside.
    score = f"validation_{name}" if len(groups) > 1 or not tested else tested
    beside = tested if tested != score else ""
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    drawn = _draw(prepared, done, groups, figures, name)
    # What others ended early with is no score of their settings.
    whole = {row["member"] for row in rows if row["ended"] in (FINISHED, STOPPED)}
    kept = {name: [n for n in members if n in whole] for name, members in groups.items()}
    compared = _range_line(rows, score) if done.copies else _groups_table(rows, kept, score, beside)
    text = f"{_members_table(rows, prepared, name)}\n{compared}"
    pictures = "".join(f"\n![{path.stem}](figures/{path.name})\n" for path in drawn)
    heading = f"# {len(rows)} members of {prepared.experiment}\n\n"
    (directory / "population.md").write_text(heading + text + pictures, encoding="utf-8")
    content = {"score": score, "members": rows, "copies": done.as_notes()["copies"]}
    files.write_json(directory / "members.json", content)
    return text


def member_rows(prepared: Prepared, done: Progress) -> list[dict[str, Any]]:
    """Returns for each member its seed, its settings, its scores and its end."""
    name, _ = prepared.monitor
    rows = []
    for each in prepared.members:
        directory = Path(prepared.configs[each.number].run_dir)
        summary: dict[str, Any] = {}
        if (directory / "summary.json").exists():
            summary = files.read_json(directory / "summary.json", f"{directory} is damaged")
        scores = done.scores[each.number]
        ended, epochs = done.ended.get(each.number, ("", done.epoch))
        rows.append(
            {
                "member": each.number,
                "seed": each.seed,
                "settings": dict(done.chosen[each.number]),
                f"validation_{name}": scores[-1][1] if scores else None,
                f"best_validation_{name}": done.best[each.number].value,
                **{key: value for key, value in summary.items() if key == f"test_{name}"},
                "epochs": epochs,
                "ended": ended,
                "run": str(directory),
            }
        )
    return rows


def groups_of(prepared: Prepared) -> dict[str, list[int]]:
    """Returns the members of each setting: those that differ in their seeds alone."""
    groups: dict[str, list[int]] = {}
    for each in prepared.members:
        chosen = {name: value for name, value in each.chosen.items() if name != DATA_SEED}
        groups.setdefault(setting_text(chosen), []).append(each.number)
    return groups


def setting_text(chosen: Mapping[str, Value]) -> str:
    """Returns settings in a line."""
    return "  ".join(f"{name}={short(value)}" for name, value in chosen.items()) or "as it is"


def short(value: Any) -> str:
    """Returns a value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _members_table(rows: Sequence[Mapping[str, Any]], prepared: Prepared, name: str) -> str:
    names = list(prepared.members[0].chosen)
    columns = [f"validation_{name}", f"best_validation_{name}"]
    columns += [f"test_{name}"] if any(f"test_{name}" in row for row in rows) else []
    head = ["member", "seed", *names, *(each.replace("_", " ") for each in columns), "epochs", ""]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        scores = [_shown(row.get(each), each) for each in columns]
        settings = [short(row["settings"][each]) for each in names]
        lines.append(
            _line([row["member"], row["seed"], *settings, *scores, row["epochs"], row["ended"]])
        )
    return "\n".join(lines) + "\n"


def _groups_table(
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Sequence[int]],
    score: str,
    beside: str = "",
) -> str:
    """Mean and 95% interval of each setting; the paired difference to the first, over seeds.

    `beside` is another score, of which there is the mean alone.
    """
    scores = {name: _by_seed(rows, members, score) for name, members in groups.items()}
    scores = {name: found for name, found in scores.items() if found}
    if not scores:
        return "No member has a score.\n"
    first = next(iter(scores))
    compares = len(scores) > 1 and len(scores[first]) > 1
    head = ["setting", "members", f"{score.replace('_', ' ')}, mean ± half of the 95% interval"]
    head += [f"minus that of {first}", "p"] if compares else []
    head += [f"{beside.replace('_', ' ')}"] if beside else []
    lines = [_line(head), _line(["---"] * len(head))]
    for name, found in scores.items():
        cells = [name, len(found), _mean(found, score)]
        shared = [seed for seed in found if seed in scores[first]]
        if compares and name != first and len(shared) > 1:
            result = paired([scores[first][seed] for seed in shared], [found[s] for s in shared])
            cells += [_with_interval(result.difference, result.half_interval, score)]
            cells += [f"{result.p_value:.3g}"]
        elif compares:
            cells += ["", ""]
        cells += [_mean(_by_seed(rows, groups[name], beside), beside)] if beside else []
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _by_seed(
    rows: Sequence[Mapping[str, Any]], members: Sequence[int], score: str
) -> dict[tuple[Any, Any], float]:
    """Returns a score of each member that has it, by what it may share with those of others."""
    return {
        (rows[n]["seed"], rows[n]["settings"].get(DATA_SEED)): rows[n][score]
        for n in members
        if _is_number(rows[n].get(score))
    }


def _mean(found: Mapping[Any, float], score: str) -> str:
    return _with_interval(*mean_interval(list(found.values())), score) if found else ""


def _range_line(rows: Sequence[Mapping[str, Any]], score: str) -> str:
    """Mean and range of members that have copied each other: they are no independent draws."""
    found = [row[score] for row in rows if _is_number(row.get(score))]
    if not found:
        return "No member has a score.\n"
    low, mean, high = (
        _with_interval(each, math.nan, score)
        for each in (min(found), sum(found) / len(found), max(found))
    )
    return (
        f"{score.replace('_', ' ')}: mean {mean}, from {low} to {high}, of {len(found)} members\n"
    )


def _draw(
    prepared: Prepared,
    done: Progress,
    groups: Mapping[str, Sequence[int]],
    figures: Path,
    name: str,
) -> list[Path]:
    from cnnjax.plots.population import copied_settings, member_curves
    from cnnjax.run.report import draw_figures

    scores = {member: found for member, found in done.scores.items() if found}
    if not scores:
        return []
    drawn: dict[str, Callable[[Path], Any]] = {}
    if done.copies:
        history = {each: settings_over_epochs(prepared, done, each) for each in prepared.leaves}
        copies = [(epoch, each.member, each.source) for epoch, each in done.copies]
        drawn["copies"] = lambda path: copied_settings(scores, history, copies, path, score=name)
    kept = {
        text: [each for each in members if each in scores]
        for text, members in groups.items()
        if any(each in scores for each in members)
    }
    drawn["members"] = lambda path: member_curves(scores, kept, path, score=name)
    return draw_figures(figures, drawn)


def settings_over_epochs(
    prepared: Prepared, done: Progress, name: str
) -> dict[int, list[tuple[int, float]]]:
    """Returns with which value of a setting each member trained in each epoch, from 1."""
    found = {}
    for each in prepared.members:
        value, history = float(each.chosen[name]), []
        changes = {epoch: copy for epoch, copy in done.copies if copy.member == each.number}
        for epoch in range(1, done.epoch + 1):
            if epoch - 1 in changes:
                value = float(changes[epoch - 1].chosen[name])
            history.append((epoch, value))
        found[each.number] = history
    return found


def best_line(prepared: Prepared, done: Progress) -> str:
    """Returns which member validates best, in a line."""
    name, lower = prepared.monitor
    latest = {member: found[-1][1] for member, found in done.scores.items() if found}
    finished = {
        m: score for m, score in latest.items() if done.ended.get(m, ("",))[0] != "diverged"
    }
    if not finished:
        return "best         no member was validated"
    best = ranked(finished, lower_is_better=lower)[0]
    run = prepared.configs[best].run_dir
    setting = setting_text({"seed": prepared.members[best].seed, **done.chosen[best]})
    return f"best         member {best} ({setting}): validation {name} {latest[best]:.4f}, in {run}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _with_interval(mean: float, half: float, score: str) -> str:
    scale, digits = (100, 2) if score.endswith("accuracy") else (1, 4)
    text = f"{scale * mean:.{digits}f}{'%' if scale == 100 else ''}"
    return text if math.isnan(half) else f"{text} ± {scale * half:.{digits}f}"


def _shown(value: Any, name: str) -> str:
    if not _is_number(value):
        return ""
    return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4f}"


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
