"""Tries a reference on images that it was not made of: is it quiet on clean ones, and how soon does
it notice others?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from cnnjax.evaluation.drift import Reference, drifted
from cnnjax.serve.watch.monitor import DriftMonitor

# Images that are compared at a time between two looks at the alarms.
STEP = 10
Answer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Noticed:
    """What a reference said of a stream of images.

    Attributes:
      name: of what was done to the images.
      after: images until the first alarm; None where there was none.
      statistics: that were above their threshold then.
      images: that were looked at.
    """

    name: str
    after: int | None
    statistics: tuple[str, ...]
    images: int


def changed_images(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns images `[batch, height, width, channels]`, uint8, as a broken camera or pipeline
    might send them, by the name of what is wrong."""
    noise = np.random.default_rng(seed).normal(0.0, 25.5, images.shape)
    changed = {
        "inverted": 255 - images,
        "upside down": images[:, ::-1, ::-1],
        "darker by half": images // 2,
        "noise (0.1)": np.clip(images + noise, 0, 255).astype(np.uint8),
    }
    if images.shape[1] == images.shape[2]:
        changed["rotated by 90 degrees"] = np.rot90(images, axes=(1, 2))
    return changed


def watch_stream(
    reference: Reference, answer: Answer, clean: np.ndarray, after: np.ndarray, name: str
) -> Noticed:
    """Fills the window with clean images, then watches others come in, `STEP` at a time.

    Args:
      reference: what they are compared with.
      answer: images -> (logits, embeddings).
      clean: at least a window of images; more are watched, too.
      after: images that come after them.
      name: of the stream.
    """
    monitor = DriftMonitor(reference)
    images = np.concatenate([clean, after])
    answers = [answer(images[at : at + 250]) for at in range(0, len(images), 250)]
    logits, embeddings = map(np.concatenate, zip(*answers, strict=True))
    for at in range(0, len(images), STEP):
        rows = slice(at, at + STEP)
        monitor.add(images[rows], logits[rows])
        monitor.add_embeddings(embeddings[rows])
        if found := drifted(monitor.scores(), reference.thresholds):
            shown = min(at + STEP, len(images)) - len(clean)
            return Noticed(name, shown if len(after) else at + STEP, tuple(found), at + STEP)
    return Noticed(name, None, (), len(images))


def try_reference(
    reference: Reference, answer: Answer, images: np.ndarray, *, seed: int = 0
) -> list[Noticed]:
    """Returns what the reference says of images in random order, clean and changed.

    Args:
      reference: what they are compared with.
      answer: images -> (logits, embeddings).
      images: `[examples, height, width, channels]`, uint8, clean: of the test split.
      seed: of the order, and of the noise.
    """
    window = reference.window
    images = images[np.random.default_rng(seed).permutation(len(images))]
    found = [watch_stream(reference, answer, images, images[:0], "clean")]
    clean, rest = images[:window], images[window : 3 * window]
    for name, changed in changed_images(rest, seed).items():
        found.append(watch_stream(reference, answer, clean, changed, name))
    return found
