"""One contender in a process of its own: prepares itself, then measures on request.

For `peers.py` and `zoo.py`.

The task is the first argument, as JSON. The first line that it prints says how the preparation
went: `{"ready": ...}`, `{"missing": reason}` or `{"failed": reason}`. After that each line read,
such as `{"mode": "train", "seconds": 2}`, is answered by one line: wall and CPU seconds per step.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from workloads import CONTENDERS, OPERATION_CONTENDERS, Program, Run, Task, Workload, load_data

# A variant this much slower at its first trial is not tried again.
HOPELESS = 2.0
TRIALS = 3
# Short beside a time slice of the system, long beside the clock.
SHORT_SECS = 1e-3


class Timing(NamedTuple):
    """Seconds a step: elapsed, and of all the process's threads together."""

    wall_secs: float
    cpu_secs: float
    num_steps: int
    loss: float


class Prepared(NamedTuple):
    """The fastest variant of one mode; `first_secs` is its preparation and first step.

    `compile_secs` of these, its compiler has taken.
    """

    variant: str
    run: Run
    first_secs: float
    compile_secs: float
    trials: dict[str, float | str]


def main() -> None:
    channel = private_stdout()
    spec = json.loads(sys.argv[1])
    seconds, modes = spec["seconds"], spec["modes"]
    timer = measure_least if spec["least"] else measure
    workload = Workload(*spec["task"]["workload"])
    height, width, channels = workload.image_shape
    workload = workload._replace(image_shape=(height, width, channels))
    task = Task(**spec["task"] | {"workload": workload})
    try:
        program = build(task)
        start_secs = time.time() - spec["started"]
        runs = {
            mode: prepare_mode(program, mode, seconds, spec["variant"], timer) for mode in modes
        }
    except ModuleNotFoundError as error:
        say(channel, {"missing": f"needs the package {error.name}"})
        return
    except Exception as error:
        say(channel, {"failed": one_line(error)})
        raise
    say(
        channel,
        {
            "ready": {
                "num_parameters": program.num_parameters,
                "platform": program.platform,
                "versions": program.versions,
                "modes": {
                    mode: {
                        "variant": each.variant,
                        "start_secs": start_secs,
                        "first_secs": each.first_secs,
                        "compile_secs": each.compile_secs,
                        "trials": each.trials,
                    }
                    for mode, each in runs.items()
                },
            }
        },
    )
    num_steps: dict[str, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        mode, seconds = request["mode"], request["seconds"]
        try:
            if mode not in runs:
                runs[mode] = prepare_mode(program, mode, seconds, spec["variant"], timer)
            timing = timer(runs[mode].run, seconds, num_steps.get(mode, 1))
            if spec["least"]:
                trial_secs = float(runs[mode].trials[runs[mode].variant])
                timing = timing._replace(wall_secs=min(timing.wall_secs, trial_secs))
        except Exception as error:
            say(channel, {"failed": one_line(error)})
            raise
        num_steps[mode] = max(1, round(seconds / timing.wall_secs))
        # Bytes on a Mac, KiB elsewhere.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        say(channel, {**timing._asdict(), "peak_mib": peak_mib, "variant": runs[mode].variant})
        if request["last"]:
            del runs[mode]


def build(task: Task) -> Program:
    """Imports the contender's module and its framework, and builds its program."""
    contender = (CONTENDERS | OPERATION_CONTENDERS)[task.contender]
    if importlib.util.find_spec(contender.package) is None:
        raise ModuleNotFoundError(contender.package, name=contender.package)
    image, label = load_data(task.workload, task.batch_size)
    return importlib.import_module(contender.module).build(task, image, label)


def prepare_mode(
    program: Program, mode: str, seconds: float, variant: str | None, timer: Callable[..., Timing]
) -> Prepared:
    """Prepares a mode in the fastest of its variants, or in the one named."""
    variants = program.variants[mode]
    if variant is not None:
        variants = {variant: variants[variant]}
    return prepare(variants, seconds, program.compiled_secs or (lambda: 0.0), timer)


def prepare(
    variants: dict[str, Callable[[], Run]],
    seconds: float,
    compiled_secs: Callable[[], float] = lambda: 0.0,
    timer: Callable[..., Timing] | None = None,
) -> Prepared:
    """Prepares all variants, lets those that are not hopeless take turns, and keeps the fastest.

    A variant that fails is passed over; if all do, the last one's exception is raised.
    """
    timer = timer or measure
    runs: dict[str, Run] = {}
    first_secs: dict[str, float] = {}
    compile_secs: dict[str, float] = {}
    trials: dict[str, float | str] = {}
    best: dict[str, float] = {}
    for number, (name, make) in enumerate(variants.items(), 1):
        start, compiled = time.perf_counter(), compiled_secs()
        try:
            run = make()
            run(1)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            trials[name] = one_line(error)
            if number == len(variants) and not runs:
                raise
            continue
        first_secs[name] = time.perf_counter() - start
        compile_secs[name] = compiled_secs() - compiled
        runs[name] = run
        best[name] = timer(run, seconds / TRIALS).wall_secs
    if len(runs) > 1:
        for _ in range(TRIALS - 1):
            for name in [name for name in runs if best[name] < HOPELESS * min(best.values())]:
                best[name] = min(best[name], timer(runs[name], seconds / TRIALS).wall_secs)
    trials |= best
    fastest = min(best, key=best.__getitem__)
    return Prepared(fastest, runs[fastest], first_secs[fastest], compile_secs[fastest], trials)


def measure(run: Run, seconds: float, num_steps: int = 1) -> Timing:
    """Times about as many steps as fit into `seconds`, at least one.

    Starts at `num_steps` and takes more until they fill half of the time, so that what a call costs
    besides its steps is shared by as many steps as the caller has time for.
    """
    if num_steps >= 10:
        run(num_steps // 10)  # The first steps after a pause are slow.
    while True:
        timing = time_steps(run, num_steps)
        elapsed = timing.wall_secs * num_steps
        if elapsed >= seconds / 2:
            return timing
        num_steps = max(num_steps + 1, min(20 * num_steps, round(num_steps * seconds / elapsed)))


def measure_least(run: Run, seconds: float, num_steps: int = 1) -> Timing:
    """Times a few steps again and again for `seconds`, at least twice, and returns the fastest.

    A pause of the system, or a thread that waits for one that is paused, then spoils only some of
    the measurements.
    """
    del num_steps
    least, end, count = time_steps(run, 1), time.perf_counter() + seconds, 0
    while count < 2 or time.perf_counter() < end:
        timing = time_steps(run, max(1, round(SHORT_SECS / least.wall_secs)))
        least, count = min(least, timing), count + 1
    return least


def time_steps(run: Run, num_steps: int) -> Timing:
    """Times `num_steps` steps together."""
    cpu_start, start = time.process_time(), time.perf_counter()
    loss = run(num_steps)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return Timing(wall / num_steps, cpu / num_steps, num_steps, loss)


def private_stdout() -> TextIO:
    """Returns a stream to the parent; what libraries print goes to stderr from now on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def say(channel: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=channel, flush=True)


def one_line(error: Exception) -> str:
    """Returns the kind and the first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
