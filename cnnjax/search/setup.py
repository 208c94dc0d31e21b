"""How a search begins or goes on: all is checked first, then its record and its study are opened.

`DIR/search.json` says what the search is of. Whatever can be refused is refused before it is
written; the experiment is tried for seconds to know what it reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.run import cli, files
from cnnjax.search import plan, trials
from cnnjax.search import study as studies
from cnnjax.search.plan import MINIMIZED, Objective, Search
from cnnjax.search.space import read_space

RECORD = "search.json"
# What makes a search what it is; the rest may change when it goes on.
KEPT = ("experiment", "argv", "space", "where", "objective", "value", "sampler", "prune", "seed")
TYPES: dict[str, type] = {
    **dict.fromkeys(("argv", "space", "where", "objective", "objectives"), list),
    **dict.fromkeys(("experiment", "value", "sampler", "prune", "storage"), str),
    **dict.fromkeys(("seed", "trials"), int),
}


def read_record(directory: Path) -> dict[str, Any]:
    """Returns what `search.json` says of a search; UserError where it is none, or damaged."""
    saved = files.read_json(directory / RECORD, f"{directory} is not the directory of a search")
    check_types(directory / RECORD, saved, TYPES)
    return saved


def check_types(path: Path, saved: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raises UserError where a record has not all that it should have, or of other types."""
    for name, kind in types.items():
        if name not in saved:
            raise UserError(f"{path} is damaged: it has no {name}")
        if not isinstance(saved[name], kind):
            raise UserError(f"{path} is damaged: {name} is {saved[name]!r}")


def prepare(options: argparse.Namespace, argv: Sequence[str], module: Any) -> Search:
    """Checks everything, in seconds, and writes the record of a search that is new.

    Args:
      options: of the command `cnnjax search`.
      argv: the experiment's flags.
      module: the experiment.

    Raises:
      UserError: for all that would end the search or each of its trials later.
    """
    spec.check(options.sampler, studies.SAMPLERS, "sampler", supplied=("seed", "space"))
    spec.check(options.prune, studies.PRUNERS, "pruner", supplied=("epochs",))
    studies.optuna_module()
    if options.engine == "ray":
        from cnnjax.search import cluster

        cluster.check(options.address)
    out = _directory(options)
    search = _search(options, argv, module, out)
    given = [_objective(text) for text in options.objective]
    if not (out / RECORD).exists():
        _check_study(options, search, given)
        plan.check_space(search, module.Config)
    files.make_directory(out, "the directory of the search", "--out")
    files.make_directory(out / "report", "the report of the search", "--out")
    # Those that start together must not write over each other's records.
    with trials.alone(out, "starting"):
        objectives = _recorded(options, search, given)
    monitored, full = objectives[0].name, search.argv
    if monitored not in (*plan.OF_SUMMARY, *plan.COSTS) and not search.settings.get("monitor"):
        full = (*full, "--monitor", monitored)
    return dataclasses.replace(search, argv=full, objectives=tuple(objectives))


