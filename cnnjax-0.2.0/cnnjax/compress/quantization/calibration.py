"""Ranges of activations, from what a network's layers see of some images.

Two passes over the images: the smallest and largest value of each layer's input, then a histogram
of `BINS` equal bins between them. From the histogram a method chooses the range that codes cover:

    minmax       all that was seen
    percentile   what a fraction of the values lies in (Wu et al. 2020, arXiv 2004.09602, section 5)
    entropy      the range whose rounded histogram diverges least from that of the values (Migacz
                 2017, "8-bit Inference with TensorRT", GTC S7310, pages 26 to 38)
    mse          the range with the least squared error

Each is a function `(histogram, bits) -> (low, high)` of arrays, and holds 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import spec
from cnnjax.compress.quantization import integers
from cnnjax.errors import UserError
from cnnjax.models.interceptors import intercept_methods

BINS = 2048
KIND = "calibration"
# What `entropy` puts where nothing was seen, so that no logarithm is infinite.
UNSEEN = 1e-6
# What counts as a single frequent value there: of all values, and of the bins beside it.
SINGLE, TIMES_AROUND = 0.01, 20
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """What was seen of one activation.

    Attributes:
      low, high: the smallest and the largest value.
      counts: `[BINS]`, values in equal bins between them.
    """

    low: float
    high: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """`[BINS + 1]`, the bounds of the bins."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    @property
    def centers(self) -> np.ndarray:
        """`[BINS]`, the middles of the bins."""
        edges = self.edges
        return (edges[1:] + edges[:-1]) / 2


def minmax(histogram: Histogram, bits: int) -> Range:
    """Returns the smallest and the largest value that was seen."""
    del bits
    return histogram.low, histogram.high


def percentile(histogram: Histogram, bits: int, percent: float = 99.99) -> Range:
    """Returns the range that `percent` of the values lie in, as many above it as below it.

    An end at 0, such as that of a ReLU, stays.
    """
    del bits
    if not 50 < percent <= 100:
        raise UserError(f"percent={percent:g}: give more than 50 and at most 100.")
    total = np.concatenate([[0], np.cumsum(histogram.counts)])
    outside = (1 - percent / 100) * total[-1]
    low, high = histogram.low, histogram.high
    ends = sum(end != 0 for end in (low, high))
    if low:
        low = float(np.interp(outside / max(ends, 1), total, histogram.edges))
    if high:
        high = float(np.interp(total[-1] - outside / max(ends, 1), total, histogram.edges))
    return low, high


