"""Run experiments with several seeds and print their scores as a Markdown table.

    python scripts/seeds_table.py mnist_lenet
    python scripts/seeds_table.py "mnist_lenet --epochs 5" "mnist_cnn" --seeds 0 1 2
    python scripts/seeds_table.py mnist_adversarial --columns accuracy robust_accuracy
    python scripts/seeds_table.py mnist_lenet "mnist_lenet --augment none" --paired

A row is an experiment with its flags; a column is a test score, in percent where it is a share, or
any number of `summary.json`. `--paired` adds by how much each row differs from the first over the
same seeds, with its 95% interval and p. Finished runs under --out are not run again, stopped ones
go on, so that the table can be completed in pieces.
"""

import argparse
import contextlib
import importlib
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import expand_flags, read_text
from cnnjax.run import classifier, cli
from cnnjax.run.exits import one_line_errors

# File systems allow 255 bytes.
MAX_NAME_LENGTH = 150
# Columns that runs have whatever their task, and scores of classifiers.
OF_EVERY_RUN = {"parameters", "trained_parameters", "epochs", "seconds", "seed", "step"}
OF_CLASSIFIERS = {"accuracy", "loss"}


def run(line: str, seed: int, out: Path) -> dict:
    """Runs one experiment line with one seed, unless it is finished; returns its summary."""
    directory = run_directory(line, seed, out)
    experiment, *flags = shlex.split(line)
    if not (directory / "summary.json").exists():
        command = [sys.executable, "-m", f"experiments.{experiment}"]
        if (directory / "config.json").exists():
            command += ["--resume", str(directory)]
        else:
            command += [*flags, "--seed", str(seed), "--run-dir", str(directory)]
        ended = subprocess.run(command, check=False, stdout=sys.stderr)
        if ended.returncode:
            raise UserError(f"{line!r} with seed {seed} ended with code {ended.returncode}.")
    return json.loads(read_text(directory / "summary.json"))


def run_directory(line: str, seed: int, out: Path) -> Path:
    """Returns where `run` keeps the run of a line with a seed."""
    name = re.sub(r"[^\w.-]+", "_", line)
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[:MAX_NAME_LENGTH]}-{zlib.crc32(line.encode()):08x}"
    return out / f"{name}-seed{seed}"


def half_interval(values: Sequence[float]) -> float:
    """Returns half the width of Student's 95% interval of the mean; NaN for one value."""
    from cnnjax.studies.tables import mean_interval

    return mean_interval(values)[1]


def interval(values: Sequence[float]) -> str:
    """Returns the mean and its 95% interval, in percent."""
    return f"{100 * statistics.mean(values):.2f} ± {100 * half_interval(values):.2f}"


