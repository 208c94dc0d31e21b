"""Records a profile of some training steps, and changes none of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax.errors import UserError
from cnnjax.train.compile import Train

_SPAN = re.compile(r"steps=(\d+):(\d+)")


def parse(text: str) -> range:
    """Returns the steps of `steps=10:20`: those after step 10, up to step 20.

    Raises:
      UserError: it is not of that form, or names no step.
    """
    found = _SPAN.fullmatch(text.strip())
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--profile {text}: write steps=FIRST:LAST, such as steps=10:20.")
    return range(int(found[1]), int(found[2]))


def check(span: range, first_step: int, last_step: int) -> None:
    """Raises a UserError unless a run makes these steps."""
    if span.start < first_step or span.stop > last_step:
        raise UserError(
            f"--profile steps={span.start}:{span.stop}: this run makes the steps {first_step} to "
            f"{last_step}: choose some of them."
        )


def profiled(train: Train, span: range, directory: Path, recorded: Callable[[], None]) -> Train:
    """Returns a trainer that makes the same chunks of steps and records some steps.

    Chunks are cut where the recorded steps begin and end, and their metrics put together again.

    Args:
      train: a trainer of `cnnjax.train.compile`.
      span: the steps.
      directory: where `jax.profiler` writes its trace.
      recorded: called when it has been written.
    """

    def wrapped(state: Any, first_step: int, chunks: Iterable[int]) -> Iterator[tuple[Any, Any]]:
        running, made, parts = False, first_step, list[Any]()
        pieces = list[tuple[int, bool]]()

        def lengths() -> Iterator[int]:
            nonlocal running
            step = first_step
            for chunk in chunks:
                end = step + chunk
                cuts = sorted({step, end} | {x for x in (span.start, span.stop) if step < x < end})
                for start, stop in itertools.pairwise(cuts):
                    pieces.append((stop, stop == end))
                    if start == span.start:
                        _start(directory)
                        running = True
                    yield stop - start
                step = end

        try:
            for state, metrics in train(state, made, lengths()):  # noqa: B020 - the trainer owns it
                made, whole = pieces.pop(0)
                parts.append(metrics)
                if running and made == span.stop:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    running = False
                    recorded()
                if whole:
                    together = jax.tree.map(lambda *each: np.concatenate(each), *parts)
                    parts = []
                    yield state, together
        finally:
            if running:
                jax.profiler.stop_trace()

    return wrapped


def _start(directory: Path) -> None:
    options = jax.profiler.ProfileOptions()
    # Every call of Python would be an event, and slow the steps that are measured.
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(directory), create_perfetto_trace=True, profiler_options=options)
