"""What a machine can do at most, and so the least time of a step: for `zoo.py`.

    python benchmarks/zoo_bounds.py

prints, as JSON, how many GFLOP/s large matrix products and how many GB/s large copies reach here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peer_processes import environment
from workloads import Workload

PRODUCT_SIDE = 2048
COPY_BYTES = 2**28
SECONDS = 3.0
FLOAT_BYTES = 4

# How often each activation is moved. Inference writes the outputs of convolutions and dense layers
# and reads them once; all else can be part of these. Training also needs the outputs of
# normalizations, whose statistics take a pass of their own: each is written and read forward, read
# again backward, and its gradient written and read.
INFERENCE_MOVES, TRAINING_MOVES = 2, 5
# Parameters are read; training reads them again backward, writes and reads their gradients, and
# reads and writes them and their momentum.
INFERENCE_PARAMETER_MOVES, TRAINING_PARAMETER_MOVES = 1, 8
TRAINING_PRODUCTS = 3


class Machine(NamedTuple):
    """The most that was measured: GFLOP/s of a matrix product, GB/s read and written by a copy."""

    gflops: float
    gbytes: float


class Cost(NamedTuple):
    """What a step needs: floating-point operations of its products, and bytes that must move."""

    flops: float
    bytes: float


class Bound(NamedTuple):
    """The least milliseconds of a step by operations and by bytes."""

    flop_ms: float
    byte_ms: float

    @property
    def ms(self) -> float:
        """The larger of the two."""
        return max(self.flop_ms, self.byte_ms)

    @property
    def name(self) -> str:
        """What it is that bounds."""
        return "FLOPs" if self.flop_ms >= self.byte_ms else "bytes"


def step_cost(workload: Workload, batch_size: int, mode: str) -> Cost:
    """Returns what a step of one mode needs, from shapes alone.

    Args:
      workload: the network and its images.
      batch_size: examples of a step.
      mode: "train" or "infer".
    """
    from cnnjax import models
    from cnnjax.models.summary import summary

    model = models.create(workload.model, num_classes=workload.num_classes, **workload.arguments)
    facts = summary(model, workload.image_shape)
    train = mode == "train"
    values = sum(int(np.prod(row.output_shape)) for row in facts.rows if train or row.macs)
    moves = TRAINING_MOVES if train else INFERENCE_MOVES
    parameter_moves = TRAINING_PARAMETER_MOVES if train else INFERENCE_PARAMETER_MOVES
    return Cost(
        flops=2.0 * facts.macs * batch_size * (TRAINING_PRODUCTS if train else 1),
        bytes=FLOAT_BYTES * (moves * values * batch_size + parameter_moves * facts.parameters),
    )


def bound(cost: Cost, machine: Machine) -> Bound:
    """Returns the least time of a step on a machine."""
    return Bound(cost.flops / machine.gflops / 1e6, cost.bytes / machine.gbytes / 1e6)


def measure_machine() -> Machine:
    """Measures this machine in a process that ends before anything else is measured."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        capture_output=True,
        text=True,
        check=True,
        env=environment("cpu"),
    )
    return Machine(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = Machine(gflops=_product_gflops(), gbytes=_copy_gbytes(cores or 1))
    print(json.dumps(machine._asdict()))


def _product_gflops() -> float:
    import jax

    operands = [
        jax.random.normal(jax.random.key(number), (PRODUCT_SIDE, PRODUCT_SIDE))
        for number in range(2)
    ]
    product = jax.jit(jax.numpy.matmul)
    return 2 * PRODUCT_SIDE**3 / _least_secs(lambda: product(*operands).block_until_ready()) / 1e9


def _copy_gbytes(threads: int) -> float:
    source, target = (np.zeros((threads, COPY_BYTES // threads), np.uint8) for _ in range(2))
    source += 1
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(np.copyto, target, source))

        return 2 * source.nbytes / _least_secs(copy) / 1e9


def _least_secs(run: Callable[[], Any]) -> float:
    """Returns the least time of the calls that fit into `SECONDS`, after one unmeasured."""
    run()
    least, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        run()
        least = min(least, time.perf_counter() - start)
    return least


if __name__ == "__main__":
    main()
