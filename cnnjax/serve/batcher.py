"""Requests that arrive together are computed together.

    batcher = Batcher(runtime, Limits(delay_secs=0.002, queue_images=256, concurrency=1))
    logits, probabilities = await batcher.submit(images, deadline_secs=1.0)
    await batcher.close()

A batch starts when it is full, or when its oldest image has waited for the delay, and a slot is
free. While all slots compute, requests gather: the next batch takes them all, up to the largest.
After a batch that took long, the next one waits a little for as many images as there were: clients
that were answered ask again, and half as many batches are computed. A request of more images than
one batch holds is computed in several. The queue is bounded: what does
not fit is refused at once, with the seconds after which another try may succeed.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.serve.refusals import Busy, Late, Unavailable
from cnnjax.serve.runtime import Runtime

# Of the seconds that an image takes, a moving average: the weight of the newest batch.
NEWEST = 0.1
# A lone image that takes less is computed on the event loop: waking a thread up takes as long.
QUICK_SECS = 1e-3
# For how long such images are computed before other requests are read.
TURN_SECS = 2e-3
# Above as many images a batch, requests gather while a thread computes, and share the next batch.
ALONE = 1.2
# How long answered clients are waited for, as a part of what their batch took, and the least that
# is worth it.
GATHER, LEAST_GATHER_SECS = 0.15, 2e-3

# Logits and probabilities.
Result = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long and how many images wait.

    Attributes:
      delay_secs: how long the oldest image waits for others while a slot is free.
      queue_images: images that may wait; more are refused.
      concurrency: batches that are computed at the same time.
    """

    delay_secs: float = 0.0
    queue_images: int = 256
    concurrency: int = 1


@dataclasses.dataclass
class _Waiting:
    """A request in the queue: its images from `sent` on wait, those before it are computed."""

    images: np.ndarray
    future: asyncio.Future
    arrived: float
    parts: dict[int, Result] = dataclasses.field(default_factory=dict)
    sent: int = 0
    answered: int = 0


@dataclasses.dataclass(frozen=True)
class _Part:
    """Images of a request that are computed in one batch, and where they start in it."""

    request: _Waiting
    start: int
    images: np.ndarray


@dataclasses.dataclass(frozen=True)
class Computed:
    """What is known of a batch when it is done.

    Attributes:
      images: in it, without those that filled the bucket up.
      bucket: the batch size that was computed.
      secs: it took.
      waited_secs: the time in the queue of each of its requests.
      failed: whether the runtime raised.
    """

    images: int
    bucket: int
    secs: float
    waited_secs: tuple[float, ...]
    failed: bool


def check_limits(limits: Limits) -> None:
    """Raises a UserError for limits out of range."""
    if not 0 <= limits.delay_secs <= 10:
        raise UserError(f"--delay-ms {limits.delay_secs * 1e3:g}: give 0 to 10000.")
    if limits.queue_images < 1:
        raise UserError(f"--queue {limits.queue_images}: give room for 1 image or more.")
    if not 1 <= limits.concurrency <= 64:
        raise UserError(f"--concurrency {limits.concurrency}: give 1 to 64 batches at a time.")


