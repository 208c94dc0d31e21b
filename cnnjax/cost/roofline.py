"""The least time that a device takes for so many operations and bytes.

The roofline of Williams, Waterman and Patterson (2009, https://doi.org/10.1145/1498765.1498785):
a kernel takes at least operations / peak and at least bytes / bandwidth.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.cost.operations import LayerCost
from cnnjax.errors import UserError

# Large enough for the caches of a CPU and for all cores of an accelerator.
CPU_SIDE, ACCELERATOR_SIDE = 1536, 8192
CPU_BYTES, ACCELERATOR_BYTES = 2**27, 2**30


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a device can do: operations and bytes per second, and how that is known."""

    operations_per_sec: float
    bytes_per_sec: float
    source: str

    def seconds(self, cost: LayerCost) -> float:
        """Returns the least time of a layer."""
        return max(cost.operations / self.operations_per_sec, cost.bytes / self.bytes_per_sec)

    def bound(self, cost: LayerCost) -> str:
        """Returns what limits a layer: `compute` or `memory`."""
        return "compute" if cost.intensity >= self.ridge else "memory"

    @property
    def ridge(self) -> float:
        """The operations for each byte from which on the arithmetic is what takes the time."""
        return self.operations_per_sec / self.bytes_per_sec


def measure(dtype: Any = jnp.float32, *, budget_secs: float = 1.0) -> Roofline:
    """Measures the first device: products of square matrices, and sums of two long arrays.

    The best of the tries that fit into half of the time each: other programs only slow it.
    """
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    side = CPU_SIDE if cpu else ACCELERATOR_SIDE
    square = jnp.ones((side, side), dtype)
    product = least_secs(jax.jit(jnp.matmul), (square, square), budget_secs / 2)
    count = (CPU_BYTES if cpu else ACCELERATOR_BYTES) // 4
    total = _sum_secs(count, budget_secs / 2)
    name = jnp.dtype(dtype).name
    return Roofline(2 * side**3 / product, 3 * 4 * count / total, f"measured, {name}")


def least_secs(function: Callable[..., Any], arguments: Sequence[Any], budget_secs: float) -> float:
    """Returns the least time of a call, of those that fit into `budget_secs` after the first."""
    jax.block_until_ready(function(*arguments))
    best, end = float("inf"), time.perf_counter() + budget_secs
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - began)
    return best


def _sum_secs(count: int, budget_secs: float) -> float:
    """The sum takes the memory of its first argument: new pages would cost more than the sum."""
    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    x, y = jnp.ones((count,), jnp.float32), jnp.zeros((count,), jnp.float32)
    x = jax.block_until_ready(add(x, y))
    best, end = float("inf"), time.perf_counter() + budget_secs
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        x = jax.block_until_ready(add(x, y))
        best = min(best, time.perf_counter() - began)
    return best


def given(values: dict[str, float]) -> Roofline:
    """Returns the roofline of given peaks.

    Args:
      values: `flops` and `bandwidth`, per second.

    Raises:
      UserError: one of them is missing.
    """
    if set(values) != {"flops", "bandwidth"}:
        raise UserError(
            f"--device {','.join(values)}: give both, such as --device flops=10T,bandwidth=1.5T"
        )
    return Roofline(values["flops"], values["bandwidth"], "given")
