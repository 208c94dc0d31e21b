"""Makes, writes and reads the reference of `cnnjax.evaluation.drift`, and calibrates thresholds."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.evaluation.drift import (
    QUANTILE_BINS,
    Reference,
    calibration_error,
    image_values,
    margins,
)
from cnnjax.paths import expand

# Fewer say too little about the tails of what clean windows do.
LEAST_EXAMPLES = 1000
WINDOW, MOST_DIRECTIONS = 500, 16
# Siddiqi 2006: below this a population has not changed.
NO_CHANGE = 0.1
# Streams of so many images are to raise no alarm; of so many of them the largest score is taken,
# and a margin for what other clean data have that these have not.
STREAM_IMAGES, NUM_STREAMS, MARGIN = 10_000, 40, 1.5
VERSION = 1


def make_reference(
    images: Any,
    logits: Any,
    embeddings: Any = None,
    labels: Any = None,
    *,
    window: int = WINDOW,
    step: int = -1,
    seed: int = 0,
) -> Reference:
    """Makes a reference of clean images that were not trained on.

    Args:
      images: `[examples, height, width, channels]`, uint8, as the network gets them.
      logits: `[examples, classes]`, the network's answers.
      embeddings: `[examples, features]`, what enters its head; None to compare none.
      labels: `[examples]`; None where there are none.
      window: number of images that are compared at a time.
      step: of the checkpoint that answered.
      seed: of the streams that thresholds are calibrated by.

    Raises:
      UserError: too few examples, or a window out of range.
    """
    images, logits = np.asarray(images), np.asarray(logits)
    if len(images) < LEAST_EXAMPLES:
        raise UserError(
            f"a reference needs {LEAST_EXAMPLES:,} images that were not trained on, and there are "
            f"{len(images):,}: train with a larger validation split, or name other data."
        )
    check_window(window)
    own, other = slice(0, None, 2), slice(1, None, 2)
    values, (margin, predicted) = image_values(images[own]), margins(logits[own])
    num_classes = max(2, logits.shape[1])
    edges = {
        "image_mean": _quantiles(values["mean"]),
        "image_contrast": _quantiles(values["contrast"]),
        "confidence": _quantiles(margin),
    }
    center = directions = np.zeros(0, np.float32)
    if embeddings is not None:
        embeddings = np.asarray(embeddings, np.float32)
        center, directions = whitening(embeddings[own])
        white = (embeddings[own] - center) @ directions
        edges["embedding_distance"] = _quantiles(np.sum(white**2, axis=1))
    right = None if labels is None else predicted == np.asarray(labels)[own]
    made = Reference(
        window=window,
        edges=edges,
        fractions={},
        thresholds={},
        num_classes=num_classes,
        channels=images.shape[-1],
        center=center,
        directions=directions,
        accuracy=np.nan if right is None else float(right.mean()),
        calibration_error=np.nan if right is None else calibration_error(margin, right),
        examples=len(images),
        step=step,
    )
    rows = made.rows(images, logits)
    fractions = made.split(rows[own].mean(axis=0, dtype=np.float64))
    embedded = None
    if embeddings is not None:
        embedded = made.embedding_rows(embeddings)
        means = embedded[own].mean(axis=0, dtype=np.float64)
        fractions["embedding_distance"] = means[:QUANTILE_BINS]
    made = dataclasses.replace(made, fractions=fractions)
    thresholds = calibrate(made, rows[other], None if embedded is None else embedded[other], seed)
    return dataclasses.replace(made, thresholds=thresholds)


def check_window(window: int) -> None:
    """Raises a UserError for a number of images that no window has."""
    if not 50 <= window <= STREAM_IMAGES:
        raise UserError(f"--window {window}: give 50 to {STREAM_IMAGES:,} images.")


def calibrate(
    reference: Reference, rows: np.ndarray, embedded: np.ndarray | None, seed: int
) -> dict[str, float]:
    """Returns the score of each statistic above which a window is not clean.

    `NUM_STREAMS` streams of `STREAM_IMAGES` images are drawn from clean rows; of each, windows at
    ten places in each window's length are scored. The largest score of all, with a margin, is the
    threshold; what is below `NO_CHANGE` is no drift however rare it is.
    """
    generator = np.random.default_rng(seed)
    window, stride = reference.window, max(1, reference.window // 10)
    largest: dict[str, float] = {}
    for _ in range(NUM_STREAMS):
        drawn = generator.integers(0, len(rows), STREAM_IMAGES + window)
        scored = reference.scores(_window_means(rows[drawn], window, stride))
        if embedded is not None:
            scored |= reference.embedding_scores(_window_means(embedded[drawn], window, stride))
        for name, score in scored.items():
            largest[name] = max(largest.get(name, 0.0), float(score.max()))
    return {name: max(NO_CHANGE, MARGIN * score) for name, score in largest.items()}


def _window_means(rows: np.ndarray, window: int, stride: int) -> np.ndarray:
    ends = np.arange(window, len(rows) + 1, stride)
    total = np.concatenate(
        [np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0, dtype=np.float64)]
    )
    return (total[ends] - total[ends - window]) / window


def whitening(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `center [features]` and `directions [features, at most MOST_DIRECTIONS]`.

    The directions are those of the largest variance (principal components), divided by its root, so
    that `(embeddings - center) @ directions` has the identity as its covariance.
    """
    center = embeddings.mean(axis=0, dtype=np.float64)
    covariance = np.cov(embeddings.T.astype(np.float64), bias=True).reshape(len(center), -1)
    variances, vectors = np.linalg.eigh(covariance)
    largest = np.argsort(variances)[::-1][:MOST_DIRECTIONS]
    # Of a direction in which nothing varies there is no unit.
    kept = largest[variances[largest] > 1e-6 * max(variances.max(), 1e-12)]
    directions = vectors[:, kept] / np.sqrt(variances[kept])
    return center.astype(np.float32), directions.astype(np.float32)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Inner edges of bins that hold a tenth of the values each."""
    return np.quantile(values, np.arange(1, QUANTILE_BINS) / QUANTILE_BINS).astype(np.float32)


_TABLES = ("edges", "fractions", "thresholds")
_NUMBERS = (
    "window",
    "num_classes",
    "channels",
    "accuracy",
    "calibration_error",
    "examples",
    "step",
)


def save_reference(path: str | Path, reference: Reference) -> None:
    """Writes a reference as one npz file, by way of another so that a crash leaves no half."""
    arrays = {"center": reference.center, "directions": reference.directions}
    for table in _TABLES:
        arrays |= {f"{table}/{name}": value for name, value in getattr(reference, table).items()}
    numbers = {name: getattr(reference, name) for name in _NUMBERS} | {"version": VERSION}
    path = Path(expand(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        content = np.array(json.dumps(numbers))
        np.savez_compressed(file, **arrays, numbers=content)  # type: ignore[arg-type]
    temporary.replace(path)


def read_reference(path: str | Path) -> Reference:
    """Reads what `save_reference` wrote; nothing in it is run.

    Raises:
      UserError: no such file, or not one of these.
    """
    name = expand(path)
    try:
        with np.load(name, allow_pickle=False) as found:
            numbers = json.loads(str(found["numbers"]))
            tables: dict[str, Any] = {
                table: {
                    key.partition("/")[2]: found[key]
                    for key in found
                    if key.startswith(f"{table}/")
                }
                for table in _TABLES
            }
            center, directions = found["center"], found["directions"]
    except FileNotFoundError:
        raise UserError(
            f"there is no reference {name!r}: make it by cnnjax serve-reference --run RUN"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        # NumPy would have a file that it does not know unpickled.
        why = "no npz file of arrays" if "pickle" in str(error) else error
        raise UserError(
            f"the reference {name!r} is damaged ({why}): make it by cnnjax serve-reference"
        ) from None
    if numbers.pop("version", 0) != VERSION:
        raise UserError(f"the reference {name!r} is of another version of cnnjax: make it again")
    tables["thresholds"] = {key: float(value) for key, value in tables["thresholds"].items()}
    return Reference(**tables, **numbers, center=center, directions=directions)
