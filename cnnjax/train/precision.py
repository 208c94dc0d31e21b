"""Mixed precision: layers compute in 16 bits, everything that adds up stays in float32.

Parameters, gradients, the statistics of normalization, losses and metrics are float32. bfloat16
has the range of float32 and needs nothing else. float16 has not: small gradients vanish, large ones
overflow. So the loss is multiplied by a scale before its gradient is taken, the gradient is divided
by it, and a step whose gradient overflowed is skipped (Micikevicius et al. 2018, "Mixed Precision
Training", section 3.2, with the dynamic scale of its section 3.2.1's successors, PyTorch's
`GradScaler` and Flax's `DynamicScale`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from cnnjax.errors import unknown_name

PyTree = Any
# None: whatever image and parameters are, which is float32.
DTYPES: dict[str, Any] = {"float32": None, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# The setting that leaves it to the platform.
AUTO = "auto"

# The initial scale and the interval of PyTorch and Flax.
INITIAL_SCALE = 2.0**16
MAXIMUM_SCALE = 2.0**24
# A gradient that overflows without a scale is too large in truth: from there on nothing is skipped.
MINIMUM_SCALE = 1.0
GROWTH_INTERVAL_STEPS = 2000


@flax.struct.dataclass
class LossScale:
    """The dynamic loss scale; part of the training state, so it is saved and resumed with it.

    Attributes:
      scale: float32 scalar, a power of two: the factor of the next step's loss.
      good_steps: int32 scalar, steps since the scale last changed.
      skipped_steps: int32 scalar, steps skipped so far.
    """

    scale: jax.Array
    good_steps: jax.Array
    skipped_steps: jax.Array


def of_platform(name: str, platform: str = "") -> str:
    """Returns the precision that a setting means: `auto` is what the devices multiply fastest.

    The matrix unit of a TPU multiplies bfloat16. Elsewhere float32 is what others compute in too.

    Args:
      name: a name of `DTYPES`, which is returned as it is, or `auto`.
      platform: such as `tpu`; by default that of JAX's devices, which are started.
    """
    if name != AUTO:
        return name
    return "bfloat16" if (platform or started_platform()) == "tpu" else "float32"


def started_platform() -> str:
    """Returns the platform of JAX's devices, which this starts if nothing has."""
    return jax.default_backend()


def compute_dtype(name: str) -> Any:
    """Returns the `dtype` that a model gets: None for float32, which leaves all as it is.

    Args:
      name: a name of `DTYPES`, or `auto` (see `of_platform`).

    Raises:
      UserError: a name that is not in `DTYPES`.
    """
    name = of_platform(name)
    if name not in DTYPES:
        raise unknown_name("precision", name, (AUTO, *DTYPES))
    return DTYPES[name]


def initial_loss_scale(name: str) -> LossScale | None:
    """Returns the scale of step 0 for float16, and None for a precision that needs none."""
    if compute_dtype(name) != jnp.float16:
        return None
    return LossScale(jnp.float32(INITIAL_SCALE), jnp.int32(0), jnp.int32(0))


def adjusted(loss_scale: LossScale, finite: jax.Array) -> LossScale:
    """Returns the scale after a step: halved if its gradient was not finite, else grown at times.

    It doubles after `GROWTH_INTERVAL_STEPS` good steps in a row, up to `MAXIMUM_SCALE`, and never
    falls below `MINIMUM_SCALE`, at which a step is not skipped.
    """
    good_steps = loss_scale.good_steps + 1
    grows = good_steps >= GROWTH_INTERVAL_STEPS
    scale = loss_scale.scale
    grown = jnp.where(grows, jnp.minimum(2 * scale, MAXIMUM_SCALE), scale)
    return LossScale(
        scale=jnp.where(finite, grown, jnp.maximum(scale / 2, MINIMUM_SCALE)),
        good_steps=jnp.where(finite & ~grows, good_steps, 0),
        skipped_steps=loss_scale.skipped_steps + skips(loss_scale, finite),
    )


def skips(loss_scale: LossScale, finite: jax.Array) -> jax.Array:
    """Whether a step with such a gradient is skipped: bool scalar."""
    return ~finite & (loss_scale.scale > MINIMUM_SCALE)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of a tree is finite: bool scalar."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite))


def skip_overflow(
    old: Any, new: Any, metrics: dict[str, tuple[jax.Array, jax.Array]], finite: jax.Array
) -> tuple[Any, dict[str, tuple[jax.Array, jax.Array]]]:
    """Takes back a float16 step whose gradient overflowed, and adjusts the scale.

    Args:
      old: the `TrainState` before the step.
      new: the one after it.
      metrics: the step's `(sum, count)` pairs.
      finite: whether the gradient is.

    Returns:
      The state: of a skipped step the old one, but for `step`, which counts it, and `loss_scale`.
      The metrics: norms, and a loss that is not finite, count nothing in a skipped step;
      `loss_scale` and `skipped` (1 or 0) are added.
    """
    skipped = skips(old.loss_scale, finite)
    kept = {
        name: jax.tree.map(
            lambda before, after: jnp.where(skipped, before, after),
            getattr(old, name),
            getattr(new, name),
        )
        for name in ("params", "batch_stats", "opt_state", "ema")
    }
    state = dataclasses.replace(new, **kept, loss_scale=adjusted(old.loss_scale, finite))
    void = {
        "loss": skipped & ~jnp.isfinite(metrics["loss"][0]),
        "gradient_norm": skipped,
        "update_norm": skipped,
    }
    for name, nothing in void.items():
        total, count = metrics[name]
        metrics = metrics | {name: (jnp.where(nothing, 0, total), jnp.where(nothing, 0, count))}
    one = jnp.ones((), jnp.int32)
    added = {
        "loss_scale": (old.loss_scale.scale, one),
        "skipped": (skipped.astype(jnp.int32), one),
    }
    return state, metrics | added
