"""Compares input pipelines on a folder of JPEG files: decode, random resized crop, mirror.

    python benchmarks/input_peers.py
    python benchmarks/input_peers.py --contenders cnnjax torch-pil --epochs 50 --model ""
    python benchmarks/input_peers.py --smoke

Photographs of 500x375 pixels are written to a temporary folder. Each contender is a process of its
own, with one worker per core, which is stopped while another one is measured; they take turns, an
epoch each. Two tables: images/s per core and per second of CPU time, which other work on the
machine disturbs less, with the memory (proportional set size of the process and its workers) at its
highest in the first epoch and in the last; and a training step that is fed by each: what fraction
of the time it waits, and how much slower it is than without any input.

Contenders that filter against aliasing when they shrink, as Pillow and PyTorch do, are compared
with `cnnjax`, the others with `cnnjax-plain`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from input_contenders import PIPELINES
from peer_processes import StoppedProcess, WorkerError, machine

HEIGHT, WIDTH = 375, 500
SAMPLE_SECS = 0.2
STEP_CONTENDERS = ("cnnjax", "cnnjax-plain", "torch-pil", "tf.data", "grain")
BASE = {True: "cnnjax", False: "cnnjax-plain"}


@dataclasses.dataclass
class Row:
    """What was measured of one contender; a number per round, or why there is none."""

    contender: str
    rates: list[float] = dataclasses.field(default_factory=list)
    cpu_rates: list[float] = dataclasses.field(default_factory=list)
    peak_mib: list[float] = dataclasses.field(default_factory=list)
    waiting: list[float] = dataclasses.field(default_factory=list)
    slower: list[float] = dataclasses.field(default_factory=list)
    step_ms: list[float] = dataclasses.field(default_factory=list)
    trouble: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    cores = machine("cpu")["cores"]
    with tempfile.TemporaryDirectory() as folder:
        files = write_photos(Path(folder), options.images)
        mean_kb = sum(map(os.path.getsize, files)) / len(files) / 1e3
        print(f"{machine('cpu')['processor']}; {len(files)} JPEG files of {mean_kb:.0f} kB,")
        print(f"{WIDTH}x{HEIGHT} to {options.image_size}x{options.image_size}\n", flush=True)
        feed = {"files": files, "size": options.image_size, "cores": cores}
        drained = measure(options.contenders, feed, options, step=False)
        print(rate_table(drained, cores), flush=True)
        trained = []
        if options.model:
            names = [name for name in options.contenders if name in STEP_CONTENDERS]
            trained = measure(names, feed, options, step=True)
            print(f"\n{options.model}, batch {options.step_batch_size}\n\n{step_table(trained)}")
    if options.json:
        rows = {"drained": drained, "trained": trained}
        found = {key: [dataclasses.asdict(row) for row in each] for key, each in rows.items()}
        Path(options.json).write_text(json.dumps(found | {"machine": machine("cpu")}, indent=1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--contenders", nargs="+", default=list(PIPELINES), choices=list(PIPELINES))
    add("--images", type=int, default=2048, help="files in the folder, an epoch (default 2048)")
    add("--image-size", type=int, default=224, help="default 224")
    add("--batch-size", type=int, default=64, help="default 64")
    add("--epochs", type=int, default=10, help="turns of each contender (default 10)")
    add("--model", default="resnet18", help="what is fed; '' leaves this out (default resnet18)")
    add("--step-batch-size", type=int, default=16, help="of the training step (default 16)")
    add("--steps", type=int, default=8, help="steps in a turn (default 8)")
    add("--step-rounds", type=int, default=3, help="turns of each (default 3)")
    add("--patience", type=float, default=300.0, help="seconds to wait for an answer")
    add("--json", help="file for every number")
    add("--smoke", action="store_true", help="a few small images, seconds in all")
    options = parser.parse_args(argv)
    if options.smoke:
        options.images, options.image_size, options.batch_size, options.epochs = 32, 32, 8, 2
        options.model = options.model and "cifar_resnet20"
        options.step_batch_size, options.steps, options.step_rounds = 4, 2, 1
    return options


def write_photos(folder: Path, count: int) -> list[str]:
    """Writes JPEG files: parts of scikit-learn's two photographs, resized, with the noise of a
    camera."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(image) for image in load_sample_images().images]
    generator = np.random.default_rng(0)
    files = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = generator.uniform(0.6, 1.0)
        width, height = share * photo.width, share * photo.height
        left = generator.uniform(0, photo.width - width)
        top = generator.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        image = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        noisy = np.asarray(image) + generator.normal(0.0, 4.0, (HEIGHT, WIDTH, 3))
        files.append(str(folder / f"{number:06}.jpg"))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def measure(
    names: Sequence[str], feed: dict[str, Any], options: argparse.Namespace, *, step: bool
) -> list[Row]:
    """Measures all contenders in turns."""
    rows = {name: Row(name) for name in names}
    batch_size = options.step_batch_size if step else options.batch_size
    with contextlib.ExitStack() as stack:
        workers: dict[str, StoppedProcess] = {}
        for name in names:
            spec = {
                "contender": name,
                "feed": feed | {"batch_size": batch_size},
                "model": options.model if step else "",
            }
            worker = StoppedProcess("input_contenders.py", spec, "cpu", options.patience)
            stack.enter_context(worker)
            try:
                worker.ready()
                workers[name] = worker
            except WorkerError as error:
                rows[name].trouble = str(error)[:100]
        for _ in range(options.step_rounds if step else options.epochs):
            for name, worker in list(workers.items()):
                try:
                    turn(worker, rows[name], options, step=step)
                except WorkerError as error:
                    rows[name].trouble = str(error)
                    del workers[name]
    return list(rows.values())


