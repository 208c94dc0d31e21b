"""Run experiments with several seeds and print their test scores as a Markdown table.

    python scripts/seeds_table.py mnist_lenet
    python scripts/seeds_table.py "mnist_lenet --epochs 5" "mnist_cnn" --seeds 0 1 2
    python scripts/seeds_table.py mnist_adversarial --columns robust_accuracy

Finished runs under --out are not run again, so the table can be completed in pieces.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from cnnjax.paths import expand_flags, read_text

# File systems allow 255 bytes.
MAX_NAME_LENGTH = 150


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
        subprocess.run(command, check=True, stdout=sys.stderr)
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


def row(line: str, summaries: list[dict], columns: Sequence[str] = ()) -> str:
    """Returns one line of the table: mean, spread and range of the test accuracy in percent."""
    first = summaries[0]
    seconds = statistics.mean(summary["seconds"] for summary in summaries)
    scores = " | ".join(
        _scores([summary[f"test_{name}"] for summary in summaries])
        for name in ("accuracy", *columns)
    )
    return (
        f"| `{line}` | {first['model']} | {first['parameters']:,} | {first['epochs']} | "
        f"{scores} | {seconds:.0f} |"
    )


def _scores(values: list[float]) -> str:
    scores = [100 * value for value in values]
    spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
    each = " ".join(f"{score:.2f}" for score in scores)
    return f"{statistics.mean(scores):.2f} ± {spread:.2f} | {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "lines", nargs="+", help='an experiment and its flags, such as "mnist_lenet"'
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--columns", nargs="+", default=[], help="further test scores, such as robust_accuracy"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args(expand_flags())
    rows = []
    for line in arguments.lines:
        summaries = [run(line, seed, arguments.out) for seed in arguments.seeds]
        rows.append(row(line, summaries, arguments.columns))
    titles = "".join(
        f" test {name.replace('_', ' ')}, % | each seed |"
        for name in ("accuracy", *arguments.columns)
    )
    print(f"| experiment | model | parameters | epochs |{titles} seconds |")
    print("|---|---|---|---|" + "---|---|" * (1 + len(arguments.columns)) + "---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
