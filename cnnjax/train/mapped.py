"""A step mapped over devices by `jax.pmap`: the `pmap` of `cnnjax.train.compile`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.jax_utils
import jax
from jax.sharding import Mesh

from cnnjax.data.pipelines import Batch, Pipeline
from cnnjax.devices.sharding import replicated

PyTree = Any
AXIS = "data"


class SplitBatches:
    """The batches of a pipeline as `[devices, batch / devices, ...]`."""

    def __init__(self, data: Pipeline, mesh: Mesh):
        self._data = data
        self._split = jax.jit(lambda batch: _split(batch, mesh))

    def batches(self, first_step: int) -> Iterator[Batch]:
        return map(self._split, self._data.batches(first_step))


def lower(
    make_step: Callable[..., Callable],
    numbers: dict[str, Any],
    state: PyTree,
    data: Pipeline,
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Returns the program of a step on each of the devices; `state` is of the whole.

    Its last argument is `numbers`, what `make_step` takes by name; their forms are given here.
    """

    def step(state: PyTree, batch: PyTree, numbers: dict[str, Any]) -> tuple[PyTree, PyTree]:
        return make_step(AXIS, **numbers)(state, batch)

    states = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype), state
    )
    batch = jax.eval_shape(lambda batch: _split(batch, mesh), data.batch_shapes)
    devices = list(mesh.devices.flat)
    program = jax.pmap(
        step, axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=devices
    )
    return program.lower(states, batch, numbers)


def trainer(step_trainer: Callable, data: Pipeline, mesh: Mesh) -> Callable:
    """Returns the trainer whose states are whole, of one whose states are copies.

    Args:
      step_trainer: `(data, mesh) -> trainer` of the compiled step of `lower`.
      data, mesh: as for `lower`.
    """
    train_copies = step_trainer(SplitBatches(data, mesh), mesh)

    def train(state: PyTree, first_step: int, chunks: Iterable[int]):
        copies = flax.jax_utils.replicate(state, list(mesh.devices.flat))
        for states, metrics in train_copies(copies, first_step, chunks):
            whole = jax.device_put(flax.jax_utils.unreplicate(states), replicated(mesh))
            yield whole, jax.tree.map(lambda leaf: leaf[:, 0], metrics)

    return train


def _split(batch: PyTree, mesh: Mesh) -> PyTree:
    return jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
