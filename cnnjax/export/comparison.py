"""Whether an exported file answers as the network does, and how fast it is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cnnjax.export.program import Forward, Variables
from cnnjax.export.runtimes import Run

# Relative to the largest logit: float32 differs by the order of sums alone.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}
# Of quantized files not the logits are asked for but the answers.
AGREEMENT = 0.99
LATENCY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
      count: of images.
      absolute: the largest difference of logits.
      relative: the same over the largest logit.
      agreement: the fraction of images (of positions, where each has logits) with the same answer.
      accuracy: of the network and of the file; None without labels.
      size: of the file in bytes.
      latency: milliseconds by the number of images in a call.
      limits: what was asked for: "relative" at most, or "agreement" at least.
    """

    count: int
    absolute: float
    relative: float
    agreement: float
    accuracy: tuple[float, float] | None
    size: int
    latency: Mapping[int, float]
    limits: Mapping[str, float]

    @property
    def good(self) -> bool:
        """Whether the file is within the limits."""
        relative = self.limits.get("relative", np.inf)
        # Not a number is not within it.
        return self.relative <= relative and self.agreement >= self.limits.get("agreement", 0.0)

    def table(self) -> str:
        """Returns the lines that the command prints."""
        limit = self.limits.get("relative")
        allowed = "" if limit is None else f", at most {limit:g} allowed"
        rows = [
            ("images", f"{self.count}"),
            ("logits", f"differ by {self.absolute:.2e}, relative {self.relative:.2e}{allowed}"),
            ("top 1", f"{self.agreement:.2%} the same{self._asked()}"),
        ]
        if self.accuracy is not None:
            ours, theirs = self.accuracy
            rows.append(("accuracy", f"network {ours:.2%}, file {theirs:.2%}"))
        rows.append(("size", f"{self.size:,} bytes"))
        times = ", ".join(f"batch {n}: {ms:.3g} ms" for n, ms in self.latency.items())
        rows.append(("latency", times or "not measured"))
        return "\n".join(f"{name:9} {text}" for name, text in rows)

    def _asked(self) -> str:
        asked = self.limits.get("agreement")
        return "" if asked is None else f", at least {asked:.2%} asked for"


def limits_for(
    precision: str, tolerance: float | None = None, agreement: float | None = None
) -> dict[str, float]:
    """Returns the limits for a precision, or those that are given instead."""
    limits: dict[str, float] = {}
    if tolerance is not None or precision in TOLERANCES:
        limits["relative"] = TOLERANCES[precision] if tolerance is None else tolerance
    if agreement is not None or precision not in TOLERANCES:
        limits["agreement"] = AGREEMENT if agreement is None else agreement
    return limits


def logits_of(
    forward: Forward, variables: Variables, images: np.ndarray, step: int = 64
) -> np.ndarray:
    """Returns the network's answers, computed as it always is, `step` images at a time."""
    import jax

    call = jax.jit(forward)
    parts = [images[start : start + step] for start in range(0, len(images), step)]
    return np.concatenate([np.asarray(call(variables, part)) for part in parts])


def compare(
    run: Run,
    images: np.ndarray,
    logits: np.ndarray,
    *,
    limits: Mapping[str, float],
    path: Path,
    labels: np.ndarray | None = None,
    batches: Sequence[int] = (1, 32),
    fixed: int | None = None,
) -> Comparison:
    """Runs a file on images and compares it with what the network answered.

    Args:
      run: the opened file.
      images: as the file takes them.
      logits: the network's, `[batch, ..., classes]`; of one class its sign is the answer.
      limits: see `limits_for`.
      path: of the file, for its size.
      labels: of the images.
      batches: sizes of calls whose latency is measured.
      fixed: the only batch that the file takes; None for any.
    """
    step = fixed or min(len(images), 64)
    found = np.concatenate([run(part) for part in _parts(images, step)])[: len(images)]
    difference = np.abs(found.astype(np.float64) - logits.astype(np.float64))
    absolute = float(difference.max(initial=0.0))
    largest = max(float(np.abs(logits).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    answers = [_answers(values) for values in (logits, found)]
    accuracy = None
    if labels is not None:
        accuracy = tuple(float((answer == labels).mean()) for answer in answers)
    return Comparison(
        len(images),
        absolute,
        absolute / largest,
        float((answers[0] == answers[1]).mean()),
        accuracy,  # type: ignore[arg-type]
        size_of(path),
        {n: _latency(run, images, n) for n in ([fixed] if fixed else batches)},
        limits,
    )


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files of a folder."""
    parts = path.rglob("*") if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _answers(logits: np.ndarray) -> np.ndarray:
    if logits.shape[-1] == 1:
        return (logits[..., 0] > 0).astype(np.int64)
    return logits.argmax(-1)


def _parts(images: np.ndarray, step: int) -> list[np.ndarray]:
    """Returns the images in parts of `step`; the last is filled up by the first images."""
    whole = -(-len(images) // step) * step
    indices = np.arange(whole) % len(images)
    return [images[indices[start : start + step]] for start in range(0, whole, step)]


def _latency(run: Run, images: np.ndarray, batch: int) -> float:
    """Returns the median milliseconds of a call, of as many as a second holds, from 3 to 200."""
    part = images[np.arange(batch) % len(images)]
    run(part)
    run(part)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < LATENCY_SECONDS and len(times) < 200):
        start = time.perf_counter()
        run(part)
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)
