"""A population by every way of computing it, side by side in one run.

    python benchmarks/population.py
    python benchmarks/population.py --experiment experiments.digits_mlp --members 32
    python benchmarks/population.py --smoke

Each way has processes of its own that have compiled and wait; in each round all take turns at the
same number of training steps of the same members. Times are medians over rounds, per step of one
member; compilation is apart. The ways:

* turn: `cnnjax population --way loop`, a device a core; members in turn on each.
* vmap, unrolled: likewise with these ways; `one` has all cores in one device.
* runs: one process, one compiled step over all cores, whole runs one after another.
* processes: a process a core, each with its share of the members, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.run.exits import one_line_errors

# name -> (way, whether each core is a device, whether each is a process).
WAYS = {
    "turn": ("loop", True, False),
    "vmap": ("vmap", True, False),
    "vmap one": ("vmap", False, False),
    "unrolled": ("unrolled", True, False),
    "unrolled one": ("unrolled", False, False),
    "runs": ("runs", True, False),
    "processes": ("loop", False, True),
}


class Worker:
    """A process that computes one way, or a share of it, when it is asked to."""

    def __init__(self, task: dict[str, Any], core: int | None):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
        prefix = [] if core is None else ["taskset", "-c", str(core)]
        self._process = subprocess.Popen(
            [*prefix, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> Any:
        """Waits for a line of it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError("a way of the benchmark failed: see above.")
        return json.loads(line)

    def ask(self) -> None:
        """Has it make the steps once more."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def start(name: str, options: argparse.Namespace, cores: Sequence[int]) -> list[Worker]:
    """Starts the processes of a way."""
    way, divides, apart = WAYS[name]
    count = len(cores) if apart else 1
    members = [len(range(i, options.members, count)) for i in range(count)]
    task = {
        "experiment": options.experiment,
        "way": way,
        "devices": min(len(cores), options.members) if divides else 1,
        "steps": options.steps,
        "smoke": options.smoke,
    }
    return [
        Worker({**task, "members": own}, cores[i] if apart else None)
        for i, own in enumerate(members)
    ]


def measure(options: argparse.Namespace, cores: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Returns for each way its seconds to compile and milliseconds per member and step."""
    found: dict[str, dict[str, Any]] = {}
    workers: dict[str, list[Worker]] = {}
    try:
        for name in options.ways:
            workers[name] = start(name, options, cores)
            compiled = [worker.answer()["compile_secs"] for worker in workers[name]]
            found[name] = {"compile_secs": max(compiled), "ms": []}
            print(f"{name:14} compiled in {max(compiled):.1f} s", file=sys.stderr, flush=True)
        for _ in range(options.rounds):
            for name, group in workers.items():
                began = time.perf_counter()
                for worker in group:
                    worker.ask()
                for worker in group:
                    worker.answer()
                seconds = time.perf_counter() - began
                found[name]["ms"].append(1e3 * seconds / options.members / options.steps)
    finally:
        for worker in [each for group in workers.values() for each in group]:
            worker.end()
    return found


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """Sets the ways beside each other; ratios are to the first."""
    first = found[options.ways[0]]["ms"]
    lines = [
        "| way | ms per step of a member (median, least) | times as long as "
        f"{options.ways[0]} (median of rounds) | seconds to compile |",
        "|---|---|---|---|",
    ]
    for name, each in found.items():
        ratio = statistics.median(one / other for one, other in zip(each["ms"], first, strict=True))
        lines.append(
            f"| {name} | {statistics.median(each['ms']):.3f}, {min(each['ms']):.3f} | "
            f"{ratio:.2f} | {each['compile_secs']:.1f} |"
        )
    return "\n".join(lines)


