"""What a network's inputs and answers look like on clean data, and how far others are from it.

    reference = make_reference(images, logits, embeddings, labels)
    rows = reference.rows(images, logits)               # one row for each image
    reference.scores(rows.mean(axis=0))                 # {"image_mean": 0.01, ...}

Each image becomes a row of numbers whose mean over a window of images holds all that is compared:
histograms, and the mean of the projected embeddings. A histogram's distance from the reference is
the population stability index (Siddiqi 2006, "Credit Risk Scorecards", chapter 9), which is
Jeffreys' divergence between the two; under 0.1 it is taken for no change. The distance of two
Gaussians of one covariance by the same divergence is the squared Mahalanobis distance of their
means, so that embeddings have the same scale.

Thresholds are calibrated: half of the data is the reference, and streams of images drawn from the
other half say how far windows of clean data get from it.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.paths import expand

# Fewer say too little about the tails of what clean windows do.
LEAST_EXAMPLES = 1000
WINDOW = 500
QUANTILE_BINS, PIXEL_BINS, MOST_CLASS_BINS, MOST_DIRECTIONS = 10, 16, 20, 16
# Siddiqi 2006: below this a population has not changed.
NO_CHANGE = 0.1
# Streams of so many images are to raise no alarm; of so many of them the largest score is taken,
# and a margin for what other clean data have that these have not.
STREAM_IMAGES, NUM_STREAMS, MARGIN = 10_000, 40, 1.5
PREDICTED = ("image_mean", "image_contrast", "pixel_values", "predicted_class", "confidence")
EMBEDDED = ("embedding_distance", "embedding_mean")
VERSION = 1

Scores = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What windows of images are compared with.

    Attributes:
      window: number of images that are compared at a time.
      edges: inner borders of the bins, for each statistic that is put into quantiles.
      fractions: of the reference's images in each bin, for each histogram.
      thresholds: for each statistic the score above which it has drifted.
      num_classes: that the network tells apart.
      channels: of the images.
      center: mean embedding `[features]`; empty without embeddings.
      directions: `[features, directions]`: `(embedding - center) @ directions` is white.
      accuracy: on the reference's images; NaN without labels.
      calibration_error: likewise.
      examples: images that the reference was made of.
      step: of the checkpoint; -1 where it is not known.
    """

    window: int
    edges: dict[str, np.ndarray]
    fractions: dict[str, np.ndarray]
    thresholds: dict[str, float]
    num_classes: int
    channels: int
    center: np.ndarray
    directions: np.ndarray
    accuracy: float
    calibration_error: float
    examples: int
    step: int = -1

    @property
    def embeds(self) -> bool:
        """Whether it compares embeddings."""
        return self.directions.size > 0

    def rows(self, images: Any, logits: Any) -> np.ndarray:
        """Returns one row for each image, of what is known without embeddings.

        Args:
          images: `[batch, height, width, channels]`, uint8 or floats from 0 to 1.
          logits: `[batch, classes]`, or `[batch, 1]` of a network of one logit.

        Returns:
          float32 `[batch, bins]`, whose means `scores` takes.
        """
        values = image_values(images)
        margin, predicted = margins(logits)
        return np.concatenate(
            [
                one_hot(np.searchsorted(self.edges["image_mean"], values["mean"]), QUANTILE_BINS),
                one_hot(
                    np.searchsorted(self.edges["image_contrast"], values["contrast"]), QUANTILE_BINS
                ),
                values["pixels"],
                one_hot(class_bins(predicted, self.num_classes), class_bins_of(self.num_classes)),
                one_hot(np.searchsorted(self.edges["confidence"], margin), QUANTILE_BINS),
            ],
            axis=1,
        )

    def embedding_rows(self, embeddings: Any) -> np.ndarray:
        """Returns one row for each image, of what its embedding `[batch, features]` says."""
        white = (np.asarray(embeddings, np.float32) - self.center) @ self.directions
        bins = np.searchsorted(self.edges["embedding_distance"], np.sum(white**2, axis=1))
        return np.concatenate([one_hot(bins, QUANTILE_BINS), white], axis=1)

    def scores(self, mean_row: np.ndarray) -> Scores:
        """Returns how far a window is from the reference, by statistic.

        Args:
          mean_row: `[..., bins]`, means over windows of what `rows` returned.
        """
        return {
            name: stability_index(part, self.fractions[name], self.window)
            for name, part in self.split(np.asarray(mean_row, np.float64)).items()
        }

    @property
    def widths(self) -> tuple[int, int]:
        """The lengths of the rows of `rows` and of `embedding_rows`."""
        answers = sum(len(self.fractions[name]) for name in PREDICTED)
        return answers, QUANTILE_BINS + self.directions.shape[-1] if self.embeds else 0

    def split(self, mean_row: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the histograms `[..., bins]` that a row of `rows` holds, by statistic."""
        pixels, classes = self.channels * PIXEL_BINS, class_bins_of(self.num_classes)
        sizes = (QUANTILE_BINS, QUANTILE_BINS, pixels, classes, QUANTILE_BINS)
        parts = np.split(mean_row, np.cumsum(sizes)[:-1], axis=-1)
        return dict(zip(PREDICTED, parts, strict=True))

    def embedding_scores(self, mean_row: np.ndarray) -> Scores:
        """Returns how far embeddings are, of means `[..., bins]` of what `embedding_rows` gave."""
        bins, white = np.split(np.asarray(mean_row, np.float64), [QUANTILE_BINS], axis=-1)
        reference = self.fractions["embedding_distance"]
        return {
            "embedding_distance": stability_index(bins, reference, self.window),
            "embedding_mean": np.sum(white**2, axis=-1),
        }


def stability_index(fractions: np.ndarray, reference: np.ndarray, count: int) -> np.ndarray:
    """Returns the population stability index of histograms: `sum (p - q) log(p / q)`.

    Half an example is added to each bin, so that an empty one counts for much and not for all.

    Args:
      fractions: `[..., bins]`, of the images in each bin.
      reference: `[bins]`, likewise of the reference.
      count: images in a window.
    """
    bins = len(reference)
    share, expected = (
        (np.asarray(p) * count + 0.5) / (count + 0.5 * bins) for p in (fractions, reference)
    )
    return np.sum((share - expected) * np.log(share / expected), axis=-1)


def image_values(images: Any) -> dict[str, np.ndarray]:
    """Returns each image's mean and contrast (standard deviation) in `[0, 1]`, and its histogram.

    Args:
      images: `[batch, height, width, channels]`, uint8 or floats from 0 to 1.

    Returns:
      `mean [batch]`, `contrast [batch]`, `pixels [batch, channels * PIXEL_BINS]`: fractions of the
      pixels of each channel by value, all together 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = np.clip(images * 255.0 + 0.5, 0, 255).astype(np.uint8)
    batch, channels = len(images), images.shape[-1]
    flat = images.reshape(batch, -1)
    # A bin's number for each pixel, apart for each image and channel: one count does them all.
    bins = (images.reshape(batch, -1, channels) // (256 // PIXEL_BINS)).astype(np.int64)
    offset = np.arange(batch * channels).reshape(batch, 1, channels) * PIXEL_BINS
    counts = np.bincount((bins + offset).ravel(), minlength=batch * channels * PIXEL_BINS)
    pixels = counts.reshape(batch, channels * PIXEL_BINS) / max(1, flat.shape[1])
    mean = flat.mean(axis=1, dtype=np.float32) / 255.0
    square = np.einsum("bp,bp->b", flat, flat, dtype=np.float32) / max(1, flat.shape[1]) / 255.0**2
    contrast = np.sqrt(np.maximum(square - mean**2, 0.0))
    return {"mean": mean, "contrast": contrast, "pixels": pixels.astype(np.float32)}


def margins(logits: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log odds of the likeliest class, and its number, `[batch]` each.

    Log odds order examples as the confidence does, also where that is 1 in 32 bits.
    """
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    predicted = logits.argmax(axis=1)
    largest = logits.max(axis=1)
    others = np.exp(logits - largest[:, None])
    others[np.arange(len(others)), predicted] = 0
    return -np.log(np.maximum(others.sum(axis=1), 1e-300)), predicted


def class_bins_of(num_classes: int) -> int:
    """Returns the number of bins for classes: of many classes neighbors share one."""
    return min(num_classes, MOST_CLASS_BINS)


def class_bins(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the bin of each class."""
    return classes * class_bins_of(num_classes) // num_classes


def one_hot(bins: np.ndarray, num_bins: int) -> np.ndarray:
    """float32 `[batch, num_bins]`."""
    return (bins[:, None] == np.arange(num_bins)).astype(np.float32)


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


def calibration_error(margin: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """Returns the expected calibration error of log odds, as `cnnjax.metrics` computes it."""
    confidence = 1.0 / (1.0 + np.exp(-np.asarray(margin, np.float64)))
    upper_edges = np.arange(1, num_bins + 1) / num_bins
    bins = np.minimum(np.searchsorted(upper_edges, confidence), num_bins - 1)
    gaps = np.bincount(bins, weights=np.asarray(right, float) - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / max(1, len(confidence)))


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
        np.savez_compressed(file, **arrays, numbers=np.array(json.dumps(numbers)))
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
        raise UserError(f"the reference {name!r} is damaged ({error}): make it again") from None
    if numbers.pop("version", 0) != VERSION:
        raise UserError(f"the reference {name!r} is of another version of cnnjax: make it again")
    tables["thresholds"] = {key: float(value) for key, value in tables["thresholds"].items()}
    return Reference(**tables, **numbers, center=center, directions=directions)


def drifted(scores: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[str]:
    """Returns the statistics whose score is above its threshold."""
    return [name for name, score in scores.items() if score > thresholds[name]]
