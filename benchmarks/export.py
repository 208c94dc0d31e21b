"""ONNX files of ours and of PyTorch's exporter, from the same weights, in ONNX Runtime.

    python benchmarks/export.py
    python benchmarks/export.py --networks resnet18 --threads 1 --batches 1 --rounds 30
    python benchmarks/export.py --smoke

torchvision's networks with random weights are exported by torch.onnx.export, and, converted, by
cnnjax.export; both files take float32 [batch, channels, height, width] of any batch and are run by
the same ONNX Runtime on the same images. The files take turns, a call each, so that whatever else
the machine does falls on both; told are the medians of their calls, the median over rounds of the
ratio of two neighbors with the middle half of the rounds, and the ratio of the medians of CPU time,
which a busy machine disturbs less. Logits are compared first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peer_processes import machine
from peer_torch import torchvision_model

from cnnjax import convert, export, models
from cnnjax.convert.parity import relative_error
from cnnjax.errors import UserError, unknown_name
from cnnjax.export import onnx_model
from cnnjax.run.exits import one_line_errors

NETWORKS = ("resnet18", "mobilenet_v2", "efficientnet_b0")
CLASSES, SIDE = 1000, 224
SMOKE = {"networks": ["mobilenet_v2"], "threads": [1], "batches": [1], "rounds": 3, "side": 64}


def write_torch(network: Any, path: Path, side: int) -> str:
    """Writes PyTorch's file; returns which of its exporters did it."""
    import torch

    example = torch.zeros(2, 3, side, side)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            batch = {0: torch.export.Dim("batch")}
            torch.onnx.export(
                network, (example,), path, dynamic_shapes=(batch,), dynamo=True, **names
            )
            return "torch.onnx.export(dynamo=True)"
        except ImportError:  # Its package onnxscript is not installed.
            axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(network, (example,), path, dynamic_axes=axes, dynamo=False, **names)
            return "torch.onnx.export(dynamo=False)"


def write_ours(network: Any, name: str, path: Path, side: int) -> None:
    """Writes our file of the same weights."""
    arrays = {key: value.numpy() for key, value in network.state_dict().items()}
    model = models.create(name, num_classes=CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm's counters are no weights.
        variables = convert.to_cnnjax(arrays, model, (side, side, 3), framework="torchvision")
    signature = export.Signature((side, side, 3))
    onnx_model.write(path, export.forward_of(model), variables, signature, channels_first=True)


def opened(path: Path, threads: int) -> Any:
    """Returns a function of images in a session of its own."""
    return export.opened(path, "onnx", threads=threads)


def by_turns(runs: Sequence[Any], image: np.ndarray, rounds: int) -> np.ndarray:
    """Returns wall and CPU seconds of each call, `[rounds, files, 2]`; the first alternates."""
    for run in runs:
        run(image)
        run(image)
    times = np.zeros((rounds, len(runs), 2))
    for number in range(rounds):
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for which in order:
            start = time.perf_counter(), time.process_time()
            runs[which](image)
            end = time.perf_counter(), time.process_time()
            times[number, which] = np.subtract(end, start)
    return times


def row(name: str, batch: int, threads: int, times: np.ndarray) -> dict[str, Any]:
    """Returns what is told of one network, batch and number of threads."""
    wall, busy = times[..., 0], times[..., 1]
    low, middle, high = np.percentile(wall[:, 0] / wall[:, 1], (25, 50, 75))
    ours, torch = np.median(wall, axis=0) * 1e3
    return {
        "network": name,
        "batch": batch,
        "threads": threads,
        "ours_ms": ours,
        "torch_ms": torch,
        "ratio": middle,
        "ratio_middle_half": [low, high],
        "ratio_of_cpu": float(np.median(busy[:, 0]) / np.median(busy[:, 1])),
    }


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Exports a network by both, compares the logits, and times them."""
    import torch

    torch.manual_seed(0)
    network = torchvision_model(name, CLASSES).eval()
    paths = [folder / f"{name}.ours.onnx", folder / f"{name}.torch.onnx"]
    write_ours(network, name, paths[0], arguments.side)
    exporter = write_torch(network, paths[1], arguments.side)
    shape = (max(arguments.batches), 3, arguments.side, arguments.side)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = [opened(path, threads=1)(image[:2]) for path in paths]
    error = relative_error(*found)
    # PyTorch's exporter keeps the weights in a file beside.
    sizes = [sum(part.stat().st_size for part in folder.glob(f"{p.name}*")) for p in paths]
    print(f"{name}: logits differ by {error:.1e} (relative), {exporter}")
    print(f"{name}: {sizes[0]:,} and {sizes[1]:,} bytes", flush=True)
    if error > 1e-4:
        raise UserError(f"the two files of {name} do not compute the same: {error:.1e}.")
    rows = []
    for threads in arguments.threads:
        runs = [opened(path, threads) for path in paths]
        for batch in arguments.batches:
            rounds = arguments.rounds if batch == 1 else max(3, arguments.rounds // 5)
            rows.append(row(name, batch, threads, by_turns(runs, image[:batch], rounds)))
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    low, high = row["ratio_middle_half"]
    return (
        f"| {row['network']} | {row['batch']} | {row['threads']} | {row['ours_ms']:.1f} | "
        f"{row['torch_ms']:.1f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) | "
        f"{row['ratio_of_cpu']:.2f} |"
    )


HEAD = (
    "| network | batch | threads | ours, ms | PyTorch's, ms | ratio (middle half) | CPU "
    "time |\n|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=50, help="at batch 1; a fifth of it above")
    parser.add_argument("--side", type=int, default=SIDE, help="of the images")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="seconds; figures of no use")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    for name in arguments.networks:
        if name not in models.MODELS:
            raise unknown_name("network", name, models.MODELS)
    for name in ("threads", "batches"):
        if min(getattr(arguments, name)) < 1:
            raise UserError(f"--{name}: give numbers from 1 on.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.networks:
            rows += measure(name, arguments, Path(folder))
    print(HEAD)
    print("\n".join(map(line, rows)))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    with one_line_errors():
        main()
