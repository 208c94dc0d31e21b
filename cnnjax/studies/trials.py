"""Many small fine-tuning runs: one program per method, fed with seeds and learning rates.

A way is a method of `make_method`, or one of those that train everything by another rule:
`scratch`, `layer-decay`, `gradual`, `l2-sp`. `prepare` makes of it what does not depend on the
seed; the compiled `Program` then makes a run a call.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax import checkpoint, optim, schedules
from cnnjax.data.dataset import Arrays
from cnnjax.data.pipelines import ResidentPipeline, gather
from cnnjax.finetune.base import Base
from cnnjax.finetune.groups import layer_groups
from cnnjax.finetune.load import Loaded, load
from cnnjax.finetune.methods import METHODS, make_method
from cnnjax.finetune.partition import join
from cnnjax.finetune.rates import gradual_unfreezing, l2_sp, layer_wise_decay, remember_start
from cnnjax.finetune.start import start
from cnnjax.finetune.wrapped import FineTuned
from cnnjax.rng import stream_key
from cnnjax.tasks.classification import classification
from cnnjax.train.state import TrainState, create_state
from cnnjax.train.step import TrainStep, make_step

PyTree = Any
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """How a network is adapted.

    Attributes:
      method: what is trained; see `cnnjax.finetune.make_method`.
      scratch: nothing is taken from the base.
      layer_decay: factor of the learning rate for each group further from the head.
      unfrozen_by: fraction of the steps by which the last group is trained too; 0: all at once.
      l2_sp: strength of the pull to the base's values; 0: none.
    """

    method: str = "full"
    scratch: bool = False
    layer_decay: float = 1.0
    unfrozen_by: float = 0.0
    l2_sp: float = 0.0


WAYS = {
    "scratch": Way(scratch=True),
    "layer-decay": Way(layer_decay=0.65),
    "gradual": Way(unfrozen_by=0.5),
    "l2-sp": Way(l2_sp=0.01),
}
L2_SP_NEW = 0.01


def find_way(name: str) -> Way:
    """Returns the way of that name: a key of `WAYS`, or a method, such as `lora:2`."""
    return WAYS.get(name) or Way(name)


def known_ways() -> list[str]:
    """Returns the names that a way begins with."""
    return [*WAYS, *METHODS]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A way for one model and base.

    Attributes:
      tuned: the model as the way trains it.
      step: `(learning_rate) -> (optimizer, step)`, of an array.
      begin: `seed -> variables` at the start.
      num_steps: of a run.
    """

    tuned: FineTuned
    step: Callable[[jax.Array], tuple[Any, TrainStep]]
    begin: Callable[[int], Variables]
    num_steps: int


def prepare(
    way: Way,
    model: Any,
    image_shape: tuple[int, int, int],
    loaded: Callable[[int, bool], Loaded],
    *,
    num_steps: int,
    normalize: Callable[[jax.Array], jax.Array],
    augment: Callable[..., Any] | None = None,
    norm_statistics: str = "auto",
) -> Prepared:
    """Returns all of a way that does not depend on the seed.

    Args:
      way: from `find_way`.
      model: the Linen module for the new task.
      image_shape: `[height, width, channels]`.
      loaded: `(seed, scratch) -> Loaded`, from `loader`.
      num_steps: of a run: Adam with a cosine schedule, of which a tenth is warm-up.
      normalize: images as stored -> what the model expects.
      augment: see `cnnjax.train.step.make_step`.
      norm_statistics: see `cnnjax.finetune.split_variables`; from scratch it is always `batch`.

    Raises:
      UserError: what the way trains, the model does not have.
    """
    statistics = "batch" if way.scratch else norm_statistics
    method = make_method(way.method, model, image_shape, norm_statistics=statistics)
    tuned = FineTuned(model, method)
    groups = layer_groups(model, image_shape)
    shape = schedules.make_schedule(
        "cosine", 1.0, total_steps=num_steps, warmup_steps=num_steps // 10
    )

    def step(learning_rate: jax.Array) -> tuple[Any, TrainStep]:
        def schedule(number: jax.Array) -> jax.Array:
            return learning_rate * shape(number)

        optimizer = optim.make_optimizer("adam", schedule)
        if way.layer_decay != 1:
            optimizer = layer_wise_decay(optimizer, groups, way.layer_decay)
        if way.unfrozen_by:
            each = max(1, round(num_steps * way.unfrozen_by / len(groups)))
            optimizer = gradual_unfreezing(optimizer, groups, each)
        pull = l2_sp(way.l2_sp, L2_SP_NEW) if way.l2_sp else None
        return optimizer, make_step(
            tuned,  # type: ignore[arg-type]
            optimizer,
            classification(num_outputs(model)),
            schedule=schedule,
            normalize=normalize,
            augment=augment,
            pull=pull,
        )

    def begin(seed: int) -> Variables:
        found = loaded(seed, way.scratch)
        variables = start(tuned, found, image_shape, stream_key(seed, "finetune", 0))
        return remember_start(variables, found.kept) if way.l2_sp else variables

    return Prepared(tuned, step, begin, num_steps)


