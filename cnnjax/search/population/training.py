"""The states of a population's members on the devices, an epoch at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.devices import backend
from cnnjax.run.scoring import EVALUATION_BATCH
from cnnjax.search.population import members as stacks
from cnnjax.search.population import program
from cnnjax.search.population.examples import evaluation_rows, training_rows
from cnnjax.search.population.members import AXIS, Layout
from cnnjax.search.population.prepare import Prepared
from cnnjax.train import evaluate
from cnnjax.train.loop import chunk_lengths
from cnnjax.train.state import TrainState

PyTree = Any
# Training metrics are averaged over a twentieth of an epoch, as those of a single run.
LOGS_PER_EPOCH = 20


@dataclasses.dataclass(frozen=True)
class Placed:
    """Members on the devices.

    Attributes:
      numbers: of the members, in their order.
      layout: where each lies.
      state: of all, in slots.
      best: likewise at each member's best validation; None where it is not kept.
    """

    numbers: tuple[int, ...]
    layout: Layout
    state: TrainState
    best: TrainState | None = None


class Programs:
    """The compiled programs of a population: those of a width are compiled when it is needed.

    Attributes:
      prepared: the population.
      mesh: whose axis `member` divides the members.
      way: of `program.WAYS`.
      arrays: the examples, on each device.
      steps: that one call makes at most.
    """

    def __init__(self, prepared: Prepared, mesh: Mesh, way: str):
        self.prepared, self.mesh, self.way = prepared, mesh, way
        self.arrays = program.shared(prepared.arrays, mesh)
        self.steps = -(-prepared.steps_per_epoch // LOGS_PER_EPOCH)
        self.evaluate = program.make_evaluate(prepared.evaluate, way=way, mesh=mesh)
        self._train = functools.lru_cache(maxsize=4)(self._compiled)
        self._evaluation = functools.lru_cache(maxsize=4)(self._evaluated_rows)

    def width(self, num_members: int, now: int = 0) -> int:
        """Returns the slots for so many members: where they are computed in turn, as before."""
        fewest = stacks.layout(num_members, self.mesh.size).width
        return now if self.way == "loop" and now else fewest

    def train(self, width: int) -> Callable[..., tuple[TrainState, PyTree]]:
        """Returns the compiled chunk of steps of members in so many slots."""
        return self._train(width)

    def values(self, layout: Layout, settings: Sequence[PyTree]) -> PyTree:
        """Puts the numbers of members into their slots."""
        return stacks.place(stacks.stack(settings), layout, self.mesh)

    def evaluation(self, numbers: tuple[int, ...], split: str, slots: bytes, width: int) -> Any:
        """Returns the rows of a split for members in slots, on the devices."""
        return self._evaluation(numbers, split, slots, width)

    def _compiled(self, width: int) -> Any:
        own = NamedSharding(self.mesh, PartitionSpec(AXIS))

        def wider(tree: PyTree) -> PyTree:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((width, *leaf.shape), leaf.dtype, sharding=own),
                tree,
            )

        values = self.prepared.values(0)
        state = self.prepared.state_form()
        size = self.prepared.config.batch_size
        return program.compile_train(
            self.prepared.step,
            wider(state),
            wider(values),
            self.arrays,
            jax.ShapeDtypeStruct((width, self.steps, size), np.int32),
            way=self.way,
            mesh=self.mesh,
            compiler_options=backend.compiler_options(remat=self.prepared.config.remat),
        )

    def _evaluated_rows(
        self, numbers: tuple[int, ...], split: str, slots: bytes, width: int
    ) -> tuple[jax.Array, jax.Array]:
        rows = [self.prepared.rows[number][split] for number in numbers]
        found = evaluation_rows(rows, EVALUATION_BATCH)
        fill = _fill(np.frombuffer(slots, np.int64), width)
        return tuple(program.divided(each[fill], self.mesh) for each in found)


def begin(programs: Programs, states: Sequence[TrainState], numbers: Sequence[int]) -> Placed:
    """Puts members' states on the devices."""
    width = programs.width(len(states))
    layout = stacks.layout(len(states), programs.mesh.size, width)
    placed = stacks.place(stacks.stack(states), layout, programs.mesh)
    return Placed(tuple(numbers), layout, placed)


