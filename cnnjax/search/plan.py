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
from cnnjax.rng import numpy_generator
from cnnjax.run import checks, cli
from cnnjax.run.files import read_json
from cnnjax.run.logs import read_metrics
from cnnjax.run.settings import Settings
from cnnjax.search import costs
from cnnjax.search.costs import COSTS
from cnnjax.search.space import Choice, Space, Value, applied, draw_allowed
from cnnjax.search.workers import Request

# What `summary.json` says of a run, besides its scores.
OF_SUMMARY = ("parameters", "trained_parameters", "seconds")
# What is minimized where nothing else is said: names, or ends of names.
MINIMIZED = ("loss", "error", "perplexity", *OF_SUMMARY, *COSTS)
# Settings that are drawn to check the space with, and how many of them each value is tried with.
DRAWS, FEW = 50, 3


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
      given: the flags of the experiment as they were given, which `argv` begins with.
    """

    directory: Path
    experiment: str
    argv: tuple[str, ...]
    settings: Mapping[str, Any]
    space: Space
    objectives: tuple[Objective, ...]
    takes_best: bool = False
    given: tuple[str, ...] = ()

    def trial_directory(self, number: int) -> Path:
        """Where the run of a trial is."""
        return self.directory / "trials" / f"{number:04}"

    def allows(self, chosen: Mapping[str, Value]) -> bool:
        """Whether the constraints hold of what was chosen."""
        return self.space.allows_choice(self.settings, chosen)

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


def flag_given(name: str, argv: Sequence[str]) -> str:
    """Returns the flag of a setting if words of a command line have it or its negation, or ""."""
    flag = name.replace("_", "-")
    heads = {word.partition("=")[0] for word in argv}
    return f"--{flag}" if heads & {f"--{flag}", f"--no-{flag}"} else ""


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


def count_validations(directory: Path) -> int:
    """Returns how often a run has been validated; 0 where that cannot be read."""
    with contextlib.suppress(UserError, FileNotFoundError):
        return sum(each["kind"] == "validation" for each in read_metrics(directory))
    return 0


def lost_runs(search: Search, numbers: Sequence[int]) -> list[int]:
    """Returns those of the finished trials whose runs are gone or damaged."""
    lost = []
    for number in numbers:
        directory = search.trial_directory(number)
        try:
            read_json(directory / "summary.json", "")
            read_metrics(directory)
        except UserError:
            lost.append(number)
    return lost


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
    chosen = draw_allowed(search.space, search.settings, numpy_generator(0, "rehearsal"))
    flags = [*search.argv, *own, *chosen_flags(search.settings, chosen)]
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


def check_space(search: Search, config_type: type) -> None:
    """Raises UserError for a value of the space with which the experiment refuses to start.

    Each choice and the ends of each range are tried alone, and among other settings that are drawn;
    of what depends on data nothing is known yet.
    """
    generator = numpy_generator(0, "space")
    drawn = [draw_allowed(search.space, search.settings, generator) for _ in range(DRAWS)]
    # What is wrong whatever is chosen.
    fixed = _refusal(search, config_type, {})
    if fixed and all(_refusal(search, config_type, chosen) == fixed for chosen in drawn[:FEW]):
        raise UserError(fixed)
    names = {each.name: each for each in search.space.dimensions}
    filled = {name: value for name, value in drawn[0].items() if name not in search.settings}
    for each in search.space.dimensions:
        domain = each.domain
        for value in domain.values if isinstance(domain, Choice) else (domain.low, domain.high):
            alone, on = {**filled, each.name: value}, each.condition
            while on is not None:
                alone[on[0]], on = on[1], names[on[0]].condition
            refusal = _refusal(search, config_type, alone)
            among = [{**chosen, each.name: value} for chosen in drawn if each.name in chosen]
            among = list(filter(search.allows, among))[:FEW]
            if refusal and among and all(_refusal(search, config_type, each) for each in among):
                shown = f"{value:g}" if isinstance(value, float) else value
                raise UserError(f"--space {each.name}={shown}: {refusal}")


def _refusal(search: Search, config_type: type, chosen: Mapping[str, Value]) -> str:
    """Returns what an experiment says of settings before it starts; "" where it takes them."""
    try:
        config = cli.parse(config_type, [*search.argv, *chosen_flags(search.settings, chosen)])
        if isinstance(config, Settings):
            checks.check_specs(config)
    except UserError as error:
        return str(error)
    return ""


def check_objectives(objectives: Sequence[Objective], scores: Sequence[str]) -> None:
    """Raises UserError for an objective that no run reports."""
    for each in objectives:
        if each.name not in (*scores, *OF_SUMMARY, *COSTS):
            raise unknown_name("--objective", each.name, [*scores, *OF_SUMMARY, *COSTS])
