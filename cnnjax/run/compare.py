"""Compare two runs: every leaf of their last checkpoints bit by bit, every line of their logs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import checkpoint
from cnnjax.errors import UserError
from cnnjax.run.logs import METRICS_FILE
from cnnjax.trees import named_leaves

# What differs between two runs of the same training: when, where and how often they were started.
NOT_COMPARED = {"seconds", "run_dir", "resume"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What became of comparing one kind of thing.

    Attributes:
      what: its name.
      compared: how many were there, in either run.
      different: the names of those that differ, in order; a missing one differs.
    """

    what: str
    compared: int
    different: tuple[str, ...]


def compare_runs(first: Path, second: Path) -> list[Comparison]:
    """Compares what two finished or unfinished runs left behind.

    Raises:
      UserError: one of them has no readable checkpoint or no metrics.
    """
    kept = [
        dict.fromkeys(map(str, checkpoint.steps(run / "checkpoints"))) for run in (first, second)
    ]
    return [
        _compared("checkpoints kept", kept[0], kept[1]),
        *compare_states(first, None, second, None),
        _compared("lines of metrics", _lines(first), _lines(second)),
        _compared("entries of the summary", _summary(first), _summary(second)),
    ]


def compare_states(
    first: Path, first_step: int | None, second: Path, second_step: int | None
) -> list[Comparison]:
    """Compares a checkpoint of each of two runs, by default the newest good one: every leaf of each
    item, and the meta.
    """
    states = [_leaves(first, first_step), _leaves(second, second_step)]
    metas = [_meta(first, first_step), _meta(second, second_step)]
    items = dict.fromkeys(name.partition("/")[0] for state in states for name in state)
    found = []
    for item in items:
        parts = [{k: v for k, v in state.items() if k.startswith(f"{item}/")} for state in states]
        found.append(_compared(f"arrays of {item}", parts[0], parts[1], _same_bits))
    return [*found, _compared("entries of the meta", metas[0], metas[1])]


def format_comparisons(comparisons: list[Comparison]) -> str:
    """Returns a table, one line a kind, with the first difference named."""
    width = max(len(each.what) for each in comparisons)
    lines = [f"{'compared':{width}}  number  different  first difference"]
    for each in comparisons:
        first = each.different[0] if each.different else ""
        lines.append(
            f"{each.what:{width}}  {each.compared:6}  {len(each.different):9}  {first}".rstrip()
        )
    return "\n".join(lines)


def _compared(
    what: str,
    first: dict[str, Any],
    second: dict[str, Any],
    same: Callable[[Any, Any], bool] = lambda a, b: a == b,
) -> Comparison:
    names = list(dict.fromkeys([*first, *second]))
    different = tuple(
        name
        for name in names
        if name not in first or name not in second or not same(first[name], second[name])
    )
    return Comparison(what, len(names), different)


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    forms = [(each.shape, each.dtype, np.asarray(each).tobytes()) for each in (first, second)]
    return forms[0] == forms[1]


def _leaves(run: Path, step: int | None) -> dict[str, np.ndarray]:
    directory = run / "checkpoints"
    names = checkpoint.item_names(directory, step=step)
    items = checkpoint.restore_items(directory, names, step=step)
    return {
        f"{name}/{path}": leaf for name in names for path, leaf in named_leaves(items[name]).items()
    }


def _meta(run: Path, step: int | None) -> dict[str, str]:
    meta = checkpoint.read_meta(run / "checkpoints", step=step)
    settings = meta.pop("settings", {})
    entries = meta | {f"settings/{name}": value for name, value in settings.items()}
    return _texts(entries)


def _summary(run: Path) -> dict[str, str]:
    path = run / "summary.json"
    return _texts(json.loads(path.read_text())) if path.exists() else {}


def _texts(entries: dict[str, Any]) -> dict[str, str]:
    return {
        name: json.dumps(value)
        for name, value in entries.items()
        if name.rpartition("/")[2] not in NOT_COMPARED
    }


def _lines(run: Path) -> dict[str, str]:
    path = run / METRICS_FILE
    if not path.exists():
        raise UserError(f"no metrics at {path}: is {run} a run directory?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {f"line {number}: {_name(line)}": line for number, line in enumerate(lines, 1)}


def _name(line: str) -> str:
    try:
        record = json.loads(line)
        return f"{record['kind']} at step {record['step']}"
    except (ValueError, KeyError, TypeError):
        return line[:40]
