"""Search the settings of an experiment, judged on its validation scores.

    cnnjax search experiments.mnist_lenet --trials 50 --epochs 3 \\
        --space 'learning_rate=log(1e-4, 1e-1)' 'optimizer=choice(adam, momentum)'
    cnnjax search --resume runs/search-mnist_lenet-20260101-120000

A domain is one of log(low, high), uniform(low, high, step), int(low, high, step), logint(low, high)
and choice(...). `momentum[optimizer=momentum]=uniform(0.8, 0.99)` is chosen only there;
`model_arguments.activation=choice(relu, tanh)` is a word of a setting;
`angle=uniform(0, 20)` fills --augment 'rotate:{angle}'.

Each trial is a run in the search's directory, without its test. A search that was killed goes on
with --resume, and so do its trials, from their last checkpoints. Several searches with the same
--storage and --out share the trials; with --engine ray they run on a Ray cluster, whose nodes see
--out. `cnnjax finish-search` trains the best setting with several seeds and tests it.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cnnjax import commands
from cnnjax.errors import UserError, unknown_name

OWN_FLAGS = ("--run-dir", "--resume", "--stop-after-epochs", "--seed", "--test", "--no-test")
# What makes a search what it is; the rest may change when it goes on.
KEPT = ("experiment", "argv", "space", "where", "objective", "value", "sampler", "prune", "seed")
RECORD = "search.json"
ENGINES = ("local", "ray")


def main(argv: Sequence[str] | None = None) -> int:
    """Searches; returns 0 at the end of the budget, 130 or 143 for a search that was stopped."""
    options, experiment_argv = _parse(argv)
    if options.resume:
        options, experiment_argv = _resumed(options, experiment_argv)
    # Not before: these import JAX, which --help does without.
    from cnnjax.search import figures, forecasts, report, trials

    _check_numbers(options)
    search = _search(options, experiment_argv)
    study, combinations = _study(options, search)
    say = _Said(search, study, options.trials)
    print(f"directory    {search.directory}", flush=True)
    try:
        with _placed(options, search) as (count, start), trials.stops() as stopped:
            print(f"workers      {count}", flush=True)
            ended = trials.run(
                search,
                study,
                budget=options.trials,
                workers=count,
                start=start,
                timeout_secs=options.timeout_secs,
                combinations=combinations,
                on_end=say.ended,
                should_stop=stopped,
            )
    finally:
        if figures.best_trials(study):
            report.write_best(search, study)
    print(report.summary_line(search, study))
    if figures.best_trials(study):
        notes = forecasts.sentences(search, study)
        print("".join(f"{sentence}\n" for sentence in notes), end="")
        print(f"see          {report.write_report(search, study, notes)}")
    if not ended:
        print(f"stopped; continue with cnnjax search --resume {search.directory}")
        return 143 if stopped() else 0
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = commands.Parser(
        prog="cnnjax search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's, the same in each trial.",
    )
    add = parser.add_argument
    add("experiment", nargs="?", help="a module, such as experiments.mnist_lenet")
    add("--space", nargs="+", default=[], help="what is chosen: SETTING=DOMAIN ...")
    add(
        "--where",
        nargs="+",
        default=[],
        help="constraints: 'batch_size * accumulate <= 512'",
    )
    add("--trials", type=int, default=20, help="how many, with those of earlier starts (20)")
    add("--timeout-secs", type=float, default=0.0, help="begin no trial after so long; 0: no limit")
    add(
        "--objective",
        nargs="+",
        default=[],
        help="a validation score, parameters, macs, latency_ms or seconds; min(NAME) or max(NAME) "
        "where the name does not say which; several for a Pareto front (the run's --monitor)",
    )
    add("--value", default="last", help="of which validation: last (default) or best")
    add(
        "--sampler",
        default="tpe",
        help="grid(points=5), random, quasi, tpe (default), gp, cmaes or evolution",
    )
    add(
        "--prune",
        default="none",
        help="none (default), median, asha(min_epochs=1, factor=3), hyperband",
    )
    add(
        "--workers",
        type=int,
        default=0,
        help="trials at a time (0: one a device, or a core up to 4)",
    )
    add("--engine", default="local", help="local (default), or ray: trials on a Ray cluster")
    add(
        "--address",
        default="",
        help="of --engine ray: HOST:PORT of its head; auto: of this machine's cluster",
    )
    add("--storage", default="", help="URL of a database; by default study.db in the directory")
    add("--out", default="", help="directory (runs/search-EXPERIMENT-DATE-TIME)")
    add("--resume", default="", help="go on with the search in this directory")
    add("--seed", type=int, default=0, help="of the sampler, and of each trial's run (0)")
    options, rest = parser.parse_both(argv, OWN_FLAGS)
    options.given = argv if argv is not None else []
    return options, rest


def _resumed(options: argparse.Namespace, rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of an earlier start; the number of trials, workers and the timeout may change."""
    from cnnjax.run.files import read_json

    directory = Path(options.resume)
    saved = read_json(directory / RECORD, f"{directory} is not the directory of a search")
    if options.experiment or options.space or rest:
        raise UserError(
            f"--resume {directory}: it goes on with its own experiment and settings; only "
            "--trials, --workers, --timeout-secs, --storage, --engine and --address may be given"
        )
    trials = max(options.trials, 0) if "--trials" in options.given else saved["trials"]
    found = argparse.Namespace(**{**vars(options), **saved, "trials": trials})
    found.out, found.storage = str(directory), options.storage or saved["storage"]
    found.workers, found.timeout_secs = options.workers, options.timeout_secs
    return found, list(saved["argv"])


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in (("trials", 1), ("workers", 0), ("timeout_secs", 0), ("seed", 0)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name):g}: give at least {least}.")
    if options.engine not in ENGINES:
        raise unknown_name("--engine", options.engine, ENGINES)
    if options.engine == "ray" and not options.address:
        raise UserError(
            "--engine ray: name the cluster with --address HOST:PORT of its head, or auto"
        )
    if options.address and options.engine != "ray":
        raise UserError(f"--address {options.address} is of a Ray cluster: add --engine ray")
    if options.value not in ("last", "best"):
        raise unknown_name("--value", options.value, ("last", "best"))
    if not options.experiment:
        raise UserError("name an experiment, such as experiments.mnist_lenet, or --resume a search")


