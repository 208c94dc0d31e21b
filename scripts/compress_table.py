"""Makes the table of docs/compress.md: what each way to make a network smaller costs and brings.

    python scripts/compress_table.py                                      # LeNet-5 on MNIST
    python scripts/compress_table.py --networks lenet5 cnn_32_64 cifar_resnet20 \\
        --dataset tfds:fashion_mnist --seeds 0 1 2 3 4
    python scripts/compress_table.py --rows plain int8 combined --seeds 0

For each network and seed it trains a run, compresses it in every way, and exports each:
bytes of the parameters on disk, accuracy on all test images (mean and standard deviation over the
seeds, and the mean change), and the latency in ONNX Runtime and LiteRT with one thread. What is
finished under --out is not run again, so the table can be completed in pieces; the commands are
printed below it. `--times-again` times the files that are there once more, when the machine is
quiet, and keeps the least of each.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import expand_flags, read_text
from cnnjax.run.exits import one_line_errors

EXPERIMENTS = {
    "lenet5": "experiments.mnist_lenet",
    "cnn_32_64": "experiments.mnist_cnn",
    "cifar_resnet20": (
        # Of no arguments, and without flips, which digits do not bear.
        "experiments.fashion_mnist_resnet --augment crop:2 --model cifar_resnet20 --model-arguments"
    ),
}
# Small enough to be worth it: 5,258 parameters for the first two, 34,826 for the last.
STUDENTS = {
    "lenet5": "--model cnn_32_64 --model-arguments widths=(8,16)",
    "cnn_32_64": "--model cnn_32_64 --model-arguments widths=(8,16)",
    "cifar_resnet20": "--model cnn_32_64",
}
# What layers that lose channels keep a multiple of: runtimes take 8 at a time. LeNet-5 has six.
MULTIPLES = {"lenet5": 1, "cnn_32_64": 8, "cifar_resnet20": 8}
# Suffix of the file, and the images in each of its calls; None: 1 and 32.
RUNTIMES: dict[str, int | None] = {".onnx": None, ".tflite": 1}
# A file that is wrong answers otherwise for most; one of few bits does for some that are hard.
CHECKED, LEAST_AGREEMENT = 1000, 0.95
COMPRESS = "cnnjax compress --run {plain} --out {out}"
AGAIN = f"{COMPRESS} --epochs {{epochs}} --prune"
# Of each row the commands; {plain} is the trained run, {between} what the command before left.
ROWS = {
    "plain": ("{experiment}",),
    **{
        f"weights {sparsity:.0%} pruned": (f'{AGAIN} "magnitude(sparsity={sparsity})"',)
        for sparsity in (0.5, 0.8, 0.9, 0.95)
    },
    **{
        f"channels, {1 - macs:.0%} of the work": (
            f'{AGAIN} "channels(macs={macs}, multiple={{multiple}})"',
        )
        for macs in (0.5, 0.2)
    },
    "int8": (f'{COMPRESS} --quantize "int8(report=0)"',),
    "int8, trained": (f'{COMPRESS} --quantize "int8(qat=true, epochs=1, report=0)"',),
    "int4": (f'{COMPRESS} --quantize "int4(activations=8, report=0)"',),
    "distilled": (
        "experiments.distill --dataset {dataset} --teacher {plain} {student} --epochs {epochs}",
    ),
    "combined": (
        'cnnjax compress --run {plain} --out {between} --epochs {epochs} --prune "channels('
        'macs=0.5, multiple={multiple}), magnitude(sparsity=0.8)"',
        'cnnjax compress --run {between} --out {out} --quantize "int8(report=0)"',
    ),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of one run.

    Attributes:
      bytes: of its parameters and statistics on disk.
      accuracy: on all test images.
      latency: milliseconds by runtime and images in a call, such as `onnx 32`.
    """

    bytes: int
    accuracy: float
    latency: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["lenet5"])
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--epochs", type=int, default=12, help="of training, and of training again")
    parser.add_argument("--out", type=Path, default=Path("runs/compress"))
    parser.add_argument("--times-again", action="store_true", help="of the files that are there")
    arguments = parser.parse_args(expand_flags())
    for name in arguments.networks:
        if name not in EXPERIMENTS:
            raise unknown_name("network", name, EXPERIMENTS)
    for name in arguments.rows:
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    if arguments.epochs < 1:
        raise UserError(f"--epochs {arguments.epochs}: give 1 or more.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a file: name a folder.")
    tables = [
        table(network, found(network, arguments), arguments) for network in arguments.networks
    ]
    print("\n\n".join(tables))


