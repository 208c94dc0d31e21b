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
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cnnjax import commands
from cnnjax.errors import UserError, unknown_name

OWN_FLAGS = ("--run-dir", "--resume", "--stop-after-epochs", "--seed", "--test", "--no-test")
ENGINES = ("local", "ray")
# What holds where a flag is not given.
DEFAULTS: dict[str, Any] = {
    "experiment": None,
    "space": [],
    "where": [],
    "trials": 20,
    "timeout_secs": 0.0,
    "objective": [],
    "value": "last",
    "sampler": "tpe",
    "prune": "none",
    "workers": 0,
    "engine": "local",
    "address": "",
    "storage": "",
    "out": "",
    "resume": "",
    "seed": 0,
}
# What may be given when a search goes on.
AGAIN = ("resume", "trials", "workers", "timeout_secs", "storage", "engine", "address")
MOST_WORKERS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Searches; returns 0 at the end of the budget, 130 or 143 for a search that was stopped."""
    options, experiment_argv = _parse(argv)
    if options.resume:
        options, experiment_argv = _resumed(options, experiment_argv)
    # Not before: these import JAX, which --help does without.
    from cnnjax.run.exits import stop_requests
    from cnnjax.search import setup

    _check_numbers(options)
    search = setup.prepare(options, experiment_argv, experiment_module(options.experiment))
    with stop_requests() as asked:
        study, combinations = setup.open_study(options, search)
        return _searched(options, search, study, combinations, asked)


def _searched(
    options: argparse.Namespace,
    search: Any,
    study: Any,
    combinations: Any,
    asked: Callable[[], str | None],
) -> int:
    """Runs the trials and tells what came of them; returns the exit code."""
    from cnnjax.run.exits import INTERRUPT_EXIT_CODES
    from cnnjax.search import figures, forecasts, report, trials

    say = _Said(search, study, options.trials)
    print(f"directory    {search.directory}", flush=True)
    try:
        with _placed(options, search) as (count, start):
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
                should_stop=lambda: asked() is not None,
            )
    finally:
        if figures.best_trials(study):
            report.write_best(search, study)
    print(report.summary_line(search, study))
    if figures.best_trials(study):
        notes = [*forecasts.sentences(search, study), *report.lost(search, study)]
        print("".join(f"{sentence}\n" for sentence in notes), end="")
        print(f"see          {report.write_report(search, study, notes)}")
    if not ended:
        print(f"stopped; continue with cnnjax search --resume {search.directory}")
        return INTERRUPT_EXIT_CODES[name] if (name := asked()) else 0
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = commands.Parser(
        prog="cnnjax search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's, the same in each trial.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    add("experiment", nargs="?", help="a module, such as experiments.mnist_lenet")
    add("--space", **several, help="what is chosen: SETTING=DOMAIN ...")
    add("--where", **several, help="constraints: 'batch_size * accumulate <= 512'")
    add("--trials", type=int, help="how many, with those of earlier starts (20)")
    add("--timeout-secs", type=float, help="begin no trial after so long; 0: no limit (0)")
    add(
        "--objective",
        **several,
        help="a validation score, parameters, macs, latency_ms or seconds; min(NAME) or max(NAME) "
        "where the name does not say which; several for a Pareto front (the run's --monitor)",
    )
    add("--value", help="of which validation: last (default) or best")
    add(
        "--sampler",
        help="grid(points=5), random, quasi, tpe (default), gp (needs PyTorch), cmaes or evolution",
    )
    add(
        "--prune",
        help="none (default), median, asha(min_epochs=1, factor=3), hyperband",
    )
    add(
        "--workers",
        type=int,
        help="trials at a time (0: one a device, or a core up to 4)",
    )
    add("--engine", help="local (default), or ray: trials on a Ray cluster")
    add(
        "--address",
        help="of --engine ray: HOST:PORT of its head; auto: of this machine's cluster",
    )
    add("--storage", help="URL of a database; by default study.db in the directory")
    add("--out", help="directory (runs/search-EXPERIMENT-DATE-TIME)")
    add("--resume", help="go on with the search in this directory")
    add("--seed", type=int, help="of the sampler, and of each trial's run (0)")
    given, rest = parser.parse_both(argv, OWN_FLAGS)
    return argparse.Namespace(**{**DEFAULTS, **vars(given), "given": tuple(vars(given))}), rest


def _resumed(options: argparse.Namespace, rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of an earlier start, but for those of `AGAIN` that are given."""
    from cnnjax.search.setup import read_record

    directory = Path(options.resume)
    saved = read_record(directory)
    if rest or any(name not in AGAIN for name in options.given):
        raise UserError(
            f"--resume {directory}: it goes on with its own experiment and settings; only "
            "--trials, --workers, --timeout-secs, --storage, --engine and --address may be given"
        )
    given = {name: getattr(options, name) for name in options.given}
    found = argparse.Namespace(**{**vars(options), **saved, **given, "out": str(directory)})
    return found, list(saved["argv"])


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in (("trials", 1), ("workers", 0), ("timeout_secs", 0), ("seed", 0)):
        if not getattr(options, name) >= least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name):g}: give at least {least}.")
    if options.workers > MOST_WORKERS:
        raise UserError(f"--workers {options.workers}: give at most {MOST_WORKERS}.")
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


def experiment_module(name: str) -> Any:
    """Returns the module of an experiment; a UserError for what is none."""
    none = UserError(
        f"no experiment {name!r}: give a module with Config and main that can be imported "
        "here, such as experiments.mnist_lenet in a checkout"
    )
    if not all(part.isidentifier() for part in name.split(".")):
        raise none
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise
        raise none from None
    if not (hasattr(module, "Config") and hasattr(module, "main")):
        raise UserError(f"{name} is no experiment: it has no Config and main")
    return module


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
    count = min(count, options.trials)
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