def turn(worker: StoppedProcess, row: Row, options: argparse.Namespace, *, step: bool) -> None:
    """Lets one contender work for one round."""
    if step:
        answer = worker.ask({"steps": options.steps})
        row.waiting.append(answer["waited_secs"] / answer["fed_secs"])
        row.slower.append(answer["fed_secs"] / answer["alone_secs"])
        row.step_ms.append(1e3 * answer["fed_secs"] / options.steps)
        return
    peaks: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while True:
            peaks.append(group_mib(worker.pid))
            if ended.wait(SAMPLE_SECS):
                return

    before = group_cpu_secs(worker.pid)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        answer = worker.ask({"images": options.images})
    finally:
        ended.set()
        watcher.join()
    row.rates.append(answer["images"] / answer["wall_secs"])
    row.cpu_rates.append(answer["images"] / (group_cpu_secs(worker.pid) - before))
    row.peak_mib.append(max(peaks))


def of_group(group: int, file: str) -> Iterator[str]:
    """Yields the text of a file in /proc for each process of a group."""
    for name in os.listdir("/proc"):
        # OSError: it ended meanwhile.
        with contextlib.suppress(OSError):
            if name.isdigit() and os.getpgid(int(name)) == group:
                yield Path("/proc", name, file).read_text()


def group_mib(group: int) -> float:
    """Returns the memory of a process group in MiB, shared pages divided among those that share."""
    lines = [line for text in of_group(group, "smaps_rollup") for line in text.splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def group_cpu_secs(group: int) -> float:
    """Returns the CPU time that a process group has used, in user and system mode."""
    # The name of the program, in parentheses, may hold spaces.
    fields = [text.rpartition(")")[2].split() for text in of_group(group, "stat")]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def rate_table(rows: Sequence[Row], cores: int) -> str:
    """Returns medians; ratios are medians of the rounds' own."""
    lines = [
        "| contender | filtered | images/s per core | cnnjax / it | images per CPU second "
        "| cnnjax / it | MiB, first epoch | last |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    by_name = {row.contender: row for row in rows}
    for row in rows:
        pipeline = PIPELINES[row.contender]
        head = f"| {pipeline.meaning} | {'yes' if pipeline.is_filtered else 'no'} | "
        if not row.rates:
            lines.append(head + f"{row.trouble} | | | | | |")
            continue
        base = by_name.get(BASE[pipeline.is_filtered]) or row
        cells = []
        for ours, theirs, share in (
            (base.rates, row.rates, cores),
            (base.cpu_rates, row.cpu_rates, 1),
        ):
            pairs = zip(ours, theirs, strict=False)
            ratios = [mine / other for mine, other in pairs] if base is not row else []
            cells.append(f"{statistics.median(theirs) / share:,.0f}")
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        cells += [f"{row.peak_mib[0]:,.0f}", f"{row.peak_mib[-1]:,.0f}"]
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def step_table(rows: Sequence[Row]) -> str:
    """Returns the medians of what feeding a step costs."""
    lines = [
        "| fed by | ms per step | waiting for input | time / time without input |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        if not row.waiting:
            lines.append(f"| {PIPELINES[row.contender].meaning} | {row.trouble} | | |")
            continue
        step_ms, waiting, slower = map(statistics.median, (row.step_ms, row.waiting, row.slower))
        cells = f"{step_ms:,.0f} | {waiting:.1%} | {slower:.2f}"
        lines.append(f"| {PIPELINES[row.contender].meaning} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
