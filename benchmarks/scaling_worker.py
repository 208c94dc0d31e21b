"""One point of `scaling.py`, in a process of its own: prints one line of JSON.

The argument is a `Point` as JSON. Process 0 of several prints; the others only take part.
"""

from __future__ import annotations

import functools
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from peer_worker import one_line, private_stdout, say

NUM_CLASSES = 10
# About what small networks do where several processes share the cores.
STEPS_PER_SEC = 100


class Point(NamedTuple):
    """What to measure.

    Attributes:
      model: a name that `cnnjax models` lists.
      image_shape: (height, width, channels).
      batch_size: examples in a batch, over all processes.
      devices: over all processes; 0 as experiments choose.
      num_images: synthetic images, of which a tenth is held out and a tenth tested on.
      seconds: length of a measurement.
      rounds: how many measurements.
      coordinator, num_processes, process_id: as the experiments' flags.
    """

    model: str
    image_shape: list[int]
    batch_size: int
    devices: int
    num_images: int
    seconds: float
    rounds: int
    coordinator: str = "off"
    num_processes: int = 0
    process_id: int = -1


def main() -> None:
    channel = private_stdout()
    point = Point(**json.loads(sys.argv[1]))
    try:
        found = measure(point)
    except Exception as error:
        say(channel, {"failed": one_line(error)})
        raise
    if point.process_id <= 0:
        say(channel, found)


def measure(point: Point) -> dict[str, Any]:
    """Returns images/s of training, and the seconds of start and evaluation."""
    from cnnjax.devices import backend, processes

    processes.start(point.coordinator, point.num_processes, point.process_id)
    backend.start(point.devices, batch_size=point.batch_size)
    import jax

    # Times of compilation are those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    splits = images(point)
    data_mib = sum(image.nbytes for image, _ in splits.values()) / 2**20
    marks = {"began": time.perf_counter()}
    parts = prepare(point, splits, marks)
    train = parts["train"]
    jax.block_until_ready(train(1))
    marks["first_step"] = time.perf_counter()
    evaluate = parts["evaluate"]
    evaluate()
    evaluations = [seconds_of(evaluate) for _ in range(point.rounds)]
    rates = training_rates(train, point)
    return {
        "images_per_sec": statistics.median(rates),
        "rates": rates,
        "num_devices": len(jax.devices()),
        "data_secs": marks["data"] - marks["began"],
        "compile_secs": marks["compiled"] - marks["data"],
        "start_secs": marks["first_step"] - marks["began"],
        "eval_secs": statistics.median(evaluations),
        "eval_images": parts["eval_images"],
        "data_mib": data_mib,
        "peak_mib": peak_mib(),
    }


def images(point: Point) -> dict[str, Any]:
    """Returns noise, as the splits `train` and `test`."""
    from cnnjax.data import Arrays

    generator = np.random.default_rng(0)
    sizes = {"test": max(point.num_images // 10, 1)}
    sizes["train"] = max(point.num_images - sizes["test"], point.batch_size * 2)
    return {
        split: Arrays(
            generator.integers(0, 256, (size, *point.image_shape), np.uint8),
            generator.integers(0, NUM_CLASSES, size, np.int32),
        )
        for split, size in sizes.items()
    }


def prepare(point: Point, splits: dict[str, Any], marks: dict[str, float]) -> dict[str, Any]:
    """Builds dataset, pipeline, trainer and evaluation as a run does."""
    import jax

    from cnnjax import augment as augment_lib
    from cnnjax import data, models, optim, schedules
    from cnnjax.data.dataset import make_dataset
    from cnnjax.devices import processes
    from cnnjax.devices.sharding import batch_sharding, replicated
    from cnnjax.models.summary import summary
    from cnnjax.tasks.classification import classification
    from cnnjax.train import evaluate as evaluation
    from cnnjax.train.compile import choose_mesh, compile_train
    from cnnjax.train.predict import make_eval_step
    from cnnjax.train.state import create_state
    from cnnjax.train.step import make_step

    names = [str(label) for label in range(NUM_CLASSES)]
    dataset = make_dataset("noise", names, splits)
    splits.clear()
    model = models.create(point.model, num_classes=NUM_CLASSES)
    macs = point.batch_size * summary(model, dataset.image_shape).macs
    mesh = choose_mesh(point.devices, macs)
    pipeline = data.ResidentPipeline(
        dataset.train,
        point.batch_size,
        seed=0,
        sharding=batch_sharding(mesh),
        replicated=replicated(mesh),
    )
    marks["data"] = time.perf_counter()
    task = classification(NUM_CLASSES)
    normalize = functools.partial(augment_lib.normalize, mean=dataset.mean, std=dataset.std)
    schedule = schedules.constant(0.01, total_steps=1)
    optimizer = optim.make_optimizer("momentum", schedule)
    key = jax.random.key(0)
    init = jax.jit(functools.partial(model.init, train=False))
    state = create_state(
        init(key, normalize(jax.numpy.asarray(dataset.train.image[:1]))), optimizer, key
    )
    state = processes.put(state, replicated(mesh))

    def step_of(axis_name: str | None) -> Any:
        return make_step(
            model, optimizer, task, schedule=schedule, normalize=normalize, axis_name=axis_name
        )

    trainer = compile_train(step_of, state, pipeline, method="auto", mesh=mesh)
    marks["compiled"] = time.perf_counter()
    num_steps = 1

    def lengths() -> Iterator[int]:
        while True:
            yield num_steps

    trained = trainer(state, 0, lengths())

    def train(steps: int) -> Any:
        nonlocal num_steps, state
        num_steps = steps
        state, _ = next(trained)
        return state

    eval_step = evaluation.compile_eval(
        lambda axis_name: make_eval_step(model, task, normalize=normalize, axis_name=axis_name),
        mesh,
    )

    def evaluate() -> None:
        batches = data.evaluation_batches(
            dataset.test, max(point.batch_size, 256), sharding=batch_sharding(mesh)
        )
        evaluation.evaluate(eval_step, state.variables(), batches, task.scores)

    return {"train": train, "evaluate": evaluate, "eval_images": len(dataset.test.label)}


def training_rates(train: Any, point: Point) -> list[float]:
    """Returns images/s of each round: steps for about so many seconds, after one round unseen."""
    import jax

    def run() -> None:
        jax.block_until_ready(train(steps))

    # Processes take the same number of steps, which the clock of each may not decide.
    steps = max(2, round(STEPS_PER_SEC * point.seconds)) if point.num_processes > 1 else 1
    while seconds_of(run) < point.seconds / 3 and point.num_processes <= 1:
        steps *= 2
    return [steps * point.batch_size / seconds_of(run) for _ in range(point.rounds)]


def seconds_of(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_mib() -> float:
    # Bytes on a Mac, KiB elsewhere.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
