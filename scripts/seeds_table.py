"""Run experiments with several seeds and print their test scores as a Markdown table.

    python scripts/seeds_table.py mnist_lenet
    python scripts/seeds_table.py "mnist_lenet --epochs 5" "mnist_cnn" --seeds 0 1 2

Finished runs under --out are not run again, so the table can be completed in pieces.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path


def run(line: str, seed: int, out: Path) -> dict:
    """Runs one experiment line with one seed, unless it is finished; returns its summary."""
    experiment, *flags = shlex.split(line)
    name = re.sub(r"[^\w.-]+", "_", f"{line}-seed{seed}")
    directory = out / name
    if not (directory / "summary.json").exists():
        command = [sys.executable, "-m", f"experiments.{experiment}"]
        if (directory / "config.json").exists():
            command += ["--resume", str(directory)]
        else:
            command += [*flags, "--seed", str(seed), "--run-dir", str(directory)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((directory / "summary.json").read_text())


def row(line: str, summaries: list[dict]) -> str:
    """Returns one line of the table: mean, spread and range of the test accuracy in percent."""
    scores = [100 * summary["test_accuracy"] for summary in summaries]
    spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
    first = summaries[0]
    seconds = statistics.mean(summary["seconds"] for summary in summaries)
    each = " ".join(f"{score:.2f}" for score in scores)
    return (
        f"| `{line}` | {first['model']} | {first['parameters']:,} | {first['epochs']} | "
        f"{statistics.mean(scores):.2f} ± {spread:.2f} | {each} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "lines", nargs="+", help='an experiment and its flags, such as "mnist_lenet"'
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args()
    rows = []
    for line in arguments.lines:
        summaries = [run(line, seed, arguments.out) for seed in arguments.seeds]
        rows.append(row(line, summaries))
    print("| experiment | model | parameters | epochs | test accuracy, % | each seed | seconds |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