def work(task: dict[str, Any]) -> None:
    """Compiles, says so, and makes the steps whenever a line comes."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from cnnjax.devices import backend

    backend.start(task["devices"])
    module = importlib.import_module(task["experiment"])
    config = module.Config(smoke=task["smoke"])
    began = time.perf_counter()
    make = _runs if task["way"] == "runs" else _population
    call, compile_secs = make(module, config, task)
    call()
    print(f"ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for answer in _answers(call, compile_secs):
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _answers(call: Callable[[], None], compile_secs: float) -> Any:
    yield {"compile_secs": compile_secs}
    for _ in sys.stdin:
        call()
        yield {"done": True}


def _prepared(module: Any, config: Any, count: int) -> Any:
    from cnnjax.search.population import prepare, varied

    # The seeds share their images, so that each way gathers from arrays of the same size.
    config = dataclasses.replace(config, data_seed=0)
    members = varied.draw_members(None, seeds=range(count))
    return prepare.prepare(module, config, members, Path("unused"))


def _population(module: Any, config: Any, task: dict[str, Any]) -> tuple[Any, float]:
    import jax
    import numpy as np

    from cnnjax.search.population import members, program, training
    from cnnjax.search.population.examples import training_rows

    prepared = _prepared(module, config, task["members"])
    mesh = members.member_mesh(task["devices"], task["members"])
    programs = training.Programs(prepared, mesh, task["way"])
    numbers = range(task["members"])
    placed = training.begin(programs, prepared.initial_states(), numbers)
    layout = placed.layout
    values = programs.values(layout, [prepared.values(i) for i in numbers])
    rows = training_rows(
        [each["train"] for each in prepared.rows],
        list(numbers),
        batch_size=prepared.config.batch_size,
        epoch=0,
    )[layout.fill][:, : task["steps"]]
    began = time.perf_counter()
    train = program.compile_train(
        prepared.step,
        placed.state,
        values,
        programs.arrays,
        jax.ShapeDtypeStruct(rows.shape, np.int32),
        way=task["way"],
        mesh=mesh,
    )
    compile_secs = time.perf_counter() - began
    arguments = (
        values,
        programs.arrays,
        program.divided(rows, mesh),
        program.shared(np.int32(rows.shape[1]), mesh),
        program.counts_of(layout, mesh),
    )
    kept = {"state": placed.state}

    def call() -> None:
        kept["state"], metrics = train(kept["state"], *arguments)
        jax.block_until_ready(metrics)

    return call, compile_secs


def _runs(module: Any, config: Any, task: dict[str, Any]) -> tuple[Any, float]:
    import jax

    from cnnjax.data.streamed import training_pipeline
    from cnnjax.devices import sharding
    from cnnjax.run import state as states
    from cnnjax.search.population import prepare
    from cnnjax.train.compile import compile_train

    config = dataclasses.replace(config, data_seed=0)
    dataset = prepare.classifier.read_data(config)
    recipe = prepare.classifier.make_recipe(config, dataset, *prepare.model_of(config, dataset))
    mesh = sharding.make_mesh(task["devices"])
    data = training_pipeline(
        dataset,
        config.batch_size,
        seed=0,
        sharding=sharding.batch_sharding(mesh),
        replicated=sharding.replicated(mesh),
    )
    began = time.perf_counter()
    form = states.state_form(recipe, 0, mesh)
    train = compile_train(recipe.make_step, form, data, method="scan", mesh=mesh)
    compile_secs = time.perf_counter() - began
    kept = [
        jax.device_put(states.new_state(recipe, seed, mesh), sharding.replicated(mesh))
        for seed in range(task["members"])
    ]

    def call() -> None:
        for i, state in enumerate(kept):
            for kept[i], _ in train(state, 0, [task["steps"]]):
                pass

    return call, compile_secs


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--experiment", default="experiments.mnist_lenet")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--json", default="")
    parser.add_argument("--smoke", action="store_true", help="4 members, 5 steps, 1 round")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if options.worker:
        work(json.loads(options.worker))
        return
    for name in options.ways:
        if name not in WAYS:
            raise unknown_name("way", name, WAYS)
    for name in ("members", "steps", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give at least 1.")
    if options.smoke:
        options.members, options.steps, options.rounds = 4, 5, 1
    cores = sorted(os.sched_getaffinity(0))
    found = measure(options, cores)
    print(
        f"{options.members} members of {options.experiment}, {options.steps} steps each, "
        f"{options.rounds} rounds, {len(cores)} cores\n"
    )
    print(table(found, options))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main()
