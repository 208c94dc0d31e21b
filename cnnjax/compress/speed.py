"""How long inference takes, on the fast path of `cnnjax.ops`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.cost.compiled import inference

PyTree = Any


def milliseconds(
    networks: Mapping[str, tuple[Any, PyTree]],
    image_shape: tuple[int, int, int],
    batch_size: int,
    *,
    seconds: float = 4.0,
) -> dict[str, float]:
    """Returns the time of one forward pass of each network, in milliseconds.

    The least over many passes, in which the networks take turns: what else the machine does makes
    passes longer, never shorter. Compilation is not in it.

    Args:
      networks: name -> model and variables.
      image_shape: `[height, width, channels]`.
      batch_size: images in a pass.
      seconds: how long to measure, all networks together.
    """
    image = jax.random.normal(jax.random.key(0), (batch_size, *image_shape), jnp.float32)
    passes = {}
    for name, (model, variables) in networks.items():
        on_device = jax.tree.map(jnp.asarray, variables)
        with ops.outside_loops():
            compiled = inference(model, on_device, image)
        passes[name] = (compiled, on_device)
        jax.block_until_ready(compiled(on_device, image))
    least = dict.fromkeys(passes, np.inf)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for name, (compiled, on_device) in passes.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled(on_device, image))
            least[name] = min(least[name], time.perf_counter() - began)
    return {name: 1000 * float(value) for name, value in least.items()}
