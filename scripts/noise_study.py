"""What wrong labels and noisy pixels cost, and what ranking, cleaning and filtering recover.

    python scripts/noise_study.py

Labels: LeNet-5 on MNIST with 20% of the training labels made wrong, trained for 20 epochs without
any regularization, learns many of them by heart. A run of 3 epochs ranks the training images; those
that it would label otherwise are left out, and the long training is repeated. Validation and test
labels are right throughout.

Pixels: LeNet-5 trained on MNIST as it is, tested on images of which a fraction of the pixels was
made black or white, with and without a median filter of 3x3 before it.

Tables with means and 95% intervals (Student's) over the seeds. Finished runs under --out are not
run again.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from seeds_table import interval, run, run_directory

from cnnjax.paths import expand_flags, read_text

LONG = "classify --model lenet5 --epochs 20 --keep-last 1"
SHORT = "classify --model lenet5 --epochs 3 --keep-last 1"
SCORES = ("loss", "margin", "el2n")
PIXEL_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)


def labels_study(share: float, seeds: Sequence[int], out: Path, flags: str) -> str:
    """Trains on right, wrong and cleaned labels; returns two Markdown tables."""
    accuracies: dict[str, list[float]] = {"right": [], "wrong": [], "cleaned": []}
    found: dict[str, list[dict]] = {score: [] for score in SCORES}
    noise = f"--label-noise {share}"
    for seed in seeds:
        long, short = f"{LONG} {flags}".strip(), f"{SHORT} {noise} {flags}".strip()
        accuracies["right"].append(run(long, seed, out)["test_accuracy"])
        accuracies["wrong"].append(run(f"{long} {noise}", seed, out)["test_accuracy"])
        run(short, seed, out)
        ranked = run_directory(short, seed, out)
        for score in SCORES:
            found[score].append(inspect(ranked, score))
        # A copy of its own for the seed, because the line names the run.
        exclude = ranked / "labels-loss" / "exclude.txt"
        line = f"{long} {noise} --exclude {exclude}"
        accuracies["cleaned"].append(run(line, seed, out)["test_accuracy"])
    recovered = [
        (cleaned - wrong) / (right - wrong) if right != wrong else math.nan
        for right, wrong, cleaned in zip(*accuracies.values(), strict=True)
    ]
    lines = ["| training labels | test accuracy, % |", "|---|---|"]
    lines += [f"| {name} | {interval(values)} |" for name, values in accuracies.items()]
    lines += ["", f"Cleaning recovers {interval(recovered)} % of what was lost.", ""]
    lines += [
        "| ranking by | wrong ones found at 90% precision, % | average precision, % | "
        "of those left out wrong, % | of the wrong left out, % |",
        "|---|---|---|---|---|",
    ]
    keys = ("recall", "average_precision", "precision_of_excluded", "recall_of_excluded")
    for score, results in found.items():
        cells = " | ".join(interval([result[key] for result in results]) for key in keys)
        lines.append(f"| {score} | {cells} |")
    return "\n".join(lines)


def inspect(directory: Path, score: str) -> dict:
    """Ranks the training images of a run, unless that is done; returns how well."""
    out = directory / f"labels-{score}"
    if not (out / "detection.json").exists():
        command("inspect-labels", "--run", directory, "--score", score, "--out", out)
    return json.loads(read_text(out / "detection.json"))


def pixels_study(shares: Sequence[float], seeds: Sequence[int], out: Path, flags: str) -> str:
    """Tests networks trained on clean images on noisy ones; returns a Markdown table."""
    lines = ["| pixels made black or white, % | test accuracy, % | after a median of 3x3, % |"]
    lines.append("|---|---|---|")
    long = f"{LONG} {flags}".strip()
    for share in shares:
        cells = []
        for preprocess in ("", "median:3"):
            values = []
            for seed in seeds:
                run(long, seed, out)
                values.append(noisy_accuracy(run_directory(long, seed, out), share, preprocess))
            cells.append(interval(values))
        lines.append(f"| {100 * share:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def noisy_accuracy(directory: Path, share: float, preprocess: str) -> float:
    """Tests a run on noisy images, unless that is done; returns the accuracy."""
    out = directory / f"noise-{share:g}{preprocess.replace(':', '')}"
    if not (out / "evaluation.json").exists():
        noise = ["--corrupt", f"salt_and_pepper:{share}"] if share else []
        filtering = ["--preprocess", preprocess] if preprocess else []
        command("evaluate", "--run", directory, "--out", out, *noise, *filtering)
    return json.loads(read_text(out / "evaluation.json"))["accuracy"]


def command(name: str, *arguments: object) -> None:
    line = [sys.executable, "-m", "cnnjax", name, *map(str, arguments)]
    subprocess.run(line, check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--share", type=float, default=0.2, help="fraction of labels made wrong")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=PIXEL_SHARES, help="fractions of noisy pixels"
    )
    parser.add_argument("--flags", default="", help="flags for every run, such as '--smoke'")
    parser.add_argument("--out", type=Path, default=Path("runs/noise"))
    arguments = parser.parse_args(expand_flags())
    labels = labels_study(arguments.share, arguments.seeds, arguments.out, arguments.flags)
    pixels = pixels_study(arguments.shares, arguments.seeds, arguments.out, arguments.flags)
    text = f"{labels}\n\n{pixels}\n"
    print(text)
    (arguments.out / "tables.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
