"""What keeps a network that has few training images from overfitting: a table and a figure.

    python scripts/overfitting_study.py

1,000 images of MNIST, redrawn for each seed, 1,000 others to validate on, the whole test set; a
network of two convolutions and a dense layer of 128, trained for 60 epochs by Adam: as it is, with
each of nine remedies, and with all of them. Means and 95% intervals (Student's) over the seeds;
the difference to no remedy is taken within each seed, where images and initial values are the same.
About 50 runs of half a minute on 2 CPU cores. Finished runs under --out are not run again.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from seeds_table import check, half_interval, interval, run

from cnnjax.paths import expand_flags
from cnnjax.run.exits import one_line_errors

AUGMENT = "rotate:10,scale:0.1,translate:2,shear:10"
BASE = (
    "classify --model cnn_32_64_dense128_dropout --train-examples 1000 --validation 1000 "
    "--epochs 60 --batch-size 50 --learning-rate 0.001 --keep-last 1"
)
NO_DROPOUT = "--model-arguments dropout_rate=0.0"
# Usual values, none of them tuned on these data.
METHODS = {
    "none": NO_DROPOUT,
    "L1": f"{NO_DROPOUT} --l1 1e-5",
    "L2": f"{NO_DROPOUT} --l2 5e-4",
    "dropout": "--model-arguments dropout_rate=0.5",
    "augmentation": f"{NO_DROPOUT} --augment {AUGMENT}",
    "early stopping": f"{NO_DROPOUT} --patience 10",
    "mixup": f"{NO_DROPOUT} --augment mixup:0.4",
    "label smoothing": f"{NO_DROPOUT} --label-smoothing 0.1",
    "EMA": f"{NO_DROPOUT} --ema-decay 0.99",
    "all": (
        "--model-arguments dropout_rate=0.5 --l1 1e-5 --l2 5e-4 --patience 10 "
        f"--augment {AUGMENT},mixup:0.4 --label-smoothing 0.1 --ema-decay 0.99"
    ),
}


def table(summaries: dict[str, list[dict]]) -> str:
    """Returns the Markdown table of `method -> summary of each seed`, compared with the first."""
    first = next(iter(summaries))
    plain = [summary["test_accuracy"] for summary in summaries[first]]
    lines = [
        f"| method | test accuracy, % | errors fewer than with {first}, % | test loss |",
        "|---|---|---|---|",
    ]
    for method, each in summaries.items():
        accuracies = [summary["test_accuracy"] for summary in each]
        losses = [summary["test_loss"] for summary in each]
        fewer = [
            (own - other) / (1 - other) if other < 1 else math.nan
            for own, other in zip(accuracies, plain, strict=True)
        ]
        lines.append(
            f"| {method} | {interval(accuracies)} | {interval(fewer)} | "
            f"{statistics.mean(losses):.4f} ± {half_interval(losses):.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--flags", default="", help="flags for every run, such as '--epochs 5'")
    parser.add_argument("--out", type=Path, default=Path("runs/overfitting"))
    arguments = parser.parse_args(expand_flags())
    # What all others are compared with.
    methods = list(dict.fromkeys(["none", *arguments.methods]))
    lines = {name: f"{BASE} {METHODS[name]} {arguments.flags}".strip() for name in methods}
    check(list(lines.values()), arguments.seeds, paired=False)
    compare(lines, arguments.seeds, arguments.out, "overfitting")


def compare(lines: dict[str, str], seeds: list[int], out: Path, name: str) -> None:
    """Runs the line of each method with each seed, and compares all methods with the first.

    The table is printed, and written with its figure as NAME.md and NAME.png into `out`.
    """
    from cnnjax import plots

    summaries = {}
    for method, line in lines.items():
        summaries[method] = [run(line, seed, out) for seed in seeds]
        accuracies = [summary["test_accuracy"] for summary in summaries[method]]
        print(f"{method}: {interval(accuracies)}", file=sys.stderr)
    text = table(summaries)
    print(text)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    plots.attempt(lambda path: draw(summaries, path), out / f"{name}.png")


def draw(summaries: dict[str, list[dict]], path: Path) -> None:
    """Draws the test accuracy of each method, in the table's order."""
    from cnnjax import plots

    scores = [[100 * summary["test_accuracy"] for summary in each] for each in summaries.values()]
    plots.interval_chart(
        list(summaries),
        [statistics.mean(each) for each in scores],
        [half_interval(each) for each in scores],
        "test accuracy, %",
        path,
    )
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