def rearranged(
    programs: Programs, placed: Placed, numbers: Sequence[int], sources: Mapping[int, int]
) -> Placed:
    """Keeps some members only, close together, some of them with what another has learned.

    Args:
      placed: the members.
      numbers: those that stay.
      sources: member -> the member whose parameters, statistics, average and optimizer's state it
        copies; its own key, and so its own randomness, it keeps.
    """
    places = {number: i for i, number in enumerate(placed.numbers)}
    width = programs.width(len(numbers), placed.layout.width)
    layout = stacks.layout(len(numbers), programs.mesh.size, width)

    def moved(tree: PyTree, members: Sequence[int]) -> PyTree:
        slots = placed.layout.slots[[places[each] for each in members]]
        return stacks.moved(tree, slots[layout.fill], programs.mesh)

    def of(state: TrainState) -> TrainState:
        learned = moved(state, [sources.get(number, number) for number in numbers])
        return dataclasses.replace(learned, key=moved(state.key, numbers))

    best = None if placed.best is None else of(placed.best)
    return Placed(tuple(numbers), layout, of(placed.state), best)


def member(programs: Programs, placed: Placed, number: int, *, best: bool = False) -> TrainState:
    """Returns the state of one member, or that of its best validation."""
    slot = placed.layout.slots[placed.numbers.index(number)]
    state = placed.best if best and placed.best is not None else placed.state
    return stacks.moved(state, np.int32(slot), programs.mesh, whole=True)


def train_epoch(
    programs: Programs, placed: Placed, settings: Sequence[PyTree], epoch: int
) -> Iterator[tuple[TrainState, int, PyTree]]:
    """Trains all members for an epoch; yields the state, the steps made, and what they measured.

    Metrics are pairs of NumPy arrays `[members, steps]`, in the members' order. They are fetched
    while the devices compute the next steps. The state before is gone.
    """
    prepared, layout = programs.prepared, placed.layout
    train = programs.train(layout.width)
    rows = training_rows(
        [prepared.rows[number]["train"] for number in placed.numbers],
        [prepared.configs[number].seed for number in placed.numbers],
        batch_size=prepared.config.batch_size,
        epoch=epoch,
    )[layout.fill]
    counts = program.counts_of(layout, programs.mesh)
    values, state, done = programs.values(layout, settings), placed.state, 0
    waiting: tuple[int, PyTree] | None = None
    for length in chunk_lengths(0, rows.shape[1], rows.shape[1], [programs.steps]):
        part = np.zeros((layout.width, programs.steps, rows.shape[2]), np.int32)
        part[:, :length] = rows[:, done : done + length]
        state, metrics = train(
            state,
            values,
            programs.arrays,
            program.divided(part, programs.mesh),
            program.shared(np.int32(length), programs.mesh),
            counts,
        )
        if waiting is not None:
            yield state, *_fetched(waiting, layout)
        done, waiting = done + length, (length, metrics)
    assert waiting is not None
    yield state, *_fetched(waiting, layout)


def scores(
    programs: Programs,
    placed: Placed,
    settings: Sequence[PyTree],
    split: str,
    *,
    best: bool = False,
) -> list[dict[str, float]]:
    """Returns each member's scores on its own images of a split."""
    layout, state = placed.layout, placed.best if best and placed.best is not None else placed.state
    numbers = placed.numbers
    rows, mask = programs.evaluation(numbers, split, layout.slots.tobytes(), layout.width)
    values = programs.values(layout, settings)
    counts = program.counts_of(layout, programs.mesh)
    found = programs.evaluate(state.variables(), values, programs.arrays, rows, mask, counts)
    found = jax.device_get(found)
    scores_of = programs.prepared.recipe(numbers[0]).task.scores
    batches = [
        [
            jax.tree.map(lambda leaf, i=i, slot=slot: leaf[slot, i], dict(found))
            for i in range(mask.shape[1])
        ]
        for slot in layout.slots
    ]
    return [
        evaluate.scores(evaluate.evaluate(lambda _, batch: batch, None, each, scores_of=scores_of))
        for each in batches
    ]


def with_best(programs: Programs, placed: Placed, better: Sequence[bool]) -> Placed:
    """Keeps the states of those members that are better than before as their best ones."""
    if placed.best is None:
        return dataclasses.replace(placed, best=jax.tree.map(jnp.copy, placed.state))
    mask = np.asarray(better, bool)[placed.layout.fill]
    on_devices = program.divided(mask, programs.mesh)
    return dataclasses.replace(placed, best=_chosen(on_devices, placed.state, placed.best))


@jax.jit
def _chosen(mask: jax.Array, first: PyTree, second: PyTree) -> PyTree:
    def of(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

    return jax.tree.map(of, first, second)


def _fetched(waiting: tuple[int, PyTree], layout: Layout) -> tuple[int, PyTree]:
    length, metrics = waiting
    fetched = jax.device_get(metrics)
    return length, jax.tree.map(lambda leaf: leaf[layout.slots][:, :length], fetched)


def _fill(slots: np.ndarray, width: int) -> np.ndarray:
    return Layout(slots, width, np.zeros(0, np.int32)).fill