def entropy(histogram: Histogram, bits: int) -> Range:
    """Returns the range of least Kullback-Leibler divergence.

    The candidates cut the magnitudes at a bin's edge. Values beyond it count as its last bin in the
    one distribution, and not at all in the other, which is rounded to the codes there are.
    """
    magnitudes, widths = _magnitudes(histogram)
    one_sided = histogram.low >= 0 or histogram.high <= 0
    levels = 2**bits if one_sided else 2 ** (bits - 1)
    best, threshold = np.inf, widths * len(magnitudes)
    for count in range(levels, len(magnitudes) + 1, max(1, len(magnitudes) // 512)):
        divergence = _divergence(magnitudes, count, levels)
        if divergence < best:
            best, threshold = divergence, widths * count
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def mse(histogram: Histogram, bits: int) -> Range:
    """Returns the range, in proportion to the one seen, of least squared error of rounding."""
    values, counts = histogram.centers, histogram.counts
    best, found = np.inf, (histogram.low, histogram.high)
    for factor in np.linspace(1.0, 0.05, 96):
        low, high = histogram.low * factor, histogram.high * factor
        scale, zero = integers.activation_scale(low, high, bits)
        codes = np.clip(
            np.round(values / scale) + zero, integers.smallest(bits), integers.largest(bits)
        )
        error = float(np.sum(counts * np.square((codes - zero) * scale - values)))
        if error < best:
            best, found = error, (low, high)
    return found


CALIBRATIONS: Mapping[str, Callable[..., Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def make_calibration(text: str) -> Callable[[Histogram, int], Range]:
    """Returns the method that a text names, such as `percentile(99.9)`.

    Raises:
      UserError: an unknown method or argument.
    """
    item = spec.parse_one(text, KIND)
    bound = spec.bind(item, CALIBRATIONS, KIND, supplied=("histogram", "bits"))
    # What the method itself refuses is told before any image is read.
    bound(histogram=Histogram(0.0, 1.0, np.ones(BINS)), bits=8)
    return lambda histogram, bits: bound(histogram=histogram, bits=bits)


def observe(
    model: Any,
    variables: Any,
    batches: Sequence[Any],
    paths: Iterable[str],
    *,
    normalize: Callable[[Any], jax.Array] = lambda images: images,
) -> dict[str, Histogram]:
    """Returns what the inputs of layers are on some images.

    Args:
      model: with the contract of `cnnjax.models`.
      variables: of the model.
      batches: images, `[batch, height, width, channels]` each.
      paths: of the layers.
      normalize: images -> what the model expects.

    Raises:
      UserError: no images, or activations that are not finite.
    """
    wanted = tuple(paths)
    if not batches:
        raise UserError("no images to calibrate on: give samples=1 or more.")
    bounds = jax.jit(lambda v, x: inputs_of(model, v, x, wanted, _bounds, _widest))
    seen = [jax.device_get(bounds(variables, normalize(batch))) for batch in batches]
    edges = {
        path: (
            float(min(each[path][0] for each in seen)),
            float(max(each[path][1] for each in seen)),
        )
        for path in wanted
    }
    for path, (low, high) in edges.items():
        if not np.isfinite([low, high]).all():
            raise UserError(f"the input of {path} is not finite on the calibration images.")

    def count(variables: Any, x: jax.Array, edges: Any) -> Any:
        def of_layer(path: str, module: nn.Module, x: jax.Array) -> jax.Array:
            del module
            return _counts(x, *edges[path])

        return inputs_of(model, variables, x, wanted, of_layer, sum)

    counted = jax.jit(count)
    totals = [jax.device_get(counted(variables, normalize(batch), edges)) for batch in batches]
    return {
        path: Histogram(
            *edges[path], np.asarray(sum(each[path].astype(np.float64) for each in totals))
        )
        for path in wanted
    }


def inputs_of(
    model: Any,
    variables: Any,
    image: jax.Array,
    paths: Iterable[str],
    measure: Callable[[str, nn.Module, jax.Array], Any],
    join: Callable[[list[Any]], Any] = lambda values: sum(values) / len(values),
) -> dict[str, Any]:
    """Returns `{path: measure(path, module, input)}` of layers, in one pass in evaluation mode.

    `join` makes one value of those of a layer that is called several times; it is called always.
    """
    wanted = {tuple(path.split("/")): path for path in paths}
    found: dict[str, list[Any]] = {}

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = wanted.get(context.module.path)
        if path is not None and context.method_name == "__call__" and args:
            found.setdefault(path, []).append(measure(path, context.module, args[0]))
        return call(*args, **kwargs)

    with intercept_methods(intercept):
        model.apply(variables, image, train=False)
    return {path: join(values) for path, values in found.items()}


def average_over(
    function: Callable[[Any, jax.Array], Mapping[str, jax.Array]],
) -> Callable[..., dict[str, Any]]:
    """Returns `(variables, batches, normalize) -> means over all images`, in float64, of a function
    `(variables, images) -> means by path`."""

    def average(
        variables: Any, batches: Sequence[Any], normalize: Callable[[Any], jax.Array]
    ) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for batch in batches:
            for path, value in jax.device_get(function(variables, normalize(batch))).items():
                total[path] = total.get(path, 0) + np.asarray(value, np.float64) * len(batch)
        images = sum(map(len, batches))
        return {path: value / images for path, value in total.items()}

    return average


def _bounds(path: str, module: nn.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    del path, module
    wide = x.astype(jnp.float32)
    return jnp.min(wide), jnp.max(wide)


def _widest(values: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    lows, highs = zip(*values, strict=True)
    return jnp.min(jnp.stack(lows)), jnp.max(jnp.stack(highs))


def _counts(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    width = jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny) / BINS
    bins = jnp.clip((x.astype(jnp.float32).ravel() - low) / width, 0, BINS - 1).astype(jnp.int32)
    return jnp.zeros(BINS, jnp.float32).at[bins].add(1)


def _magnitudes(histogram: Histogram) -> tuple[np.ndarray, float]:
    """Returns counts of magnitudes in equal bins from 0 on, and their width."""
    largest = max(-histogram.low, histogram.high)
    edges = np.linspace(0, largest, BINS + 1)
    if largest == 0:
        return np.zeros(BINS), 0.0
    counts, _ = np.histogram(np.abs(histogram.centers), bins=edges, weights=histogram.counts)
    # Zeros, most of what a ReLU gives, are exact in every range (page 36). A single other value
    # that is as frequent, such as the paper of handwriting, would hide what a range does to the
    # rest.
    around = (np.roll(counts, 1) + np.roll(counts, -1)) / 2
    around[0], around[-1] = counts[1], counts[-2]
    single = (counts > SINGLE * counts.sum()) & (counts > TIMES_AROUND * around)
    counts = np.where(single, around, counts)
    counts[0] = counts[1]
    return counts, largest / BINS


def _divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """Returns the divergence of the first `kept` bins from themselves in `levels` steps."""
    reference = counts[:kept].astype(np.float64)
    total = counts.sum()
    groups = np.arange(kept) * levels // kept
    seen = reference > 0
    sums = np.bincount(groups, weights=reference, minlength=levels)
    filled = np.bincount(groups, weights=seen, minlength=levels)
    rounded = np.where(seen, (sums / np.maximum(filled, 1))[groups], 0)
    # What lies beyond is seen at the bound.
    reference[-1] += total - counts[:kept].sum()
    p, q = reference / total, rounded / total
    seen, q = p > 0, np.maximum(q, UNSEEN)
    # Not normalized again, `q` lacks what is clipped: else a bound at a frequent value, such as the
    # paper of handwriting, would seem to lose nothing.
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])) - p.sum() + q.sum())
