"""How speed, start, evaluation and memory grow: with batch, depth, devices, processes and images.

    python benchmarks/scaling.py --json scaling.json --figure scaling.png
    python benchmarks/scaling.py --series batch depth --rounds 5
    python benchmarks/scaling.py --smoke

Every point is a process of its own (several, where processes are counted), on synthetic images.
What grows with the number of images is also given as an exponent: 1 is proportional to it.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peer_processes import HERE, environment, machine

DEPTHS = (20, 32, 44, 56, 110)
DIGITS, COLORS = [28, 28, 1], [32, 32, 3]
NETWORKS = {"lenet5": DIGITS, "cifar_resnet20": COLORS}


class Measured(NamedTuple):
    """A point of a series: its place on the axis, and what its worker answered."""

    series: str
    line: str
    x: int
    found: dict[str, Any]


class Series(NamedTuple):
    """One variable that is changed: what a table calls it, and the points: (line, x, settings)."""

    title: str
    column: str
    points: list[tuple[str, int, dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    facts = machine("cpu")
    print(f"{facts['processor']}\n", flush=True)
    measured: list[Measured] = []
    for name, series in all_series(smoke=options.smoke).items():
        if name not in options.series:
            continue
        for line, x, settings in series.points:
            found = run(settings, options)
            measured.append(Measured(name, line, x, found))
            print(
                f"{series.title}, {line}, {x:,}: {found.get('failed') or brief(found)}", flush=True
            )
        print(
            f"\n{table(series, [each for each in measured if each.series == name])}\n", flush=True
        )
        # After each series: a run that is stopped leaves the others.
        if options.json:
            points = [each._asdict() for each in measured]
            content = {"machine": facts, "points": points}
            Path(options.json).write_text(json.dumps(content, indent=1))
        if options.figure:
            draw(measured, Path(options.figure), facts["processor"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = list(all_series(smoke=False))
    add("--series", nargs="+", default=names, choices=names, help="default: all")
    add("--rounds", type=int, default=3, help="measurements of each point (default 3)")
    add("--seconds", type=float, default=1.0, help="length of a measurement (default 1)")
    add("--patience", type=float, default=600.0, help="seconds to wait for a point (default 600)")
    add("--json", help="file for every number")
    add("--figure", help="file for the picture, such as scaling.png")
    add("--smoke", action="store_true", help="two small points a series")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rounds, options.seconds = 1, 0.05
    return options


def all_series(*, smoke: bool) -> dict[str, Series]:
    """Returns the series by name; with `smoke` the first two points of each."""

    def point(model: str, **settings: Any) -> dict[str, Any]:
        defaults = {"batch_size": 64, "devices": 0, "num_images": 4000, "processes": 1}
        return {"model": model, "image_shape": NETWORKS.get(model, COLORS)} | defaults | settings

    series = {
        "batch": Series(
            "batch size",
            "batch",
            [
                (model, size, point(model, batch_size=size))
                for model, sizes in (
                    ("lenet5", (16, 32, 64, 128, 256, 512, 1024)),
                    ("cifar_resnet20", (16, 32, 64, 128, 256)),
                )
                for size in sizes
            ],
        ),
        "depth": Series(
            "depth",
            "layers",
            [
                ("cifar_resnet", depth, point(f"cifar_resnet{depth}", num_images=1000))
                for depth in DEPTHS
            ],
        ),
        "devices": Series(
            "devices of one process",
            "devices",
            [
                (f"{model}, batch {size}", count, point(model, batch_size=size, devices=count))
                for model, size in (("lenet5", 256), ("cifar_resnet20", 64))
                for count in (1, 2, 4, 8)
            ],
        ),
        "processes": Series(
            "processes of one device",
            "processes",
            [
                (
                    f"{model}, batch {size}",
                    count,
                    point(model, batch_size=size, devices=count, processes=count),
                )
                for model, size in (("lenet5", 256), ("cifar_resnet20", 64))
                for count in (1, 2, 4)
            ],
        ),
        "images": Series(
            "images",
            "images",
            [
                ("lenet5", count, point("lenet5", num_images=count))
                for count in (10_000, 30_000, 100_000, 300_000, 1_000_000)
            ],
        ),
    }
    if smoke:
        return {name: each._replace(points=small(each.points)) for name, each in series.items()}
    return series


def small(points: list[tuple[str, int, dict[str, Any]]]) -> list[tuple[str, int, dict[str, Any]]]:
    """Returns two points of few images."""
    return [
        (line, x, settings | {"num_images": 300 * number})
        for number, (line, x, settings) in enumerate(points[:2], 1)
    ]


def run(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measures one point; returns what process 0 says, or `{"failed": reason}`."""
    count = settings["processes"]
    spec = {name: value for name, value in settings.items() if name != "processes"}
    spec |= {"seconds": options.seconds, "rounds": options.rounds}
    if count > 1:
        spec |= {"coordinator": f"localhost:{free_port()}", "num_processes": count}
    workers = []
    for index in range(count):
        own = spec | ({"process_id": index} if count > 1 else {})
        workers.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "scaling_worker.py"), json.dumps(own)],
                stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment("cpu"),
            )
        )
    try:
        text, _ = workers[0].communicate(timeout=options.patience)
        return json.loads(text) if text else {"failed": f"exit status {workers[0].returncode}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {options.patience:g} s (see --patience)"}
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def brief(found: dict[str, Any]) -> str:
    return f"{found['images_per_sec']:,.0f} images/s, start {found['start_secs']:.1f} s"


