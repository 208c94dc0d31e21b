"""The cost of saving: the same training with and without checkpoints, alternating.

    python benchmarks/saving.py                            # ResNet-18 at 32x32, 5 rounds
    python benchmarks/saving.py --batch-size 8 --rounds 3 --optimizer adam

A round is `--steps` steps without a save, and as many that begin with one and end when it is on the
disk: what the background's digests and writes take from the steps is in it, and so is the end of a
write that the steps did not outlast. The order alternates, and the medians over the rounds are
compared. Compilation and a first round are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from cnnjax import checkpoint, models
from cnnjax.data.dataset import Arrays
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.devices import backend
from cnnjax.devices.sharding import batch_sharding, replicated
from cnnjax.models.summary import summary
from cnnjax.tasks.classification import classification
from cnnjax.train import state
from cnnjax.train.compile import Train, choose_mesh, compile_train
from cnnjax.train.step import make_step

OPTIMIZERS = {"sgd": optax.sgd, "momentum": lambda rate: optax.sgd(rate, 0.9), "adam": optax.adam}


class Timing(NamedTuple):
    """Seconds of a round: all of it, the call of `save`, and the wait for its end."""

    total_secs: float
    call_secs: float = 0.0
    wait_secs: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="height and width (32)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="steps from save to save (100)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="momentum")
    parser.add_argument("--devices", type=int, default=0, help="as of the experiments")
    parser.add_argument("--smoke", action="store_true", help="two steps of a small network")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.batch_size, options.steps, options.rounds = "lenet5", 2, 2, 1
    backend.start(options.devices, batch_size=options.batch_size)
    train, train_state = prepare(options)
    size = checkpoint.state_bytes(train_state) / 1e6
    print(
        f"{options.model} at {options.size}x{options.size}, batch {options.batch_size}, "
        f"{options.optimizer}, {size:.0f} MB a checkpoint, one every {options.steps} steps, on "
        f"{backend.describe()}"
    )
    with tempfile.TemporaryDirectory() as directory, checkpoint.Saver(Path(directory)) as saver:
        timings = measure(train, train_state, saver, options.steps, options.rounds)
    print(report(timings, options.steps))


def prepare(options: argparse.Namespace) -> tuple[Train, state.TrainState]:
    """Returns a compiled trainer over random images, and its first state."""
    generator = np.random.default_rng(0)
    shape = (options.steps * options.batch_size, options.size, options.size, 3)
    image = generator.integers(0, 256, shape, np.uint8)
    arrays = Arrays(image, generator.integers(0, 10, shape[0]).astype(np.int32))
    arguments = {"stem": "cifar"} if options.model.startswith("resnet") else {}
    model = models.create(options.model, num_classes=10, **arguments)
    macs = options.batch_size * summary(model, image.shape[1:]).macs
    mesh = choose_mesh(options.devices, macs)
    data = ResidentPipeline(
        arrays,
        options.batch_size,
        seed=0,
        sharding=batch_sharding(mesh),
        replicated=replicated(mesh),
    )
    optimizer = OPTIMIZERS[options.optimizer](1e-3)
    variables = jax.jit(lambda key: model.init(key, image[:1] / 255.0, train=False))(
        jax.random.key(0)
    )
    train_state = state.create_state(variables, optimizer, jax.random.key(1))
    train_state = jax.device_put(train_state, replicated(mesh))
    train = compile_train(
        lambda axis_name: make_step(
            model,
            optimizer,
            classification(10),
            schedule=optax.constant_schedule(1e-3),
            axis_name=axis_name,
        ),
        train_state,
        data,
        method="auto",
        mesh=mesh,
    )
    return train, train_state


def measure(
    train: Train,
    train_state: state.TrainState,
    saver: checkpoint.Saver,
    num_steps: int,
    rounds: int,
) -> dict[str, list[Timing]]:
    """Returns the timings of each round, `with` and `without` saving, after one uncounted round."""
    timings: dict[str, list[Timing]] = {"without": [], "with": []}
    for index in range(rounds + 1):
        order = list(timings) if index % 2 else list(timings)[::-1]
        for arm in order:
            start = time.perf_counter()
            if arm == "with":
                saver.save(train_state, {})
            called = time.perf_counter()
            for new, _ in train(train_state, int(train_state.step), [num_steps]):
                train_state = new
            jax.block_until_ready(train_state)
            trained = time.perf_counter()
            saver.wait()
            ended = time.perf_counter()
            if index:
                timings[arm].append(Timing(ended - start, called - start, ended - trained))
    return timings


def report(timings: dict[str, list[Timing]], num_steps: int) -> str:
    """Returns the table: medians, what saving adds in percent, and where it does."""
    without = statistics.median(each.total_secs for each in timings["without"])
    saving = statistics.median(each.total_secs for each in timings["with"])
    call = statistics.median(each.call_secs for each in timings["with"])
    wait = statistics.median(each.wait_secs for each in timings["with"])
    rounds = "  ".join(
        f"{(b.total_secs / a.total_secs - 1) * 100:+.2f}"
        for a, b in zip(timings["without"], timings["with"], strict=True)
    )
    return (
        f"without saving  {without:8.3f} s for {num_steps} steps\n"
        f"with saving     {saving:8.3f} s, of which the copy {call:.3f} s, and {wait:.3f} s after "
        "the last step\n"
        f"saving costs    {(saving / without - 1) * 100:+.2f}% (each round: {rounds})"
    )


if __name__ == "__main__":
    main()
