"""Whether the input keeps up with the training step: images per second of each, alone."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from cnnjax.data.pipelines import Pipeline
from cnnjax.train.compile import compile_train
from cnnjax.train.state import TrainState
from cnnjax.train.step import TrainStep

# An input this much slower than the step slows training by more than noise does.
TOLERANCE = 0.9


@dataclasses.dataclass
class Repeated:
    """A pipeline of one batch, which is on the device already: what the step alone can take."""

    batch: dict[str, Any]
    batch_size: int
    num_examples: int
    steps_per_epoch: int
    batch_shapes: dict[str, Any]

    def batches(self, first_step: int) -> Iterator[dict[str, Any]]:
        """Yields the batch for ever."""
        return itertools.repeat(self.batch)


def repeated(data: Pipeline) -> Repeated:
    """Returns a pipeline of the first batch of another."""
    batch = jax.block_until_ready(next(iter(data.batches(0))))
    return Repeated(batch, data.batch_size, data.num_examples, 1, data.batch_shapes)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Images per second.

    Attributes:
      delivered: by the pipeline, when nobody trains.
      taken: by the training step, of a batch that is on the devices.
      streamed: whether the batches come from the host; else they are drawn on the devices.
    """

    delivered: float
    taken: float
    streamed: bool

    @property
    def keeps_up(self) -> bool:
        """Whether the step need not wait."""
        return self.delivered >= TOLERANCE * self.taken

    def __str__(self) -> str:
        where = "the host delivers" if self.streamed else "drawn on the devices at"
        verdict = "the input keeps up"
        if not self.keeps_up:
            verdict = f"the step waits {1 - self.delivered / self.taken:.0%} of the time"
        return (
            f"{where} {self.delivered:,.0f} images/s, the step takes {self.taken:,.0f}: {verdict}"
        )


def measure(
    make_step: Callable[[str | None], TrainStep],
    state: TrainState,
    data: Pipeline,
    *,
    mesh: Mesh,
    streamed: bool,
    budget_secs: float = 2.0,
) -> Rates:
    """Measures both, one after the other. On a CPU they share the cores when a run trains.

    Args:
      make_step, state, data, mesh: as for `cnnjax.train.compile.compile_train`; the state's arrays
        are used up.
      streamed: see `Rates`.
      budget_secs: for each, after its first batch.
    """
    one = repeated(data)
    train = compile_train(make_step, state, one, method="jit", mesh=mesh)
    steps = train(state, 0, itertools.repeat(1))
    taken = _per_sec(lambda: next(steps)[0], budget_secs)
    batches = iter(data.batches(0))
    delivered = _per_sec(lambda: next(batches), budget_secs)
    return Rates(data.batch_size * delivered, data.batch_size * taken, streamed)


def _per_sec(run: Callable[[], Any], budget_secs: float) -> float:
    """Returns calls per second, without the first; waits for what each returns."""
    jax.block_until_ready(run())
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < budget_secs or not count:
        jax.block_until_ready(run())
        count += 1
    return count / elapsed
