"""Time augmentation policies against the training step that they feed, and print a Markdown table.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --model resnet18 --model-arguments stem=cifar \
        --shape 32 32 3 --policies crop:4,flip randaugment:2:9

Each policy is timed alone, as one compiled call per batch on images that wait on the device, and
within the training step; all take turns, and the fastest round counts. The last column is the time
of the step with the policy over that of the step without.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import augment as augment_lib
from cnnjax import models, spec
from cnnjax.devices import backend
from cnnjax.run import exits
from cnnjax.tasks.classification import classification
from cnnjax.train import state
from cnnjax.train import step as steps
from cnnjax.train.predict import as_float

POLICIES = (
    "crop:4,flip",
    "rotate:7,scale:0.07,translate:1.5,shear:7",
    "elastic:34:4",
    "brightness:0.4,contrast:0.4,saturation:0.4,hue:0.1",
    "noise:0.1",
    "blur:1",
    "median:0.5",
    "erase:0.5",
    "cutout:8",
    "mixup:0.2",
    "cutmix:1",
    "randaugment:2:9",
    "trivialaugment",
    "augmix",
    "crop:4,flip,randaugment:2:9,erase:0.25,mixup:0.2,cutmix:1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--model-arguments", nargs="*", default=[])
    parser.add_argument("--shape", nargs=3, type=int, default=(28, 28, 1))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each round of each timing")
    arguments = parser.parse_args()
    with exits.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Compiles everything, then lets all take turns."""
    backend.start(devices=1)
    generator = np.random.default_rng(0)
    shape = (arguments.batch_size, *arguments.shape)
    batch = {
        "image": jnp.asarray(generator.integers(0, 256, shape), jnp.uint8),
        "label": jnp.asarray(generator.integers(0, 10, arguments.batch_size), jnp.int32),
        "mask": jnp.ones(arguments.batch_size, bool),
    }
    policies: dict[str, Callable[..., Any]] = {}
    for text in arguments.policies:
        augment = augment_lib.make_augment(text, num_classes=10)
        if augment is not None:
            policies[text] = augment
    make_step = step_factory(arguments, batch)
    calls: dict[tuple[str, str], Callable[[], None]] = {("", "step"): make_step(None)}
    for text, augment in policies.items():
        calls[text, "alone"] = alone(augment, batch)
        calls[text, "step"] = make_step(augment)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            best[name] = min(best[name], seconds_a_call(call, arguments.seconds))
    print_table(arguments, best)


def step_factory(
    arguments: argparse.Namespace, batch: dict[str, jax.Array]
) -> Callable[[Callable | None], Callable[[], None]]:
    """Returns `augment -> a call that makes one training step` of the model asked for."""
    model = models.create(
        arguments.model, num_classes=10, **spec.arguments(arguments.model_arguments)
    )
    optimizer = optax.sgd(1e-3)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, *arguments.shape)))

    def make_step(augment: Callable | None) -> Callable[[], None]:
        step = steps.make_step(
            model,
            optimizer,
            classification(10),
            schedule=optax.constant_schedule(1e-3),
            normalize=lambda image: augment_lib.normalize(image, 0.5, 0.5),
            augment=augment,
        )
        current = state.create_state(
            jax.tree.map(jnp.copy, variables), optimizer, jax.random.key(1)
        )
        compiled = (
            jax.jit(step, donate_argnums=0)
            .lower(current, batch)
            .compile(backend.compiler_options(remat=False))
        )

        def call() -> None:
            nonlocal current
            current, metrics = compiled(current, batch)
            jax.block_until_ready(metrics)

        return call

    return make_step


def alone(augment: Callable, batch: dict[str, jax.Array]) -> Callable[[], None]:
    """Returns a call that augments one batch."""

    def augmented(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return augment(key, {**batch, "image": as_float(batch["image"])}, 0)

    compiled = jax.jit(augmented)
    key = jax.random.key(0)
    return lambda: jax.block_until_ready(compiled(key, batch))


def seconds_a_call(call: Callable[[], None], at_least: float) -> float:
    """Returns the mean time of a call, over enough calls to take `at_least` seconds."""
    call()
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < at_least:
        call()
        calls += 1
    return elapsed / calls


def print_table(arguments: argparse.Namespace, seconds: dict[tuple[str, str], float]) -> None:
    """Prints one line a policy."""
    size, plain = arguments.batch_size, seconds["", "step"]
    shape = "x".join(map(str, arguments.shape))
    print(
        f"{arguments.model}, {shape}, batch {size}, {backend.describe()}: a step without "
        f"augmentation takes {1e3 * plain:.2f} ms ({size / plain:,.0f} images/s)\n"
    )
    print("| policy | alone, images/s | x the step | step with it, images/s | time of the step |")
    print("|---|---|---|---|---|")
    for text in arguments.policies:
        policy, step = seconds[text, "alone"], seconds[text, "step"]
        print(
            f"| `{text}` | {size / policy:,.0f} | {plain / policy:.2f} | {size / step:,.0f} | "
            f"{step / plain:.2f} |"
        )


if __name__ == "__main__":
    main()
