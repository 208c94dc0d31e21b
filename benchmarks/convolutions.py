"""Times each lowering of `cnnjax.ops` per layer: the measurements behind `cnnjax.ops.choice`.

    python benchmarks/convolutions.py                     every layer below
    python benchmarks/convolutions.py --only resnet       layers whose name contains "resnet"
    python benchmarks/convolutions.py --batch 8 --repeats 20

Prints milliseconds (median; the forms take turns, so that a disturbance hits all alike) and, in
brackets, how many times faster than `lax`: the forward pass and forward with both gradients, each
as one call and as the body of a compiled loop. Compilation is not timed. `auto` is what models get;
a form that cannot compute a layer is `lax` there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cnnjax import ops

LOOP_STEPS = 8


class Layer(NamedTuple):
    """One convolution: square image and kernel; `pooled` adds bias, relu and a 2x2 max pool."""

    size: int
    channels: int
    features: int
    window: int
    stride: int = 1
    padding: str = "SAME"
    groups: int = 1
    pooled: bool = False


LAYERS = {
    "lenet conv1 + pool": Layer(28, 1, 6, 5, padding="VALID", pooled=True),
    "lenet conv2 + pool": Layer(12, 6, 16, 5, padding="VALID", pooled=True),
    "simple conv1 + pool": Layer(28, 1, 32, 3, padding="VALID", pooled=True),
    "simple conv2 + pool": Layer(13, 32, 64, 3, padding="VALID", pooled=True),
    "lenet conv1": Layer(28, 1, 6, 5, padding="VALID"),
    "lenet conv2": Layer(12, 6, 16, 5, padding="VALID"),
    "simple conv1": Layer(28, 1, 32, 3, padding="VALID"),
    "simple conv2": Layer(13, 32, 64, 3, padding="VALID"),
    "cifar resnet 16": Layer(32, 16, 16, 3),
    "cifar resnet 16-32": Layer(32, 16, 32, 3, stride=2),
    "cifar resnet 32": Layer(16, 32, 32, 3),
    "cifar resnet 64": Layer(8, 64, 64, 3),
    "resnet18 stem": Layer(32, 3, 64, 3),
    "resnet18 stage1": Layer(32, 64, 64, 3),
    "resnet18 stage2 down": Layer(32, 64, 128, 3, stride=2),
    "resnet18 stage2": Layer(16, 128, 128, 3),
    "resnet18 stage3 down": Layer(16, 128, 256, 3, stride=2),
    "resnet18 stage3": Layer(8, 256, 256, 3),
    "resnet18 stage4 down": Layer(8, 256, 512, 3, stride=2),
    "resnet18 stage4": Layer(4, 512, 512, 3),
    "resnet18 shortcut": Layer(32, 64, 128, 1, stride=2),
    "bottleneck 1x1": Layer(16, 256, 64, 1),
    "grouped 3x3": Layer(16, 128, 128, 3, groups=32),
    "depthwise 3x3": Layer(16, 128, 128, 3, groups=128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time each lowering of cnnjax.ops per layer.")
    parser.add_argument("--batch", type=int, default=64, help="examples (default 64)")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each form (default 7)")
    parser.add_argument("--only", default="", help="time the layers whose name contains this")
    parser.add_argument("--dtype", default="float32", help="of image and kernel (default float32)")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, batch {arguments.batch}, {arguments.dtype}")
    for name, layer in LAYERS.items():
        if arguments.only in name:
            print(f"\n{name}: {layer.size}x{layer.size}x{layer.channels} -> {layer.features}")
            report(layer, arguments.batch, arguments.repeats, jnp.dtype(arguments.dtype))


def report(layer: Layer, batch: int, repeats: int, dtype: jnp.dtype) -> None:
    """Prints one line for each kind of run, with the time of each lowering."""
    keys = jax.random.split(jax.random.key(0), 2)
    image = jax.random.normal(keys[0], (batch, layer.size, layer.size, layer.channels), dtype)
    inward = layer.channels // layer.groups
    kernel = jax.random.normal(keys[1], (layer.window, layer.window, inward, layer.features), dtype)
    for loop in (False, True):
        for gradients in (False, True):
            runs = {
                name: compiled(layer, name, gradients, loop, image, kernel)
                for name in ("lax", *(name for name in ops.LOWERINGS if name != "lax"))
            }
            millisecs = interleaved_medians(runs, repeats)
            steps = LOOP_STEPS if loop else 1
            text = "  ".join(
                f"{name} {value / steps:7.2f} ({millisecs['lax'] / value:4.2f}x)"
                for name, value in millisecs.items()
            )
            kind = ("loop" if loop else "call") + (" both ways" if gradients else " forward")
            print(f"  {kind:15} {text}")


def compiled(
    layer: Layer,
    lowering: str,
    gradients: bool,
    loop: bool,
    image: jax.Array,
    kernel: jax.Array,
) -> Callable[[], jax.Array]:
    """Returns a call that runs the layer to its end, compiled and warm."""

    def forward(image: jax.Array, kernel: jax.Array) -> jax.Array:
        if layer.pooled:
            return ops.conv2d_activation_max_pool(image, kernel, padding=layer.padding)
        return ops.conv2d(
            image,
            kernel,
            strides=(layer.stride, layer.stride),
            padding=layer.padding,
            feature_group_count=layer.groups,
        )

    def once(image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        if not gradients:
            return (forward(image, kernel),)
        result, transpose = jax.vjp(forward, image, kernel)
        return result, *transpose(result)

    def several(image: jax.Array, kernel: jax.Array, num_steps: jax.Array) -> jax.Array:
        # Each step's kernel depends on the last step's results, so that none can be left out; the
        # number of steps is an argument, so that the loop is not unrolled.
        def step(_: int, kernel: jax.Array) -> jax.Array:
            results = once(image, kernel)
            change = sum(jnp.max(value).astype(kernel.dtype) for value in results)
            return kernel + change * jnp.asarray(1e-12, kernel.dtype)

        return lax.fori_loop(0, num_steps, step, kernel)

    with ops.lowering(lowering):
        if loop:
            program = jax.jit(several).lower(image, kernel, LOOP_STEPS).compile()
            run = lambda: jax.block_until_ready(program(image, kernel, LOOP_STEPS))  # noqa: E731
        else:
            single = jax.jit(once).lower(image, kernel).compile()
            run = lambda: jax.block_until_ready(single(image, kernel))  # noqa: E731
    run()
    return run


def interleaved_medians(runs: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each, the runs taking turns."""
    millisecs: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            millisecs[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in millisecs.items()}


if __name__ == "__main__":
    main()