def table(series: Series, measured: Sequence[Measured]) -> str:
    """Returns the Markdown table of one series."""
    is_data = series.column == "images"
    columns = ["images/s", "ms per step"]
    if is_data:
        columns = ["data, s", "compile, s", "evaluation, s", "data, MiB", "peak, MiB", "images/s"]
    lines = [
        f"| network | {series.column} | {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) + 1)}",
    ]
    for _, line, x, found in measured:
        if "failed" in found:
            lines.append(f"| {line} | {x:,} | {found['failed']} |" + " |" * (len(columns) - 1))
            continue
        batch_size = next(each["batch_size"] for a, b, each in series.points if (a, b) == (line, x))
        rate = found["images_per_sec"]
        cells = [f"{rate:,.0f}", f"{1e3 * batch_size / rate:,.2f}"]
        if is_data:
            seconds = [found["data_secs"], found["compile_secs"], found["eval_secs"]]
            cells = [f"{value:,.2f}" for value in seconds]
            cells += [f"{found['data_mib']:,.0f}", f"{found['peak_mib']:,.0f}", f"{rate:,.0f}"]
        lines.append(f"| {line} | {x:,} | {' | '.join(cells)} |")
    good = [each for each in measured if "failed" not in each.found]
    if is_data and len(good) > 1:
        powers = {
            name: exponent(good[-2:], value)
            for name, value in (
                ("data", lambda found: found["data_secs"]),
                ("evaluation", lambda found: found["eval_secs"]),
                ("memory", lambda found: found["peak_mib"]),
            )
        }
        text = ", ".join(f"{name} {power:.2f}" for name, power in powers.items())
        lines.append(f"\nexponents between the last two: {text}")
    return "\n".join(lines)


def exponent(points: Sequence[Measured], value: Callable[[dict[str, Any]], float]) -> float:
    """The power of x with which a value grows from the first point to the last."""
    first, last = points[0], points[-1]
    return math.log(value(last.found) / value(first.found)) / math.log(last.x / first.x)


def draw(measured: Sequence[Measured], path: Path, title: str) -> None:
    """Draws one panel for each series, two for the images; logarithmic axes."""
    from matplotlib.figure import Figure

    speed = {"": lambda found: found["images_per_sec"]}
    unit = "images per second"
    panels: list[tuple[str, str, str, dict[str, Callable[[dict[str, Any]], float]]]] = [
        ("batch", "batch size", unit, speed),
        ("depth", "layers, batch 64", unit, speed),
        ("devices", "host devices of one process", unit, speed),
        ("processes", "processes of one device", unit, speed),
        (
            "images",
            "images",
            "seconds",
            {
                "dataset and pipeline": lambda found: found["data_secs"],
                "start, with compiling": lambda found: found["start_secs"],
                "evaluation of a tenth": lambda found: found["eval_secs"],
            },
        ),
        (
            "images",
            "images",
            "MiB",
            {
                "the images": lambda found: found["data_mib"],
                "peak of the process": lambda found: found["peak_mib"],
            },
        ),
    ]
    there = {each.series for each in measured if "failed" not in each.found}
    panels = [panel for panel in panels if panel[0] in there]
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    canvas = Figure(figsize=(4.2 * columns, 3.3 * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (series, xlabel, ylabel, values) in zip(axes, panels, strict=False):
        draw_panel(axis, [each for each in measured if each.series == series], values)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
    canvas.suptitle(title, fontsize=9)
    canvas.savefig(path, dpi=130)


def draw_panel(
    axis: Any,
    measured: Sequence[Measured],
    values: dict[str, Callable[[dict[str, Any]], float]],
) -> None:
    """Draws the lines of a series; places and heights are logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    good = [each for each in measured if "failed" not in each.found]
    for line in dict.fromkeys(each.line for each in good):
        points = [each for each in good if each.line == line]
        for name, value in values.items():
            heights = [value(each.found) for each in points]
            axis.plot([each.x for each in points], heights, "o-", markersize=4, label=name or line)
    axis.set_xscale("log")
    axis.set_yscale("log")
    places = sorted({each.x for each in good})
    axis.set_xticks(places)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", color="0.9")
    axis.margins(y=0.3)  # Room for the legend.
    axis.legend(fontsize=8)


def short(value: float) -> str:
    """Writes 30,000 as 30k and 1,000,000 as 1M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


if __name__ == "__main__":
    main()
