"""Which way of searching finds the best settings for its budget: a table and a figure.

    python scripts/search_study.py --out runs/search-study
    python scripts/search_study.py --out runs/search-study --table     # of what there is

LeNet-5 on MNIST: learning rate, weight decay and batch size, 30 trials of 3 epochs, drawn by TPE
and pruned by ASHA, drawn at random, and on a grid of 32 points of which 30 are tried. Each is
repeated with five seeds. The settings of the TPE search with the best validation score are then
trained for 12 epochs with five seeds, beside the experiment's defaults, and only these are tested.

It resumes where it was stopped, within a search by trial; a search that is complete is not run
again. 450 trials of a quarter of a minute or less on one CPU core, and ten runs of a minute.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from seeds_table import half_interval

from cnnjax.paths import expand_flags

EXPERIMENT = "experiments.mnist_lenet"
SPACE = (
    "learning_rate=log(1e-4, 3e-2)",
    "weight_decay=log(1e-3, 0.5)",
    "batch_size=choice(64, 128)",
)
METHODS = {
    "TPE with ASHA": ("--sampler", "tpe", "--prune", "asha(min_epochs=1, factor=3)"),
    "random": ("--sampler", "random"),
    "grid": ("--sampler", "grid(points=4)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="one a repetition")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--trials", type=int, default=30)
    add("--epochs", type=int, default=3)
    add("--workers", type=int, default=1)
    add("--experiment", default=EXPERIMENT)
    add("--flags", nargs="*", default=[], metavar="FLAG", help="of every trial: validation=0.2")
    add("--final-epochs", type=int, default=12)
    add("--table", action="store_true", help="run nothing: the table of what there is")
    add("--out", type=Path, default=Path("runs/search-study"))
    arguments = parser.parse_args(expand_flags())
    # A repetition of all methods before the next one: what there is can be compared early.
    places = [(method, seed) for seed in arguments.seeds for method in arguments.methods]
    found: dict[str, list[list]] = {}
    for method, seed in places:
        directory = place(arguments.out, method, seed)
        trials = trials_of(directory)
        if not (arguments.table or is_complete(trials, arguments.trials)):
            search(method, seed, arguments)
            trials = trials_of(directory)
        if is_complete(trials, arguments.trials):
            found.setdefault(method, []).append(trials)
    if not found:
        sys.exit(f"no search of {arguments.trials} trials is complete in {arguments.out} yet")
    count = sum(map(len, found.values()))
    text = f"{table(found)}\n\n{count} of {len(places)} searches are complete."
    if not arguments.table and "TPE with ASHA" in found:
        text += f"\n\n{final(arguments)}"
    print(text)
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(found, arguments.out / "search_study.png")


def place(out: Path, method: str, seed: int) -> Path:
    """Returns the directory of a search."""
    return out / f"{method.replace(' ', '-').lower()}-{seed}"


def search(method: str, seed: int, arguments: argparse.Namespace) -> None:
    """Starts a search, or continues it."""
    directory = place(arguments.out, method, seed)
    command = [sys.executable, "-m", "cnnjax", "search"]
    if (directory / "search.json").exists():
        command += ["--resume", str(directory)]
    else:
        command += [arguments.experiment, "--space", *SPACE, *METHODS[method]]
        command += ["--epochs", str(arguments.epochs), "--seed", str(seed)]
        command += ["--out", str(directory), "--keep-last", "1", "--devices", "1"]
        for flag in arguments.flags:
            name, _, value = flag.partition("=")
            command += [f"--{name}", value]
    command += ["--trials", str(arguments.trials), "--workers", str(arguments.workers)]
    print(f"{method}, seed {seed}: {directory}", file=sys.stderr, flush=True)
    if code := subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit(code)


def trials_of(directory: Path) -> list:
    """Returns the trials of a search that count; [] where there is none."""
    from cnnjax.search import study as studies

    if not (directory / "study.db").exists():
        return []
    storage = studies.open_storage(f"sqlite:///{directory / 'study.db'}")
    optuna = studies.optuna_module()
    return studies.counted(optuna.load_study(study_name=directory.name, storage=storage))


def is_complete(trials: list, count: int) -> bool:
    """Whether a search has so many trials, and none of them still runs."""
    return len(trials) >= count and all(each.state.is_finished() for each in trials)


def errors(trials: list) -> list[float]:
    """Returns the least validation error after each trial, in percent; pruned ones do not count."""
    least, found = 100.0, []
    for each in sorted(trials, key=lambda each: each.datetime_complete):
        if each.value is not None:
            least = min(least, 100 * (1 - each.value))
        found.append(least)
    return found


def seconds(trials: list) -> float:
    """Returns what the trials took, without what lay between starts of the search."""
    return sum(each.user_attrs.get("seconds", 0.0) for each in trials)


def epochs(trials: list) -> int:
    """Returns how many epochs the trials trained together."""
    return sum(max(each.intermediate_values, default=0) for each in trials)


def table(found: dict[str, list[list]]) -> str:
    """Returns the Markdown table of `method -> trials of each repetition`."""
    lines = [
        "| search | best validation error, % | each repetition | epochs trained | minutes |",
        "|---|---|---|---|---|",
    ]
    for method, repetitions in found.items():
        best = [errors(trials)[-1] for trials in repetitions]
        each = " ".join(f"{error:.2f}" for error in best)
        minutes = [seconds(trials) / 60 for trials in repetitions]
        trained = [epochs(trials) for trials in repetitions]
        half = f" ± {half_interval(best):.2f}" if len(best) > 1 else ""
        lines.append(
            f"| {method} | {statistics.mean(best):.2f}{half} | {each} | "
            f"{statistics.mean(trained):.0f} | {statistics.mean(minutes):.1f} |"
        )
    return "\n".join(lines)


def final(arguments: argparse.Namespace) -> str:
    """Tests what the best search found, once, beside the defaults; returns the table."""
    places = [place(arguments.out, "TPE with ASHA", seed) for seed in arguments.seeds]
    best = min(places, key=lambda directory: errors(trials_of(directory))[-1])
    command = [sys.executable, "-m", "cnnjax", "finish-search", "--search", str(best)]
    command += ["--epochs", str(arguments.final_epochs)]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    from cnnjax.paths import read_text

    return f"Settings of `{best.name}`, {arguments.final_epochs} epochs:\n\n" + read_text(
        best / "final.md"
    )


def draw(found: dict[str, list[list]], path: Path) -> None:
    """Draws the least error after each number of trials: a line a repetition, and their mean."""
    from cnnjax import plots

    curves = {method: [errors(trials) for trials in each] for method, each in found.items()}
    if plots.attempt(lambda file: plots.best_so_far(curves, file), path):
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
