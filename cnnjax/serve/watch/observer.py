"""Connects monitors to a server: what was answered goes in, gauges and alarms come out.

watch = Watch({("digits", "1"): open_watched("runs/mnist_lenet")}, registry)
application(repository, observers=(watch.observe,))
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError, unknown_name
from cnnjax.evaluation import drift, references
from cnnjax.paths import expand
from cnnjax.serve.watch.gauges import Gauges
from cnnjax.serve.watch.monitor import Answer, DriftMonitor, LabelMonitor

# Answers are looked at so many images at a time, or after so long.
PENDING_IMAGES, PENDING_SECS, MOST_PENDING = 64, 1.0, 4096
# Embeddings are computed of so many images at once, for at most this fraction of the time.
EMBED_IMAGES, EMBED_FRACTION = 32, 0.2

Embed = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a model's traffic is compared with.

    Attributes:
      reference: of clean data; None to watch labels alone.
      class_names: that labels may be; empty where they are numbers alone.
      embed: `images [EMBED_IMAGES, height, width, channels] -> [EMBED_IMAGES, features]` by the
        network that the reference was made of; None to compare no embeddings.
    """

    reference: drift.Reference | None = None
    class_names: tuple[str, ...] = ()
    embed: Embed | None = None


def open_watched(run: str | Path, *, embeddings: bool = True) -> Watched:
    """Reads the reference of a run, and compiles what embeds images; no reference is no error.

    Raises:
      UserError: a damaged reference, or a run that cannot be read.
    """
    from cnnjax.run import load, report

    path = Path(expand(run)) / report.REFERENCE
    if not path.exists():
        return Watched()
    found = references.read_reference(path)
    if not (embeddings and found.embeds):
        return Watched(found)
    trained = load.load_classifier(run, found.step if found.step >= 0 else None)
    answer = report.answer_of(trained)

    def embed(images: np.ndarray) -> np.ndarray:
        return answer(images)[1]

    embed(np.zeros((EMBED_IMAGES, *trained.card["image_shape"]), np.uint8))
    return Watched(found, tuple(trained.card["class_names"]), embed)


