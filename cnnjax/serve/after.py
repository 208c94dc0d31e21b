"""What happens after an answer, and never before it: observers are told, a shadow is asked."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from cnnjax.serve.logs import log
from cnnjax.serve.measures import Measures
from cnnjax.serve.models import Model, check_images
from cnnjax.serve.refusals import Refused

# (model, version, images, logits, request id), after an answer.
Observer = Callable[[str, str, np.ndarray, np.ndarray, str], None]
# Answers that observers have not been told of yet; more are dropped.
MOST_UNTOLD = 1024
# Observers hear of all answers of as long at once: waking their thread up for each slows the next.
GATHER_SECS = 0.02
SHADOW_SECS = 10.0


class Observing:
    """Observers, called one after another on a thread of their own."""

    def __init__(self, measures: Measures, observers: Sequence[Observer]) -> None:
        """Args: what counts the answers that they are told, and the observers."""
        self.observers, self._measures = tuple(observers), measures
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "observe")
        self._untold: collections.deque[tuple] = collections.deque()
        self._is_telling, self._lock = False, threading.Lock()

    def tell(
        self, model: str, version: str, images: np.ndarray, logits: np.ndarray, request_id: str
    ) -> None:
        """Has the observers called with an answer; what comes faster than they are is dropped."""
        if not self.observers:
            return
        with self._lock:
            if len(self._untold) >= MOST_UNTOLD:
                self._measures.observed.labels("dropped").inc()
                return
            self._untold.append((model, version, images, logits, request_id))
            if self._is_telling:
                return
            self._is_telling = True
        self._thread.submit(self._tell_all)

    def _tell_all(self) -> None:
        """Tells of answers until none comes for a while."""
        while True:
            time.sleep(GATHER_SECS)
            with self._lock:
                if not self._untold:
                    self._is_telling = False
                    return
            while self._untold:
                self._tell(self._untold[0])
                # Only now, so that those being told count among the untold.
                self._untold.popleft()

    def _tell(self, answer: tuple) -> None:
        for observer in self.observers:
            try:
                observer(*answer)
                self._measures.observed.labels("told").inc()
            except Exception as error:  # An observer must not stop the others.
                self._measures.observed.labels("failed").inc()
                log("observer_failed", error=repr(error))

    def close(self) -> None:
        """Tells what is left, and ends the thread."""
        self._thread.shutdown(wait=True)


def ask_shadow(
    model: Model, name: str, images: np.ndarray, sent: np.ndarray, measures: Measures
) -> asyncio.Task:
    """Asks the shadow of a model, and compares its probabilities with those that were `sent`.

    Args:
      model: whose rollout has a shadow.
      name: of the model.
      images: `[images, height, width, channels]`.
      sent: probabilities `[images, classes]`.
      measures: what counts the images.

    Returns:
      What is still going on; it never fails.
    """
    assert model.rollout is not None
    compared, shadow = model.compared, model.rollout.shadow

    async def compare() -> None:
        result = "dropped"
        try:
            batcher = model.loaded[shadow].batcher
            check_images(images, batcher.runtime)
            _, probabilities = await batcher.submit(images, deadline_secs=SHADOW_SECS)
            agreed = compared.agreed
            compared.add(sent, probabilities)
            result = "agreed" if compared.agreed - agreed == len(sent) else "differed"
        except Exception as error:  # A shadow must not hurt what it stands beside.
            compared.dropped += len(images)
            if not isinstance(error, Refused):
                log("shadow_failed", model=name, version=shadow, error=repr(error))
        measures.shadowed.labels(name, shadow, result).inc(len(images))

    return asyncio.get_running_loop().create_task(compare())