def _search(options: argparse.Namespace, argv: Sequence[str]) -> Any:
    """Checks everything, in seconds, and writes the record of a search that is new."""
    from cnnjax import spec
    from cnnjax.run import cli, files
    from cnnjax.search import cluster, plan
    from cnnjax.search import study as studies
    from cnnjax.search.space import read_space

    spec.check(options.sampler, studies.SAMPLERS, "sampler", supplied=("seed", "space"))
    spec.check(options.prune, studies.PRUNERS, "pruner", supplied=("epochs",))
    studies.optuna_module()
    if options.engine == "ray":
        cluster.check(options.address)
    module = experiment_module(options.experiment)
    config = cli.parse(module.Config, list(argv))
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | {
        "seed": options.seed
    }
    space = read_space(options.space, module.Config, settings, options.where)
    name = options.experiment.rpartition(".")[2]
    out = Path(options.out or f"runs/search-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if options.engine == "ray":
        out = out.absolute()  # Nodes have their own working directories.
    record = out / RECORD
    shares = options.workers != 1
    if record.exists():
        # The bits of a run depend on its devices.
        shares = files.read_json(record, f"{out} is damaged").get("shares_devices", shares)
    full = (*argv, "--seed", str(options.seed))
    if shares and "devices" in settings and not settings["devices"]:
        full = (*full, "--devices", "1")
    search = plan.Search(
        out, options.experiment, full, settings, space, (), options.value == "best"
    )
    if record.exists():
        saved = files.read_json(record, f"{out} is damaged")
        given = {"argv": list(argv)} | {key: getattr(options, key) for key in KEPT if key != "argv"}
        other = [
            key for key in KEPT if given[key] != saved[key] and (key != "objective" or given[key])
        ]
        if other:
            raise UserError(
                f"{out} holds another search ({', '.join(other)}): give another --out, or "
                "--resume it"
            )
        objectives = [plan.Objective(**each) for each in saved["objectives"]]
    else:
        files.make_directory(out, "the directory of the search", "--out")
        objectives = _objectives(options, search)
        saved = {key: getattr(options, key) for key in KEPT if key != "argv"} | {
            "argv": list(argv),
            "trials": options.trials,
            "storage": options.storage,
            "objectives": [dataclasses.asdict(each) for each in objectives],
            "shares_devices": shares,
        }
        files.write_json(record, saved)
    monitored = objectives[0].name
    if monitored not in (*plan.OF_SUMMARY, *plan.COSTS) and not settings.get("monitor"):
        full = (*full, "--monitor", monitored)
    return dataclasses.replace(search, argv=full, objectives=tuple(objectives))


def experiment_module(name: str) -> Any:
    """Returns the module of an experiment; a UserError for what is none."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise
        raise UserError(
            f"no experiment {name!r}: give a module with Config and main that can be imported "
            "here, such as experiments.mnist_lenet in a checkout"
        ) from None
    if not (hasattr(module, "Config") and hasattr(module, "main")):
        raise UserError(f"{name} is no experiment: it has no Config and main")
    return module


def _objectives(options: argparse.Namespace, search: Any) -> list[Any]:
    """What is made large or small; the experiment is tried for seconds to know what it reports."""
    from cnnjax.search import plan

    given = [_objective(text) for text in options.objective]
    _check_study(options, search, given)
    print("trying       the experiment for seconds (--smoke)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tried = plan.rehearse(dataclasses.replace(search, objectives=tuple(given)), Path(folder))
    found = given or [_objective(tried["monitor"])]
    plan.check_objectives(found, tried["scores"])
    return found


def _check_study(options: argparse.Namespace, search: Any, objectives: Sequence[Any]) -> None:
    """Raises UserError for what would end the search later: nothing has been run yet."""
    from cnnjax import spec
    from cnnjax.search import plan
    from cnnjax.search import study as studies

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
    _pruner(options, search.settings)
    if options.storage:
        studies.check_storage(options.storage)


def _pruner(options: argparse.Namespace, settings: Any) -> Any:
    from cnnjax import spec
    from cnnjax.search import study as studies

    item = spec.parse_one(options.prune, "pruner")
    with studies.refused("--prune", options.prune):
        return spec.call(item, studies.PRUNERS, "pruner", epochs=settings.get("epochs", 1))


def _objective(text: str) -> Any:
    from cnnjax import spec
    from cnnjax.search.plan import MINIMIZED, Objective

    item = spec.parse_one(text, "objective")
    if item.name in ("min", "max") and len(item.positional) == 1:
        return Objective(str(item.positional[0]), item.name == "min")
    return Objective(text, any(text.endswith(name) for name in MINIMIZED))


def _study(options: argparse.Namespace, search: Any) -> tuple[Any, Any]:
    """Opens the study; returns it, and the combinations of a grid."""
    from cnnjax import spec
    from cnnjax.search import study as studies

    sampler = spec.parse_one(options.sampler, "sampler")
    url = options.storage or f"sqlite:///{(search.directory / 'study.db').absolute()}"
    name = search.directory.name
    what = {key: getattr(options, key) for key in KEPT if key not in ("argv", "objective")}
    what["argv"] = list(search.argv)

    def drawing(seed: int) -> Any:
        return spec.call(sampler, studies.SAMPLERS, "sampler", seed=seed, space=search.space)

    study = studies.open_study(
        name,
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
    if sampler.name != "grid":
        return study, None
    bound = spec.bind(sampler, studies.SAMPLERS, "sampler", supplied=("seed", "space"))
    points = bound.keywords.get("points", 5)
    return study, studies.grid_of(search.space, points, options.seed, search.allows)


@contextlib.contextmanager
def _placed(options: argparse.Namespace, search: Any) -> Iterator[tuple[int, Any]]:
    """Yields how many workers there are, and what starts one, here or on a cluster."""
    from cnnjax.search import cluster, workers

    if options.engine == "ray":
        budget = options.trials
        with cluster.connect(
            options.address, search.directory, search.experiment, options.workers
        ) as (count, start):
            yield min(count, budget), start
        return
    count, environments, cores = _devices(options.workers)
    yield count, workers.local(search.experiment, environments, cores)


def _devices(workers: int) -> tuple[int, list[dict[str, str]], list[str]]:
    """How many workers, what their environments say, and the cores that they keep to.

    This process uses no device: it would take memory of it.
    """
    devices = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    if not devices and Path("/proc/driver/nvidia/gpus").is_dir():
        devices = [str(n) for n in range(len(os.listdir("/proc/driver/nvidia/gpus")))]
    if devices and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu":
        count = workers or len(devices)
        return count, [{"CUDA_VISIBLE_DEVICES": each} for each in devices], [""]
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
    cores = sorted(affinity(0))
    count = workers or min(4, len(cores))
    return count, [{}], [str(core) for core in cores] if 1 < count <= len(cores) else [""]


class _Said:
    """Prints a line for each trial that has ended."""

    def __init__(self, search: Any, study: Any, budget: int):
        self.search, self.study, self.budget = search, study, budget

    def ended(self, trial: Any) -> None:
        """Says what became of a trial."""
        from cnnjax.search import figures, report

        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        names = [each.name for each in self.search.objectives]
        if trial.values is not None:
            pairs = zip(names, trial.values, strict=True)
            text = "  ".join(f"{name} {value:.5g}" for name, value in pairs)
        elif trial.how == "pruned":
            epoch, value = max(frozen.intermediate_values.items())
            text = f"pruned after epoch {epoch} at {names[0]} {value:.5g}"
        else:
            text = f"failed: {trial.why}"
        best = ""
        if trial.values is not None and len(names) == 1:
            found = figures.best_trials(self.study)
            if found:
                best = f"  (best {found[0].value:.5g}, trial {found[0].number})"
        print(
            f"trial {trial.number:3}    {text}{best}  {trial.seconds:.1f} s  "
            f"{report.settings_of(frozen)}",
            flush=True,
        )