class Batcher:
    """The queue of one version of a model: filled on an event loop, emptied by threads."""

    def __init__(
        self,
        runtime: Runtime,
        limits: Limits | None = None,
        *,
        on_batch: Callable[[Computed], None] | None = None,
    ) -> None:
        """Args: the runtime, the limits, and what is told of each batch that is done."""
        self.runtime = runtime
        self.limits = limits or Limits()
        check_limits(self.limits)
        self._on_batch = on_batch or (lambda computed: None)
        self._slots = self.limits.concurrency if runtime.parallel else 1
        self._threads = concurrent.futures.ThreadPoolExecutor(self._slots, "batch")
        self._queues: dict[tuple[int, ...], collections.deque[_Waiting]] = {
            shape: collections.deque() for shape in runtime.shapes
        }
        # Of the queues, the images in them and the slots in use, which threads look at too.
        self._lock = threading.Lock()
        self._queued = self._running = 0
        self._timer: asyncio.Handle | None = None
        self._secs_per_image = 1e-3
        self._images_per_batch = 1.0
        # Until when the next batch waits for how many images.
        self._gather_until, self._expected = 0.0, 0
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def queued(self) -> int:
        """The images that wait; those of clients that have gone may still be among them."""
        return self._queued

    async def submit(self, images: np.ndarray, *, deadline_secs: float | None = None) -> Result:
        """Returns logits and probabilities `[images, classes]`.

        A caller that is cancelled leaves the queue: what was not computed yet will not be.

        Args:
          images: `[images, height, width, channels]` of one of the runtime's shapes, at least one.
          deadline_secs: after which the answer is of no use; None for no such time.

        Raises:
          Busy: the queue is full.
          Late: the deadline passed.
          Unavailable: the batcher is closing.
        """
        if self._closing:
            raise Unavailable("the model is being unloaded: try again.", retry_after=1)
        if deadline_secs is not None and deadline_secs <= 0:
            raise Late("the deadline has passed.")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(images, loop.create_future(), time.monotonic())
        with self._lock:
            queued = self._room_for(len(images))
            self._queues[images.shape[1:]].append(waiting)
            self._queued += len(images)
            self._idle.clear()
        if self._timer is None:
            # Requests that arrive in the same turn of the loop share a batch.
            self._timer = loop.call_soon(self._start)
        elif queued < self._enough() <= queued + len(images):
            self._timer.cancel()
            self._timer = loop.call_soon(self._start)
        try:
            if deadline_secs is None:
                return await waiting.future
            async with asyncio.timeout(deadline_secs):
                return await waiting.future
        except TimeoutError:
            raise Late(f"no answer within the deadline of {deadline_secs:.3g} s.") from None

    def _enough(self) -> int:
        """Returns the images with which a batch need not wait for others."""
        largest = self.runtime.largest_batch
        is_gathering = time.monotonic() < self._gather_until
        return min(largest, self._expected) if is_gathering else largest

    def _room_for(self, count: int) -> int:
        """Returns the images that wait; raises Busy where so many more are too many.

        A request larger than the queue is let in when nothing else waits.
        """
        for is_last_try in (False, True):
            queued = self._queued
            if not queued or queued + count <= self.limits.queue_images:
                return queued
            if not is_last_try:
                self._forget_gone()
        wait = self._secs_per_image * queued / self._slots
        raise Busy(f"{queued} images are waiting: try again later.", retry_after=wait)

    async def close(self) -> None:
        """Answers what is in the queue and lets nothing new in."""
        self._closing = True
        if self._timer is not None:
            # What waits for others need not any longer.
            self._timer.cancel()
            self._start()
        await self._idle.wait()
        self._threads.shutdown(wait=False)

    def _forget_gone(self) -> None:
        """Drops the requests whose clients are gone or whose deadlines have passed."""
        for shape, queue in self._queues.items():
            # Asked once each: what a thread looks at the event loop may change.
            is_gone = [each.future.done() for each in queue]
            if any(is_gone):
                pairs = list(zip(queue, is_gone, strict=True))
                self._queued -= sum(len(each.images) - each.sent for each, gone in pairs if gone)
                self._queues[shape] = collections.deque(each for each, gone in pairs if not gone)

    def _start(self) -> None:
        """Gives free slots batches; sets the timer where images wait for others."""
        self._timer = None
        end = time.monotonic() + TURN_SECS
        while here := self._hand_out():
            found = self._computed(here)
            with self._lock:
                self._running -= 1
            self._answer(here, *found)
            if time.monotonic() > end:
                # Other requests have their turn, too.
                self._timer = asyncio.get_running_loop().call_soon(self._start)
                return

    def _hand_out(self) -> list[_Part]:
        """Gives free slots batches; returns one that had better be computed here, if any."""
        loop = asyncio.get_running_loop()
        with self._lock:
            while self._running < self._slots:
                taken, due = self._take()
                if not taken:
                    if due is not None:
                        wait = due - time.monotonic()
                        self._timer = loop.call_later(max(0.0, wait), self._start)
                    break
                self._running += 1
                if self._is_quick(taken):
                    return taken
                self._threads.submit(self._compute, taken, loop)
            if not self._running and not any(self._queues.values()):
                self._idle.set()
        return []

    def _is_quick(self, taken: list[_Part]) -> bool:
        """Whether a batch had better be computed at once than by a thread."""
        return (
            len(taken) == len(taken[0].images) == self._running == 1
            and self._images_per_batch < ALONE
            and self.runtime.lone_secs < QUICK_SECS
        )

    def _take(self) -> tuple[list[_Part], float | None]:
        """Takes up to a largest batch of the shape whose oldest request has waited longest.

        Returns:
          The parts of the batch; none where nothing waits, or where the delay is not over: then
          also the time at which it is.
        """
        self._forget_gone()
        queues = [queue for queue in self._queues.values() if queue]
        if not queues:
            return [], None
        queue = min(queues, key=lambda queue: queue[0].arrived)
        room = self.runtime.largest_batch
        due = queue[0].arrived + self.limits.delay_secs
        count = sum(len(each.images) - each.sent for each in queue)
        if count < self._enough():
            due = max(due, self._gather_until)
        if count < room and time.monotonic() < due and not self._closing:
            return [], due
        taken = []
        while queue and room:
            first = queue[0]
            part = first.images[first.sent : first.sent + room]
            taken.append(_Part(first, first.sent, part))
            first.sent += len(part)
            self._queued -= len(part)
            room -= len(part)
            if first.sent == len(first.images):
                queue.popleft()
        return taken, None

    def _compute(self, taken: list[_Part], loop: asyncio.AbstractEventLoop) -> None:
        """Computes a batch, and those that wait when it is done; runs on a thread.

        The next batch does not wait for the event loop, which may be busy with other requests.
        """
        while taken:
            done, found = taken, self._computed(taken)
            with self._lock:
                self._gather(sum(len(part.images) for part in done), secs=found[1])
                taken, _ = self._take()
                self._running -= not taken
            loop.call_soon_threadsafe(self._answer_and_start, done, *found)

    def _gather(self, count: int, secs: float) -> None:
        """Has the next batch wait for the clients of one of `count` images that took `secs`."""
        wait, expected = GATHER * secs, count + self._queued
        if wait >= LEAST_GATHER_SECS and expected > 1:
            self._gather_until, self._expected = time.monotonic() + wait, expected

    def _computed(self, taken: list[_Part]) -> tuple[Result | Exception, float, tuple[float, ...]]:
        """Computes a batch; returns the answer, the seconds it took, and those its requests
        waited."""
        began = time.perf_counter()
        now = time.monotonic()
        waited = tuple(now - part.request.arrived for part in taken)
        result: Result | Exception
        try:
            result = self.runtime.run_parts([part.images for part in taken])
        except Exception as error:  # The requests of the batch raise it.
            result = error
        return result, time.perf_counter() - began, waited

    def _answer(
        self,
        taken: list[_Part],
        result: Result | Exception,
        secs: float,
        waited: tuple[float, ...],
    ) -> None:
        """Gives every request of a batch its rows."""
        count = sum(len(part.images) for part in taken)
        self._secs_per_image += NEWEST * (secs / count - self._secs_per_image)
        self._images_per_batch += NEWEST * (count - self._images_per_batch)
        is_failed = isinstance(result, Exception)
        self._on_batch(Computed(count, self.runtime.bucket(count), secs, waited, is_failed))
        at = 0
        for part in taken:
            rows = slice(at, at + len(part.images))
            at += len(part.images)
            if part.request.future.done():
                continue
            if isinstance(result, Exception):
                part.request.future.set_exception(result)
            else:
                _give(part, result[0][rows], result[1][rows])

    def _answer_and_start(self, taken: list[_Part], *found: Any) -> None:
        """Answers a batch that a thread has computed, and starts what waits."""
        self._answer(taken, *found)
        if self._timer is None:
            self._start()


def _give(part: _Part, logits: np.ndarray, probabilities: np.ndarray) -> None:
    """Adds rows to a request's answer; the last ones complete it.

    With several slots a later part may be done before an earlier one.
    """
    request = part.request
    request.parts[part.start] = logits, probabilities
    request.answered += len(logits)
    if request.answered == len(request.images):
        found = [request.parts[start] for start in sorted(request.parts)]
        pairs = zip(*found, strict=True)
        whole = (rows[0] if len(rows) == 1 else np.concatenate(rows) for rows in pairs)
        request.future.set_result(tuple(whole))
