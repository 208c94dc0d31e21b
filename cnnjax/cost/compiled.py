"""What the compiler says of a network's programs on the devices that are there: memory, and its own
counts of operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cnnjax.cost.roofline import least_secs
from cnnjax.errors import UserError
from cnnjax.losses import make_loss
from cnnjax.optim import make_optimizer
from cnnjax.tasks.classification import classification
from cnnjax.tasks.segmentation import segmentation
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step

PyTree = Any


@dataclasses.dataclass(frozen=True)
class CompiledCost:
    """What a compiled program takes, in bytes, and what its compiler counts.

    Attributes:
      arguments, outputs: arrays that enter and leave; `reused` of them share their memory.
      temporary: activations and workspace at the peak.
      code: of the program itself.
      operations, bytes_accessed: by XLA's own count, where it has one. XLA does not look into
        calls of libraries, such as oneDNN's convolutions on a CPU.
    """

    arguments: int
    outputs: int
    reused: int
    temporary: int
    code: int
    operations: float | None
    bytes_accessed: float | None

    @property
    def peak(self) -> int:
        """The most memory that is in use at a time."""
        return self.arguments + self.outputs - self.reused + self.temporary


def read(compiled: Any) -> CompiledCost:
    """Returns the cost of what `jax.jit(...).lower(...).compile()` returned.

    Raises:
      UserError: the compiler of this platform tells no memory sizes.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        raise UserError("the compiler for these devices tells no memory sizes: use another device.")
    try:
        counted = compiled.cost_analysis() or {}
    except Exception:  # Of backends without one: of several kinds.
        counted = {}
    return CompiledCost(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        reused=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        operations=counted.get("flops"),
        bytes_accessed=counted.get("bytes accessed"),
    )


def inference(model: Any, variables: PyTree, image: Any) -> Any:
    """Returns the compiled prediction of a batch.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables, image: arrays or `jax.ShapeDtypeStruct`s; `image [batch, height, width, channels]`.
    """
    apply = jax.jit(lambda variables, image: model.apply(variables, image, train=False))
    return apply.lower(variables, image).compile()


def training_step(
    model: Any, variables: PyTree, image: Any, *, num_outputs: int, optimizer: str = "adamw"
) -> tuple[Any, tuple[Any, Any]]:
    """Returns a training step and the forms of its state and batch.

    That of a classifier; of a network with logits for each pixel, that of segmentation.

    Args:
      model, variables, image: as for `inference`.
      num_outputs: the model's logits; one is for two classes.
      optimizer: a name of `cnnjax.optim`.
    """
    transformation = make_optimizer(optimizer, lambda step: jnp.float32(1e-3))
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, image)
    labels = {"label": jax.ShapeDtypeStruct(image.shape[:1], jnp.int32)}
    if getattr(logits, "ndim", 2) == 4:
        task = segmentation(num_outputs)
        labels = {"class_map": jax.ShapeDtypeStruct(logits.shape[:-1], jnp.uint8)}
    else:
        name = "sigmoid_binary_cross_entropy" if num_outputs == 1 else "softmax_cross_entropy"
        task = classification(2 if num_outputs == 1 else num_outputs, loss=make_loss(name))
    step = make_step(model, transformation, task, schedule=lambda step: jnp.float32(1e-3))
    state = jax.eval_shape(lambda v: create_state(v, transformation, jax.random.key(0)), variables)
    batch = {
        "image": image,
        **labels,
        "mask": jax.ShapeDtypeStruct(image.shape[:1], jnp.bool_),
    }
    return step, (state, batch)


def training(step: Any, state: Any, batch: Any) -> Any:
    """Returns the compiled step, which takes the memory of its state: see `training_step`."""
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def seconds(compiled: Any, arguments: Sequence[PyTree], *, budget_secs: float = 1.0) -> float:
    """Returns the least time of a call, of those that fit into `budget_secs` after the first."""
    placed = jax.tree.map(lambda form: jnp.zeros(form.shape, form.dtype), list(arguments))
    return least_secs(compiled, placed, budget_secs)
