"""What a search is of: an experiment, what of it is chosen, and what is made large or small."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.run.files import read_json
from cnnjax.run.logs import read_metrics
from cnnjax.search import costs
from cnnjax.search.costs import COSTS
from cnnjax.search.space import Choice, Dimension, Space, Value, applied, suggest
from cnnjax.search.workers import Request

# What `summary.json` says of a run, besides its scores.
OF_SUMMARY = ("parameters", "trained_parameters", "seconds")
# What is minimized where nothing else is said: names, or ends of names.
MINIMIZED = ("loss", "error", "perplexity", *OF_SUMMARY, *COSTS)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is made large or small.

    Attributes:
      name: a validation score, or one of `OF_SUMMARY` or of `costs.COSTS`.
      is_minimized: whether less is better.
    """

    name: str
    is_minimized: bool

    @property
    def direction(self) -> str:
        """As Optuna calls it."""
        return "minimize" if self.is_minimized else "maximize"


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search is of.

    Attributes:
      directory: where its trials lie.
      experiment: a module, such as `experiments.mnist_lenet`.
      argv: the experiment's flags that are the same in all trials.
      settings: what they and the experiment's defaults say.
      space: what is chosen.
      objectives: the first of them is what trials are pruned by.
      takes_best: whether a trial is judged by its best validation rather than by its last.
    """

    directory: Path
    experiment: str
    argv: tuple[str, ...]
    settings: Mapping[str, Any]
    space: Space
    objectives: tuple[Objective, ...]
    takes_best: bool = False

    def trial_directory(self, number: int) -> Path:
        """Where the run of a trial is."""
        return self.directory / "trials" / f"{number:04}"

    def allows(self, chosen: Mapping[str, Value]) -> bool:
        """Whether the constraints hold of what was chosen."""
        return self.space.allows({**applied(self.settings, chosen), **chosen})

    def request(self, chosen: Mapping[str, Value], directory: Path) -> Request:
        """Returns what a worker is asked for a trial."""
        own = ["--no-test", "--run-dir", str(directory), "--resume", str(directory)]
        argv = (*self.argv, *own, *chosen_flags(self.settings, chosen))
        names = tuple(each.name for each in self.objectives if each.name in COSTS)
        return Request(str(directory.with_suffix(".log")), argv, str(directory), names)


def chosen_flags(settings: Mapping[str, Any], chosen: Mapping[str, Value]) -> list[str]:
    """Returns what was chosen as flags that go behind those that say the settings."""
    changed = applied(settings, chosen)
    flags = [as_flags(name, value) for name, value in changed.items() if value != settings[name]]
    return [word for words in flags for word in words]


def as_flags(name: str, value: Any) -> list[str]:
    """Returns a setting as an experiment's command line has it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}", str(value)]


def validations(directory: Path, name: str) -> list[float]:
    """Returns a validation score of a run, one a validation; [] where there is none yet."""
    with contextlib.suppress(UserError, FileNotFoundError):
        records = [each for each in read_metrics(directory) if each["kind"] == "validation"]
        return [each[name] for each in records if name in each]
    return []


def objective_values(search: Search, directory: Path) -> tuple[float, ...]:
    """Returns what a finished run has of each objective; NaN where it has none."""
    summary = read_json(directory / "summary.json", f"{directory} is damaged")
    values = []
    for each in search.objectives:
        if each.name in OF_SUMMARY:
            values.append(float(summary[each.name]))
            continue
        if each.name in COSTS:
            values.append(float(costs.measured(directory).get(each.name, math.nan)))
            continue
        found = validations(directory, each.name)
        if not found:
            values.append(math.nan)
        elif search.takes_best:
            values.append(min(found) if each.is_minimized else max(found))
        else:
            values.append(found[-1])
    return tuple(values)


def rehearse(search: Search, directory: Path) -> dict[str, Any]:
    """Runs the experiment for seconds (`--smoke`); returns what it monitors and its scores' names.

    Costs that are objectives are measured, too.

    Raises:
      UserError: it fails with these flags.
    """
    own = ["--smoke", "--no-test", "--run-dir", str(directory)]
    flags = [*search.argv, *own, *chosen_flags(search.settings, _example(search))]
    problem = f"{search.experiment} fails with these settings"
    last = run_module(search.experiment, flags, problem)
    if not (directory / "summary.json").exists():
        raise UserError(f"{problem}: {last}")
    if names := [each.name for each in search.objectives if each.name in COSTS]:
        run_module("cnnjax.search.costs", [str(directory), *names], "a cost cannot be measured")
    summary = read_json(directory / "summary.json", f"{directory} is damaged")
    records = [each for each in read_metrics(directory) if each["kind"] == "validation"]
    scores = sorted({name for each in records for name in each} - {"step", "kind"})
    return {"monitor": summary["monitor"], "scores": scores}


def run_module(module: str, flags: Sequence[str], problem: str) -> str:
    """Runs an experiment or another program to its end, shows nothing, and returns its last line.

    Raises:
      UserError: it failed; `problem` says so, and the last line that it printed why.
    """
    found = subprocess.run(
        [sys.executable, "-m", module, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    last = last_line(found.stdout).removeprefix("error: ") or f"code {found.returncode}"
    if found.returncode:
        raise UserError(f"{problem}: {last}")
    return last


def last_line(text: str) -> str:
    """Returns the last line that is not blank; "" where there is none."""
    return next((line for line in map(str.strip, reversed(text.splitlines())) if line), "")


def _example(search: Search) -> dict[str, Value]:
    """Settings of the space to try the experiment with: the first choice, the low bound."""

    def first(dimension: Dimension) -> Value:
        domain = dimension.domain
        if isinstance(domain, Choice):
            return domain.values[0]
        return int(domain.low) if domain.is_whole else float(domain.low)

    return suggest(search.space, first)


def check_objectives(objectives: Sequence[Objective], scores: Sequence[str]) -> None:
    """Raises UserError for an objective that no run reports."""
    for each in objectives:
        if each.name not in (*scores, *OF_SUMMARY, *COSTS):
            raise unknown_name("--objective", each.name, [*scores, *OF_SUMMARY, *COSTS])
