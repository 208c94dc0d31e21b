"""The training state: everything that training changes, as one pytree of arrays."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from cnnjax.rng import stream_key
from cnnjax.train.precision import LossScale, initial_loss_scale

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """The state of a training run: arrays only.

    The model, the optimizer and the loss are closed over by the step's factory, so a state can be
    saved, sharded, donated and compared without knowing them.

    Attributes:
      step: int32 scalar, the number of steps made, each of them one batch.
      params: the trainable parameters, float32.
      batch_stats: BatchNorm's running statistics; `{}` for a model without.
      opt_state: the Optax state.
      ema: exponential moving average of `params`, or None.
      key: typed scalar key from which every random stream of training is derived; it never changes.
      loss_scale: the dynamic loss scale of float16, or None.
      frozen: arrays that training reads and never changes, such as the parameters that fine-tuning
        leaves alone (under `params`): arguments of the compiled step, not constants in it. They are
        never saved: who restores a state brings them along. `{}` where everything is trained.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    ema: PyTree | None
    key: jax.Array
    loss_scale: LossScale | None = None
    frozen: PyTree = flax.struct.field(default_factory=dict, metadata={"saved": False})

    @property
    def num_updates(self) -> jax.Array:
        """The number of optimizer updates made: the steps but for those that float16 skipped."""
        return self.step if self.loss_scale is None else self.step - self.loss_scale.skipped_steps

    def variables(self, *, use_ema: bool = True) -> dict[str, PyTree]:
        """Returns what `model.apply` takes; the averaged parameters where there are any."""
        params = self.ema if use_ema and self.ema is not None else self.params
        frozen = {"frozen": self.frozen} if self.frozen else {}
        return {"params": params, "batch_stats": self.batch_stats, **frozen}

    @property
    def all_params(self) -> dict[str, PyTree]:
        """The parameters of the model, `trained` and `frozen`."""
        return {"frozen": self.frozen.get("params", {}), "trained": self.params}


def create_state(
    variables: PyTree,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema: bool = False,
    precision: str = "float32",
) -> TrainState:
    """Returns the state before the first step.

    >>> params = {"head": {"kernel": jnp.zeros((4, 2))}}
    >>> state = create_state({"params": params}, optax.adam(1e-3), jax.random.key(0))
    >>> int(state.step), state.params["head"]["kernel"].shape, state.ema is None
    (0, (4, 2), True)

    Args:
      variables: what `model.init` returned: `params`, and perhaps `batch_stats` and `frozen`.
      optimizer: the optimizer whose state is created.
      key: typed scalar key, the source of all randomness in the steps.
      ema: whether to keep an exponential moving average of the parameters.
      precision: a name of `cnnjax.train.precision.DTYPES`; float16 gets a loss scale.
    """
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        # A copy: the step donates its input, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=key,
        loss_scale=initial_loss_scale(precision),
        frozen=variables.get("frozen", {}),
    )


def training_key(seed: int) -> jax.Array:
    """Returns the `TrainState.key` of a run: all randomness of its steps comes from it."""
    return stream_key(jax.random.key(seed), "train", 0)