def found(network: str, arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """Runs what is not finished; returns what is known by row, in the order of the seeds."""
    result: dict[str, list[Measured]] = {row: [] for row in ("plain", *arguments.rows)}
    for seed in arguments.seeds:
        for row in result:
            folder = arguments.out / f"{network}-{_word(arguments.dataset)}-{seed}"
            steps = commands(network, row, folder, seed, arguments)
            result[row].append(measured(folder, steps, times_again=arguments.times_again))
            print(network, seed, row, result[row][-1], file=sys.stderr, flush=True)
    return result


def commands(
    network: str, row: str, folder: Path, seed: int, arguments: argparse.Namespace
) -> list[tuple[Path, str]]:
    """Returns (run directory, command line) of each step of a row, without the interpreter."""
    out = folder / _word(row)
    steps = [Path(f"{out}-{number}") for number in range(1, len(ROWS[row]))] + [out]
    lines = []
    for number, (step, line) in enumerate(zip(steps, ROWS[row], strict=True)):
        line = line.format(
            experiment=f"{EXPERIMENTS[network]} --dataset {arguments.dataset} "
            f"--epochs {arguments.epochs}",
            dataset=arguments.dataset,
            plain=folder / "plain",
            between=steps[max(0, number - 1)],
            out=step,
            student=STUDENTS[network],
            multiple=MULTIPLES[network],
            epochs=arguments.epochs,
        )
        if line.startswith("experiments."):
            line += f" --run-dir {step}"
        lines.append((step, f"{line} --seed {seed}"))
    return lines


def measured(
    folder: Path, steps: Sequence[tuple[Path, str]], *, times_again: bool = False
) -> Measured:
    """Returns what is known of the last step's run, of which it is made first."""
    known = Path(f"{steps[-1][0]}.json")
    before = Measured(**json.loads(read_text(known))) if known.exists() else None
    if before and not times_again:
        return before
    folder.mkdir(parents=True, exist_ok=True)
    for directory, line in steps:
        marker = Path(f"{directory}.done")
        if not marker.exists():
            run(directory, line)
            marker.touch()
    result = measure(steps[-1][0], exported=before is not None)
    if before:
        least = {name: min(time, before.latency[name]) for name, time in result.latency.items()}
        result = dataclasses.replace(result, latency=least)
    known.write_text(json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def run(directory: Path, line: str) -> None:
    """Runs a command, or goes on with what it had begun."""
    program, *flags = shlex.split(line)
    arguments = [program] if program.startswith("experiments.") else ["cnnjax", flags.pop(0)]
    if any(directory.glob("*.json")):
        flags = ["--resume", str(directory)]
    called([*arguments, *flags])


def called(words: Sequence[str]) -> None:
    """Runs a module to its end; raises a UserError if it fails."""
    ended = subprocess.run([sys.executable, "-m", *words], check=False, stdout=sys.stderr)
    if ended.returncode:
        raise UserError(f"{shlex.join(words)} ended with code {ended.returncode}.")


def measure(directory: Path, *, exported: bool) -> Measured:
    """Tests a run on all test images, and times its files in their runtimes with one thread.

    The files are made first, but for those that are there of a run that was `exported` to its end:
    others may be parts.
    """
    import numpy as np

    from cnnjax import export
    from cnnjax.run import again, load
    from cnnjax.studies import compressing

    trained = load.load_classifier(directory)
    dataset: Any = again.data_of_run(directory)
    images, labels = dataset.test.image, np.asarray(dataset.test.label)
    forward = export.forward_of(trained.model, trained.normalize, integers=True)
    logits = export.comparison.logits_of(forward, trained.variables, images, step=500)
    latency: dict[str, float] = {}
    for name, batch in RUNTIMES.items():
        path = Path(f"{directory}{name}")
        if not (exported and path.exists()):
            flags = ["--run", str(directory), "--out", str(path), "--check", "0"]
            called(["cnnjax", "export", *flags])
        file = export.opened(path, name[1:], threads=1)
        result = export.compare(
            file, images[:CHECKED], logits[:CHECKED], limits={}, path=path, fixed=batch
        )
        latency |= {f"{name[1:]} {count}": time for count, time in result.latency.items()}
        if result.agreement < LEAST_AGREEMENT:
            raise UserError(f"{path} answers as the network for {result.agreement:.2%} of images.")
    return Measured(
        compressing.bytes_of(directory, trained.step),
        float((logits.argmax(-1) == labels).mean()),
        latency,
    )


def table(network: str, rows: dict[str, list[Measured]], arguments: argparse.Namespace) -> str:
    """Returns the table of one network, and the commands of its first seed."""
    count, columns = len(arguments.seeds), list(rows["plain"][0].latency)
    lines = [
        f"{network} on {arguments.dataset}, {count} seeds, {arguments.epochs} epochs:",
        "",
        "| row | bytes on disk | smaller | accuracy, % | change, points | "
        + " | ".join(f"{column}, ms" for column in columns)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(columns),
    ]
    plain = rows["plain"]
    for row, runs in rows.items():
        scores = [100 * each.accuracy for each in runs]
        spread = f" ± {statistics.stdev(scores):.2f}" if count > 1 else ""
        changes = [
            100 * (each.accuracy - one.accuracy) for each, one in zip(runs, plain, strict=True)
        ]
        size = statistics.mean(each.bytes for each in runs)
        ratio = statistics.mean(one.bytes for one in plain) / size
        times = [statistics.median(each.latency[column] for each in runs) for column in columns]
        change = "" if row == "plain" else f"{statistics.mean(changes):+.2f}"
        lines.append(
            f"| {row} | {size:,.0f} | {ratio:.1f} | {statistics.mean(scores):.2f}{spread} | "
            f"{change} | " + " | ".join(f"{time:.3g}" for time in times) + " |"
        )
    folder = arguments.out / f"{network}-{_word(arguments.dataset)}-{arguments.seeds[0]}"
    said = [
        line
        for row in rows
        for _, line in commands(network, row, folder, arguments.seeds[0], arguments)
    ]
    return "\n".join([*lines, "", *(f"    {_typed(line)}" for line in said)])


def _typed(line: str) -> str:
    return f"python -m {line}" if line.startswith("experiments.") else line


def _word(text: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in text).strip("_")


if __name__ == "__main__":
    with one_line_errors():
        main()
