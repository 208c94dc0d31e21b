"""Drift and accuracy of one model's traffic, over sliding windows of its newest images."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnnjax.evaluation.drift import Reference, calibration_error, margins

# Answers that labels may still come for, and labels that accuracy is computed over.
REMEMBERED, LABELED_WINDOW = 10_000, 1000


class Window:
    """The newest `size` rows of numbers and their mean; the oldest give way."""

    def __init__(self, size: int, width: int):
        self.rows = np.zeros((size, width), np.float32)
        self.sum = np.zeros(width, np.float64)
        self.seen = 0

    def add(self, rows: np.ndarray) -> None:
        """Adds rows `[any number, width]`."""
        size = len(self.rows)
        self.seen += max(0, len(rows) - size)
        rows = rows[-size:]
        places = (self.seen + np.arange(len(rows))) % size
        # Rows that were never written are zero.
        self.sum += rows.sum(axis=0, dtype=np.float64) - self.rows[places].sum(
            axis=0, dtype=np.float64
        )
        self.rows[places] = rows
        before, self.seen = self.seen, self.seen + len(rows)
        if before // size != self.seen // size:
            # Once a round, so that rounding errors do not add up.
            self.sum = self.rows.sum(axis=0, dtype=np.float64)

    @property
    def full(self) -> bool:
        return self.seen >= len(self.rows)

    def mean(self) -> np.ndarray:
        """Returns the mean of the rows there are."""
        return self.sum / max(1, min(self.seen, len(self.rows)))


class DriftMonitor:
    """How far the newest images, answers and embeddings of a model are from its reference."""

    def __init__(self, reference: Reference):
        self.reference = reference
        answer_width, embedding_width = reference.widths
        self.answers = Window(reference.window, answer_width)
        self.embedded = Window(reference.window, embedding_width)

    def add(self, images: Any, logits: Any) -> None:
        """Adds images `[batch, height, width, channels]` and their logits `[batch, classes]`."""
        self.answers.add(self.reference.rows(images, logits))

    def add_embeddings(self, embeddings: Any) -> None:
        """Adds embeddings `[batch, features]`, of those images that were embedded."""
        if self.reference.embeds:
            self.embedded.add(self.reference.embedding_rows(embeddings))

    def scores(self) -> dict[str, float]:
        """Returns the score of each statistic whose window is full."""
        found: dict[str, Any] = {}
        if self.answers.full:
            found |= self.reference.scores(self.answers.mean())
        if self.reference.embeds and self.embedded.full:
            found |= self.reference.embedding_scores(self.embedded.mean())
        return {name: float(score) for name, score in found.items()}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said of the images of one request: classes, and log odds of each."""

    classes: tuple[int, ...]
    margins: tuple[float, ...]


class LabelMonitor:
    """Accuracy and calibration of the answers whose labels came back."""

    def __init__(self, *, remembered: int = REMEMBERED, window: int = LABELED_WINDOW):
        self.remembered = remembered
        self.answers: collections.OrderedDict[str, Answer] = collections.OrderedDict()
        self.labeled: collections.deque[tuple[float, bool]] = collections.deque(maxlen=window)
        self.seen = 0

    def answered(self, request_id: str, logits: Any) -> None:
        """Remembers what was said to a request; the longest ago is forgotten."""
        odds, classes = margins(logits)
        self.answers[request_id] = Answer(tuple(classes.tolist()), tuple(odds.tolist()))
        self.answers.move_to_end(request_id)
        if len(self.answers) > self.remembered:
            self.answers.popitem(last=False)

    def take(self, request_id: str) -> Answer | None:
        """Returns what was said to a request, and forgets it, so that it counts once."""
        return self.answers.pop(request_id, None)

    def label(self, answer: Answer, labels: Sequence[int]) -> None:
        """Counts an answer as right or wrong, image by image."""
        for odds, said, label in zip(answer.margins, answer.classes, labels, strict=True):
            self.labeled.append((odds, said == label))
            self.seen += 1

    def scores(self) -> dict[str, float]:
        """Returns `accuracy` and `calibration_error` over the newest labels; NaN without one."""
        if not self.labeled:
            return {"accuracy": math.nan, "calibration_error": math.nan}
        odds, right = (np.array(column) for column in zip(*self.labeled, strict=True))
        return {
            "accuracy": float(right.mean()),
            "calibration_error": calibration_error(odds, right),
        }