class Watch:
    """Watches the traffic of models by (name, version); may be called from any thread."""

    def __init__(
        self,
        watched: Mapping[tuple[str, str], Watched],
        registry: Any,
        *,
        say: Callable[[dict[str, Any]], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args: what is watched, a registry of prometheus-client, who hears of alarms, seconds."""
        self.gauges, self.say, self.clock = Gauges(registry), say, clock
        self._models = {key: _Model(key, each, self) for key, each in watched.items()}

    def observe(
        self, model: str, version: str, images: np.ndarray, logits: np.ndarray, request_id: str
    ) -> None:
        """Hears of an answer; most calls only keep it; now and then all are looked at."""
        if (found := self._models.get((model, version))) is not None:
            found.keep(images, logits, request_id)

    def flush(self) -> None:
        """Looks at all that was answered up to now."""
        for each in self._models.values():
            with each.lock:
                each.look()

    def alarms(self) -> dict[tuple[str, str], list[str]]:
        """Returns the statistics that have drifted, by model."""
        return {key: sorted(each.alarms) for key, each in self._models.items()}

    def describe(self, model: str) -> dict[str, Any]:
        """Returns scores, thresholds and alarms of a model's versions; KeyError for no such one."""
        found = {key[1]: each for key, each in self._models.items() if key[0] == model}
        if not found:
            raise KeyError(f"no model {model[:100]!r} is watched")
        return {"name": model, "versions": {name: each.said() for name, each in found.items()}}

    def feedback(self, model: str, content: Any) -> dict[str, Any]:
        """Takes the true labels of an answer, and returns the accuracy so far.

        Args:
          model: its name.
          content: `request_id`, and `label` (a class's name or number) or `labels` (one for each
            image). A server that has not kept the answer, as another replica's, takes `predicted`
            and `confidence` with it.

        Raises:
          UserError: what is wrong with it.
          KeyError: no such model, or no such request that still waits for a label.
        """
        names = [key for key in self._models if key[0] == model]
        if not names:
            raise KeyError(f"no model {model[:100]!r} is watched")
        if not isinstance(content, dict):
            raise UserError('send {"request_id": ID, "label": CLASS}')
        for each in (self._models[key] for key in names):
            with each.lock:
                each.look()
                if (answer := each.answer_to(content)) is not None:
                    return each.label(answer, content)
        raise KeyError(
            "no answer to this request waits for a label: it was labeled already, is older than "
            "10,000 others, or was given by another server (then send predicted and confidence)"
        )


class _Model:
    """One model's monitors, and its answers that were not looked at yet."""

    def __init__(self, key: tuple[str, str], watched: Watched, watch: Watch):
        self.key, self.watched, self.watch = key, watched, watch
        self.lock = threading.Lock()
        self.labels = LabelMonitor()
        self.drift = None if watched.reference is None else DriftMonitor(watched.reference)
        self.pending: list[tuple[np.ndarray, np.ndarray, str]] = []
        self.pending_images, self.looked = 0, watch.clock()
        self.embed_after = 0.0
        self.alarms: set[str] = set()
        if watched.reference is not None:
            for name, threshold in watched.reference.thresholds.items():
                watch.gauges.threshold.labels(*key, name).set(threshold)
            watch.gauges.reference_accuracy.labels(*key).set(watched.reference.accuracy)

    def keep(self, images: np.ndarray, logits: np.ndarray, request_id: str) -> None:
        with self.lock:
            if self.pending_images >= MOST_PENDING:
                self.watch.gauges.skipped.labels(*self.key).inc(len(images))
                return
            self.pending.append((images, logits, request_id))
            self.pending_images += len(images)
            due = self.watch.clock() - self.looked > PENDING_SECS
            if self.pending_images >= PENDING_IMAGES or due:
                self.look()

    def look(self) -> None:
        """Gives the monitors what was kept; the lock is held."""
        pending, self.pending, self.pending_images = self.pending, [], 0
        self.looked = self.watch.clock()
        if not pending:
            return
        for _, logits, request_id in pending:
            self.labels.answered(request_id, logits)
        if self.drift is None:
            return
        by_shape: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
        for images, logits, _ in pending:
            by_shape.setdefault(images.shape[1:], []).append((images, logits))
        for parts in by_shape.values():
            images, logits = (np.concatenate(each) for each in zip(*parts, strict=True))
            self.drift.add(images, logits)
            self.embed(images)
        self.show()

    def embed(self, images: np.ndarray) -> None:
        """Embeds some of the images, unless that took its part of the time already."""
        assert self.drift is not None
        if self.watched.embed is None or self.watch.clock() < self.embed_after:
            return
        began = self.watch.clock()
        images = images[-EMBED_IMAGES:]
        padding = [(0, EMBED_IMAGES - len(images))] + [(0, 0)] * (images.ndim - 1)
        embeddings = self.watched.embed(np.pad(images, padding))[: len(images)]
        self.drift.add_embeddings(embeddings)
        secs = self.watch.clock() - began
        self.embed_after = began + secs / EMBED_FRACTION

    def show(self) -> None:
        """Sets the gauges, and says which alarms are new and which are over."""
        assert self.drift is not None and self.watched.reference is not None
        gauges, scores = self.watch.gauges, self.drift.scores()
        for name, score in scores.items():
            gauges.drift.labels(*self.key, name).set(score)
        for kind, window in (("answers", self.drift.answers), ("embeddings", self.drift.embedded)):
            gauges.window.labels(*self.key, kind).set(min(window.seen, len(window.rows)))
        now = set(drift.drifted(scores, self.watched.reference.thresholds))
        for name in sorted(now ^ self.alarms):
            self.watch.say(
                {
                    "event": "drift" if name in now else "drift_over",
                    "model": self.key[0],
                    "version": self.key[1],
                    "statistic": name,
                    "score": round(scores[name], 4),
                    "threshold": round(self.watched.reference.thresholds[name], 4),
                }
            )
        self.alarms = now

    def said(self) -> dict[str, Any]:
        """Returns what `Watch.describe` says of one version."""
        with self.lock:
            self.look()
            reference = self.watched.reference
            if self.drift is None or reference is None:
                return {"watched": False}
            return {
                "watched": True,
                "window": reference.window,
                "images": self.drift.answers.seen,
                "scores": self.drift.scores(),
                "thresholds": reference.thresholds,
                "drifted": sorted(self.alarms),
            }

    def answer_to(self, content: dict[str, Any]) -> Answer | None:
        if "predicted" in content:
            odds = _odds(content.get("confidence"))
            return Answer((self.number(content["predicted"]),), (odds,))
        request_id = content.get("request_id")
        if not isinstance(request_id, str):
            raise UserError('send {"request_id": ID, "label": CLASS}')
        return self.labels.take(request_id)

    def label(self, answer: Answer, content: dict[str, Any]) -> dict[str, Any]:
        given = content.get("labels", [content.get("label")])
        try:
            if not isinstance(given, list) or len(given) != len(answer.classes):
                raise UserError(
                    f"the request had {len(answer.classes)} images: send as many labels"
                )
            numbers = [self.number(each) for each in given]
        except UserError:
            if "predicted" not in content:
                # A mistyped label can be sent again.
                self.labels.answers[content["request_id"]] = answer
            raise
        self.labels.label(answer, numbers)
        for said, number in zip(answer.classes, numbers, strict=True):
            result = "right" if said == number else "wrong"
            self.watch.gauges.labels.labels(*self.key, result).inc()
        scores = self.labels.scores()
        self.watch.gauges.accuracy.labels(*self.key).set(scores["accuracy"])
        self.watch.gauges.calibration.labels(*self.key).set(scores["calibration_error"])
        return {"model": self.key[0], "version": self.key[1], "labels": self.labels.seen, **scores}

    def number(self, label: Any) -> int:
        """Returns the number of a class that is named or numbered."""
        names = self.watched.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        reference = self.watched.reference
        classes = len(names) or (reference.num_classes if reference else 0)
        if isinstance(label, int) and not isinstance(label, bool):
            if label >= 0 and (not classes or label < classes):
                return label
            raise UserError(f"label {label}: give a class from 0 to {classes - 1}")
        if isinstance(label, str) and names:
            raise unknown_name("class", label[:100], names)
        raise UserError("a label is the name or the number of a class")


def _odds(confidence: Any) -> float:
    if not isinstance(confidence, int | float) or not 0 < confidence <= 1:
        raise UserError("with predicted goes its confidence, above 0 and up to 1")
    confidence = min(float(confidence), 1 - 1e-12)
    return float(np.log(confidence / (1 - confidence)))