def scores(summaries: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """Returns a column's number of each seed: a test score, or another number of the summary.

    Raises:
      UserError: the runs have no such number.
    """
    first = summaries[0]
    name = f"test_{column}" if f"test_{column}" in first else column
    numbers = [key for key, value in first.items() if isinstance(value, int | float)]
    if name not in numbers:
        known = sorted(key.removeprefix("test_") for key in numbers)
        raise unknown_name("column", column, known)
    return [float(summary[name]) for summary in summaries]


def is_share(column: str, values: Sequence[float]) -> bool:
    """Whether a column is told in percent."""
    return "accuracy" in column and all(0 <= value <= 1 for value in values)


def row(
    line: str,
    columns: Mapping[str, list[float]],
    varying: Sequence[str],
    first: Mapping[str, list[float]] | None,
) -> str:
    """Returns one line of the table: of each column mean and spread, and what each seed has.

    Args:
      line: the experiment and its flags.
      columns: of this row, a number for each seed.
      varying: those that differ from seed to seed; others have one number.
      first: of the row that this one is compared with, or None.
    """
    cells = [f"`{line}`"]
    for name, values in columns.items():
        told = _told(values, is_share(name, values))
        cells += told if name in varying else told[:1]
        if first is not None and name in varying:
            cells.append("" if first is columns else difference(first[name], values, name))
    return f"| {' | '.join(cells)} |"


def difference(first: Sequence[float], second: Sequence[float], column: str) -> str:
    """Returns second minus first over the seeds: mean, 95% interval and p of the paired t-test."""
    from cnnjax.evaluation.comparison import paired

    found = paired(first, second)
    scale = 100 if is_share(column, [*first, *second]) else 1
    sign = f"{scale * found.difference:+.3g} ± {scale * found.half_interval:.2g}"
    return f"{sign}, p = {found.p_value:.2g}"


def titles(
    columns: Sequence[str], shares: Sequence[str], varying: Sequence[str], *, paired: bool
) -> str:
    """Returns the head of the table."""
    cells = ["experiment"]
    for name in columns:
        cells.append(name.replace("_", " ") + (", %" if name in shares else ""))
        if name in varying:
            cells += ["each seed", "less the first"] if paired else ["each seed"]
    return f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def _told(values: Sequence[float], share: bool) -> list[str]:
    if len(set(values)) == 1:
        return [f"{100 * values[0]:.2f}" if share else f"{values[0]:,.6g}", ""]
    scaled = [100 * value if share else value for value in values]
    digits = 2 if share else max(0, 3 - len(f"{abs(statistics.mean(scaled)):.0f}"))
    each = " ".join(f"{value:.{digits}f}" for value in scaled)
    return [f"{statistics.mean(scaled):.{digits}f} ± {statistics.stdev(scaled):.{digits}f}", each]


def check(lines: Sequence[str], seeds: Sequence[int], *, paired: bool) -> None:
    """Raises a UserError for a line or a seed that cannot be run, before any is."""
    # As `python -m experiments.NAME` has it.
    sys.path.insert(0, "")
    for line in lines:
        try:
            name, *flags = shlex.split(line) or [""]
        except ValueError as error:
            raise UserError(f"{line!r} is no command line: {error}.") from None
        try:
            module = importlib.import_module(f"experiments.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"experiments.{name}":
                raise
            experiments = [path.stem for path in Path("experiments").glob("[a-z]*.py")]
            if not experiments:
                raise UserError(
                    "there is no folder experiments here: run it in a checkout."
                ) from None
            raise unknown_name("experiment", name, experiments) from None
        for flag in ("--seed", "--run-dir", "--resume"):
            if any(word.partition("=")[0] == flag for word in flags):
                raise UserError(f"{line!r} has {flag}, which this script gives: leave it out.")
        with contextlib.suppress(SystemExit):
            cli.parse(module.Config, flags)
    if paired and len(set(seeds)) < 2:
        raise UserError("--paired compares over seeds: give two or more.")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds {seed}: give 0 to {2**32 - 1:,}.")
        if seeds.count(seed) > 1:
            raise UserError(f"--seeds: {seed} is given twice, and is one seed.")


def check_columns(lines: Sequence[str], columns: Sequence[str], seeds: Any, out: Path) -> None:
    """Raises a UserError for a column that some line's runs do not have, before any long run.

    Which scores a run has its experiment says. Where none of a line's runs is finished, and not all
    columns are known without, a smoke run of seconds tells.
    """
    for line in lines:
        name, *flags = shlex.split(line)
        config = importlib.import_module(f"experiments.{name}").Config
        known = OF_EVERY_RUN | (OF_CLASSIFIERS if issubclass(config, classifier.Config) else set())
        if set(columns) <= known:
            continue
        finished = [run_directory(line, seed, out) / "summary.json" for seed in seeds]
        path = next((each for each in finished if each.exists()), None)
        with tempfile.TemporaryDirectory() as directory:
            smoke = line if "--smoke" in flags else f"{line} --smoke"
            found = json.loads(read_text(path)) if path else run(smoke, seeds[0], Path(directory))
        for column in columns:
            scores([found], column)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "lines", nargs="+", help='an experiment and its flags, such as "mnist_lenet"'
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--columns",
        nargs="+",
        default=["accuracy", "parameters", "epochs", "seconds"],
        help="test scores, such as robust_accuracy, or numbers of summary.json",
    )
    parser.add_argument("--paired", action="store_true", help="compare each row with the first")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args(expand_flags())
    check(arguments.lines, arguments.seeds, paired=arguments.paired)
    check_columns(arguments.lines, arguments.columns, arguments.seeds, arguments.out)
    found: list[dict[str, list[float]]] = []
    for line in arguments.lines:
        summaries = [run(line, seed, arguments.out) for seed in arguments.seeds]
        found.append({name: scores(summaries, name) for name in arguments.columns})
    shares = [name for name in arguments.columns if is_share(name, found[0][name])]
    varying = [
        name for name in arguments.columns if any(len(set(each[name])) > 1 for each in found)
    ]
    print(titles(arguments.columns, shares, varying, paired=arguments.paired))
    first = found[0] if arguments.paired else None
    for line, columns in zip(arguments.lines, found, strict=True):
        print(row(line, columns, varying, first))


if __name__ == "__main__":
    with one_line_errors():
        main()