def num_outputs(model: Any) -> int:
    """Returns the number of classes of a model of `cnnjax.models`: 2 for one logit."""
    return max(2, model.num_classes)


def loader(
    base: Base, model: Any, image_shape: tuple[int, int, int]
) -> Callable[[int, bool], Loaded]:
    """Returns `(seed, scratch) -> Loaded`: the base with a new head, or all reinitialized."""
    known: dict[tuple[int, bool], Loaded] = {}

    def loaded(seed: int, scratch: bool) -> Loaded:
        if (seed, scratch) not in known:
            new = (".*",) if scratch else ("head/.*",)
            key = stream_key(seed, "finetune", 0)
            known[seed, scratch] = load(base, model, image_shape, new=new, key=key)
        return known[seed, scratch]

    return loaded


def peak_bytes(compiled: Any) -> int:
    """Returns the memory that a compiled program reserves on a device, what it donates once."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


class Program:
    """The compiled run of a way: any seed, learning rate and choice of examples.

    Attributes:
      peak_bytes: memory of the whole run on the device, as the compiler says: state, examples,
        activations and gradients.
    """

    def __init__(self, prepared: Prepared, arrays: Arrays, batch_size: int, room: int = 0):
        """Compiles.

        Args:
          prepared: the way.
          arrays: examples; all calls have as many, or at most `room`.
          batch_size: per step; all examples where there are fewer.
          room: the most examples that a call has; 0: as many as here.
        """
        self._prepared = prepared
        self._batch_size = min(batch_size, len(arrays.label))
        self._room = max(room, len(arrays.label))
        arguments = self._arguments(arrays, 0, 0.0)
        compiled = jax.jit(self._run).lower(*arguments).compile()
        self._compiled = compiled
        self.peak_bytes = peak_bytes(compiled)

    def __call__(
        self, arrays: Arrays, seed: int, learning_rate: float
    ) -> tuple[TrainState, Variables, float]:
        """Makes a run.

        Returns:
          The state without what is frozen; all variables; seconds per step.
        """
        arguments = jax.block_until_ready(self._arguments(arrays, seed, learning_rate))
        started = time.perf_counter()
        state = jax.block_until_ready(self._compiled(*arguments))
        seconds = time.perf_counter() - started
        variables = {**state.variables(), "frozen": arguments[0]["frozen"]}
        return state, variables, seconds / self._prepared.num_steps

    def _arguments(self, arrays: Arrays, seed: int, learning_rate: float) -> tuple:
        data = ResidentPipeline(arrays, self._batch_size, seed=seed)
        indices = data.indices(0, self._prepared.num_steps)
        variables = jax.tree.map(jax.numpy.asarray, self._prepared.begin(seed))
        key = stream_key(seed, "train", 0)
        if data.num_examples > self._room:
            raise ValueError(f"{data.num_examples} examples, but room for {self._room}")
        # The indices name the first alone, so that what fills the room is never seen.
        rows = np.arange(self._room) % data.num_examples
        filled = {name: array[rows] for name, array in data.arrays.items()}
        return variables, filled, indices, np.float32(learning_rate), key

    def _run(
        self,
        variables: Variables,
        arrays: dict[str, jax.Array],
        indices: jax.Array,
        learning_rate: jax.Array,
        key: jax.Array,
    ) -> TrainState:
        optimizer, step = self._prepared.step(learning_rate)
        frozen = variables["frozen"]

        def body(number: jax.Array, state: TrainState) -> TrainState:
            # Not carried through the loop: what never changes need not be copied.
            state = dataclasses.replace(state, frozen=frozen)
            state, _ = step(state, gather(arrays, indices[number]))
            return dataclasses.replace(state, frozen={})

        state = dataclasses.replace(create_state(variables, optimizer, key), frozen={})
        return jax.lax.fori_loop(0, len(indices), body, state)


def with_old_head(variables: Mapping[str, Any], base: Base) -> Variables:
    """Returns fine-tuned variables with the head of the base: what is left of the old task."""
    params = {name: part for name, part in variables["params"].items() if name != "head"}
    head = {"head": base.variables["params"]["head"]}
    return {**variables, "params": join(params, head)}


def accuracy(
    eval_step: Callable[[Variables, dict[str, jax.Array]], dict[str, Any]],
    variables: Variables,
    batches: Iterable[dict[str, jax.Array]],
) -> float:
    """Returns the accuracy over all batches, which may lie on the device."""
    pairs = [eval_step(variables, batch)["accuracy"] for batch in batches]
    right, count = np.asarray(jax.device_get(pairs), np.float64).sum(axis=0)
    return float(right / count)


def checkpoint_bytes(state: TrainState) -> int:
    """Returns the size on disk of a checkpoint of this state: what is trained, and its moments."""
    with tempfile.TemporaryDirectory() as directory:
        saved = checkpoint.save(directory, state, {})
        return sum(path.stat().st_size for path in Path(saved).rglob("*") if path.is_file())
