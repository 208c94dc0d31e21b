"""How many requests each key may send: a token bucket for each."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

from cnnjax.serve.guard.keys import Identity
from cnnjax.serve.guard.refusal import Refused


def take(
    level: float, elapsed_secs: float, *, per_second: float, burst: int
) -> tuple[float, float]:
    """Takes one token from a bucket that fills all the time.

    Args:
      level: of the bucket at the last request.
      elapsed_secs: since then.
      per_second: tokens that come in.
      burst: what it holds.

    Returns:
      The new level, and the seconds until there is a token: 0 where one was taken.
    """
    level = min(float(burst), level + max(0.0, elapsed_secs) * per_second)
    return (level - 1.0, 0.0) if level >= 1.0 else (level, (1.0 - level) / per_second)


class Rates:
    """The buckets of all keys that have a rate; the longest unused go first beyond `most`."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = 10_000):
        self.clock, self.most = clock, most
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def check(self, identity: Identity) -> None:
        """Raises Refused, with the time to wait, for a key that has sent too many requests."""
        if identity.per_second <= 0:
            return
        burst = identity.burst or max(1, round(2 * identity.per_second))
        now = self.clock()
        with self._lock:
            level, last = self._buckets.pop(identity.name, (float(burst), now))
            level, wait_secs = take(level, now - last, per_second=identity.per_second, burst=burst)
            self._buckets[identity.name] = (level, now)
            if len(self._buckets) > self.most:
                self._buckets.popitem(last=False)
        if wait_secs:
            raise Refused(
                "over_rate",
                f"{identity.per_second:g} per second",
                retry_after=wait_secs,
                who=identity.name,
            )