def _directory(options: argparse.Namespace) -> Path:
    name = options.experiment.rpartition(".")[2]
    out = Path(options.out or f"runs/search-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    # Nodes of a cluster have their own working directories.
    return out.absolute() if options.engine == "ray" else out


def _search(options: argparse.Namespace, argv: Sequence[str], module: Any, out: Path) -> Search:
    """What is searched, without its objectives."""
    config = cli.parse(module.Config, list(argv))
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {
        "seed": options.seed
    }
    space = read_space(options.space, module.Config, settings, options.where)
    for each in space.dimensions:
        if flag := plan.flag_given(each.name, argv):
            raise UserError(f"{flag} and --space {each.name}: give one of the two")
    shares = options.workers != 1
    if (out / RECORD).exists():
        # The bits of a run depend on its devices.
        shares = read_record(out).get("shares_devices", shares)
    full = (*argv, "--seed", str(options.seed))
    if shares and "devices" in settings and not settings["devices"]:
        full = (*full, "--devices", "1")
    best = options.value == "best"
    return Search(out, options.experiment, full, settings, space, (), best, tuple(argv))


def _recorded(
    options: argparse.Namespace, search: Search, given: Sequence[Objective]
) -> list[Objective]:
    """The objectives of the search, from its record, or written there."""
    record = search.directory / RECORD
    if record.exists():
        saved = read_record(search.directory)
        now = {"argv": list(search.given)}
        now |= {key: getattr(options, key) for key in KEPT if key != "argv"}
        other = [key for key in KEPT if now[key] != saved[key] and (key != "objective" or now[key])]
        if other:
            raise UserError(
                f"{search.directory} holds another search ({', '.join(other)}): give another "
                "--out, or --resume it"
            )
        return [Objective(**each) for each in saved["objectives"]]
    objectives = _rehearsed(search, given)
    saved = {key: getattr(options, key) for key in KEPT if key != "argv"} | {
        "argv": list(search.given),
        "trials": options.trials,
        "workers": options.workers,
        "storage": options.storage,
        "objectives": [dataclasses.asdict(each) for each in objectives],
        "shares_devices": options.workers != 1,
    }
    files.write_json(record, saved)
    return objectives


def _rehearsed(search: Search, given: Sequence[Objective]) -> list[Objective]:
    """What is made large or small; the experiment is tried for seconds to know what it reports."""
    print("trying       the experiment for seconds (--smoke)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tried = plan.rehearse(dataclasses.replace(search, objectives=tuple(given)), Path(folder))
    found = list(given) or [_objective(tried["monitor"])]
    plan.check_objectives(found, tried["scores"])
    return found


def _check_study(
    options: argparse.Namespace, search: Search, objectives: Sequence[Objective]
) -> None:
    """Raises UserError for what would end the search later: nothing has been run yet."""
    names = [each.name for each in objectives]
    if len(set(names)) < len(names):
        raise UserError(f"--objective {' '.join(options.objective)}: it names one twice: drop one")
    pruner = spec.parse_one(options.prune, "pruner").name
    if pruner != "none" and len(names) > 1:
        raise UserError(f"--prune {options.prune}: trials of several objectives cannot be pruned")
    if pruner != "none" and names and names[0] in (*plan.OF_SUMMARY, *plan.COSTS):
        raise UserError(f"--prune {options.prune}: {names[0]} is known at the end of a trial only")
    sampler = spec.parse_one(options.sampler, "sampler")
    if sampler.name == "cmaes" and len(names) > 1:
        raise UserError("--sampler cmaes: it takes one objective; take evolution or tpe")
    with studies.refused("--sampler", options.sampler):
        spec.call(sampler, studies.SAMPLERS, "sampler", seed=options.seed, space=search.space)
    _combinations(options, search)
    _pruner(options, search.settings)
    if options.storage:
        studies.check_storage(options.storage)


def _pruner(options: argparse.Namespace, settings: Any) -> Any:
    item = spec.parse_one(options.prune, "pruner")
    with studies.refused("--prune", options.prune):
        return spec.call(item, studies.PRUNERS, "pruner", epochs=settings.get("epochs", 1))


def _objective(text: str) -> Objective:
    item = spec.parse_one(text, "objective")
    if item.name in ("min", "max"):
        if len(item.positional) != 1 or item.keyword:
            raise UserError(f"--objective {text}: write it as {item.name}(NAME)")
        return Objective(str(item.positional[0]), item.name == "min")
    return Objective(text, any(text.endswith(name) for name in MINIMIZED))


def _combinations(options: argparse.Namespace, search: Search) -> Any:
    """The combinations of a grid; None of another sampler."""
    sampler = spec.parse_one(options.sampler, "sampler")
    if sampler.name != "grid":
        return None
    bound = spec.bind(sampler, studies.SAMPLERS, "sampler", supplied=("seed", "space"))
    points = bound.keywords.get("points", 5)
    return studies.grid_of(search.space, points, options.seed, search.allows)


def open_study(options: argparse.Namespace, search: Search) -> tuple[Any, Any]:
    """Opens the study; returns it, and the combinations of a grid.

    Raises:
      UserError: the storage cannot be used, or has lost the trials that the directory has.
    """
    sampler = spec.parse_one(options.sampler, "sampler")
    database = (search.directory / "study.db").absolute()
    if not options.storage and not database.exists() and list(search.directory.glob("trials/0*")):
        raise UserError(
            f"{database} is gone, which knows the trials of the search: put it back, or give "
            "another --out"
        )
    url = options.storage or f"sqlite:///{database}"
    what = {key: getattr(options, key) for key in KEPT if key not in ("argv", "objective")}
    what["argv"] = list(search.argv)

    if options.storage or database.exists():
        # Whoever holds it is told of in seconds.
        studies.check_storage(url)

    def drawing(seed: int) -> Any:
        return spec.call(sampler, studies.SAMPLERS, "sampler", seed=seed, space=search.space)

    study = studies.open_study(
        search.directory.name,
        url,
        directions=[each.direction for each in search.objectives],
        sampler=drawing(options.seed),
        pruner=_pruner(options, search.settings),
        what=json.loads(json.dumps(what)),
    )
    with studies.storage_errors(url):
        begun = len(study.get_trials(deepcopy=False))
    if begun:
        # A sampler that starts anew must not draw what it has drawn before.
        study.sampler = drawing(options.seed + 1_000_003 * begun % 2**31)
    return study, _combinations(options, search)
