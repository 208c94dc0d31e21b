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

Thresholds are calibrated (`cnnjax.evaluation.references`): half of the data is the reference, and
streams of images drawn from the other half say how far windows of clean data get from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

QUANTILE_BINS, PIXEL_BINS, MOST_CLASS_BINS = 10, 16, 20
PREDICTED = ("image_mean", "image_contrast", "pixel_values", "predicted_class", "confidence")

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


def calibration_error(margin: np.ndarray, right: np.ndarray, num_bins: int = 15) -> float:
    """Returns the expected calibration error of log odds, as `cnnjax.metrics` computes it."""
    confidence = 1.0 / (1.0 + np.exp(-np.asarray(margin, np.float64)))
    upper_edges = np.arange(1, num_bins + 1) / num_bins
    bins = np.minimum(np.searchsorted(upper_edges, confidence), num_bins - 1)
    gaps = np.bincount(bins, weights=np.asarray(right, float) - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / max(1, len(confidence)))


def drifted(scores: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[str]:
    """Returns the statistics whose score is above its threshold."""
    return [name for name, score in scores.items() if score > thresholds[name]]
