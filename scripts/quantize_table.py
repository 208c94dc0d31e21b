"""Makes the tables of docs/quantize.md: what schemes make of several runs of one network.

    python scripts/quantize_table.py runs/lenet-0 runs/lenet-1 --schemes "int8" "int4"

Each row is a scheme: the bytes of the parameters and statistics, packed as a run stores them, the
test accuracy as mean and standard deviation over the runs, and the change in points of each run.
Schemes that train (qat=true) are trained into a temporary directory.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import cnnjax
from cnnjax import compress
from cnnjax.run import again, load
from cnnjax.studies import quantized_runs

FLOAT = "float32"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--schemes", nargs="+", default=["int8"])
    arguments = parser.parse_args()
    cnnjax.devices.backend.start(devices=1)
    found: dict[str, list[tuple[int, float]]] = {}
    for run in arguments.runs:
        trained = load.load_classifier(run)
        dataset: Any = again.data_of_run(run)
        for text in arguments.schemes:
            scheme = dataclasses.replace(compress.read_scheme(text), report=0)
            images = quantized_runs.choose_images(dataset, scheme, 0, labeled=True)
            if not found.get(FLOAT) or len(found[FLOAT]) <= arguments.runs.index(run):
                found.setdefault(FLOAT, []).append(measured(trained, trained, images))
            result = quantized(run, trained, scheme, text, images)
            found.setdefault(text, []).append(measured(trained, result, images))
            print(run, text, found[text][-1], flush=True)
    print("\n| scheme | bytes | test accuracy, % | change of each run, points |\n|---|---|---|---|")
    for text, rows in found.items():
        print(row(text, rows, found[FLOAT]))


def quantized(run, trained, scheme, text, images):
    """Returns the quantized network, trained where the scheme says so."""
    if not scheme.qat:
        return quantized_runs.quantized_run(trained, scheme, images)
    with tempfile.TemporaryDirectory() as out:
        settings = quantized_runs.training_settings(
            again.settings_of_run(run), str(run), text, scheme, Path(out), devices=1
        )
        return quantized_runs.trained_run(trained, scheme, images, settings)


def measured(trained, network, images) -> tuple[int, float]:
    """Returns bytes and test accuracy."""
    with tempfile.TemporaryDirectory() as directory:
        size = quantized_runs.save(Path(directory), 0, network.variables, "")
    return size, quantized_runs.accuracy(
        network.model, network.variables, trained.normalize, images.test
    )


def row(text, rows, plain) -> str:
    """Returns a row of the table."""
    scores = [100 * score for _, score in rows]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    changes = " ".join(
        f"{100 * (score - before):+.2f}"
        for (_, score), (_, before) in zip(rows, plain, strict=True)
    )
    size = round(statistics.mean(size for size, _ in rows))
    changes = "" if text == FLOAT else changes
    return f"| `{text}` | {size:,} | {statistics.mean(scores):.2f}{spread} | {changes} |"


if __name__ == "__main__":
    main()
