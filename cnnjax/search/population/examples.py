"""Examples that members share: stored once, with the rows of each member's own splits.

Members of other seeds validate on other images of the same dataset, and train on other few labels:
what differs are rows, int32, not images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cnnjax.data.dataset import Split, columns
from cnnjax.data.pipelines import epoch_indices

Rows = dict[str, np.ndarray]


class Collected:
    """Examples, each of them once.

    Attributes:
      rows: for each dataset that was added the rows of each split.
    """

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self._parts: list[dict[str, np.ndarray]] = []
        self._places: dict[bytes, int] = {}

    def add(self, splits: Mapping[str, Split]) -> Rows:
        """Adds the splits of a dataset, `train`, `validation` and `test`; returns their rows."""
        found = {}
        for split, arrays in splits.items():
            found[split] = self._add(columns(arrays))
        self.rows.append(found)
        return found

    def _add(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        names = sorted(arrays)
        count = len(arrays[names[0]])
        if not count:
            return np.zeros(0, np.int32)
        flat = [np.ascontiguousarray(arrays[name]).reshape(count, -1) for name in names]
        content = np.concatenate([each.view(np.uint8).reshape(count, -1) for each in flat], axis=1)
        rows, new = np.zeros(count, np.int32), []
        for i, example in enumerate(content):
            known = len(self._places)
            rows[i] = self._places.setdefault(example.tobytes(), known)
            if rows[i] == known:
                new.append(i)
        if new:
            self._parts.append({name: arrays[name][new] for name in names})
        return rows

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns all examples, key -> `[examples, ...]`."""
        return {
            name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]
        }


def training_rows(
    rows: Sequence[np.ndarray], seeds: Sequence[int], *, batch_size: int, epoch: int
) -> np.ndarray:
    """Returns int32 `[members, steps, batch]`: what each member trains on in an epoch, in order.

    The order is that of `cnnjax.data.ResidentPipeline` with the member's seed.

    Args:
      rows: of each member's training split.
      seeds: of each member.
      batch_size: examples in a batch.
      epoch: counted from 0.
    """
    return np.stack(
        [
            own[epoch_indices(len(own), batch_size, seed, epoch)]
            for own, seed in zip(rows, seeds, strict=True)
        ]
    )


def evaluation_rows(rows: Sequence[np.ndarray], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 `[members, batches, batch]` and which of them count: every row once, in order.

    Members whose splits differ in size have as many batches as the largest.
    """
    batches = max(1, -(-max(map(len, rows)) // batch_size))
    found = np.zeros((len(rows), batches * batch_size), np.int32)
    mask = np.zeros(found.shape, bool)
    for i, own in enumerate(rows):
        found[i, : len(own)], mask[i, : len(own)] = own, True
    shape = len(rows), batches, batch_size
    return found.reshape(shape), mask.reshape(shape)
