"""Ranges from histograms: closed forms, and methods against exhaustive search."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.compress.quantization import calibration, integers
from cnnjax.errors import UserError

RNG = np.random.default_rng(0)


def histogram(values):
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=calibration.BINS, range=(low, high))
    return calibration.Histogram(low, high, counts.astype(np.float64))


def squared_error(values, low, high, bits):
    scale, zero = integers.activation_scale(low, high, bits)
    restored = integers.dequantize(
        integers.quantize(jnp.asarray(values), scale, zero, bits), scale, zero
    )
    return float(np.mean(np.square(restored - values)))


def test_percentiles_of_uniform_values():
    values = np.linspace(-1, 3, 400_001)
    low, high = calibration.make_calibration("percentile(percent=90)")(histogram(values), 8)
    # A twentieth of the values lies beyond each end.
    assert low == pytest.approx(-0.8, abs=0.01) and high == pytest.approx(2.8, abs=0.01)


def test_the_zero_of_a_relu_stays():
    values = np.maximum(RNG.normal(size=100_000), 0)
    low, high = calibration.percentile(histogram(values), 8, 99.0)
    assert low == 0 and np.mean(values > high) == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_better_than_what_was_seen_and_near_the_best(bits):
    values = RNG.standard_t(3, size=100_000).astype(np.float32)
    seen = histogram(values)
    chosen = squared_error(values, *calibration.mse(seen, bits), bits)
    tried = [
        squared_error(values, seen.low * factor, seen.high * factor, bits)
        for factor in np.linspace(0.05, 1, 39)
    ]
    assert chosen <= min(tried) * 1.05 and chosen < squared_error(values, seen.low, seen.high, bits)


def test_entropy_cuts_a_long_tail_and_keeps_a_short_one():
    short = RNG.uniform(0, 1, size=100_000)
    assert calibration.entropy(histogram(short), 8)[1] > 0.95
    long = np.concatenate([short, [50.0]])
    assert 0.9 < calibration.entropy(histogram(long), 8)[1] < 7


def test_entropy_keeps_what_is_rare_beside_a_frequent_value():
    # As MNIST: paper is one value, and ink has all others.
    ink = RNG.uniform(-0.4, 2.8, size=20_000)
    low, high = calibration.entropy(histogram(np.concatenate([np.full(80_000, -0.42), ink])), 8)
    assert low < -0.4 and high > 2.0


class Twice(nn.Module):
    """Calls one layer with two inputs."""

    @nn.compact
    def __call__(self, image, *, train=False):
        layer = nn.Dense(3, name="layer")
        return layer(image.mean((1, 2))) + layer(-3 * image.mean((1, 2)))


def test_observed_are_all_inputs_of_a_layer():
    images = RNG.uniform(size=(64, 4, 4, 2)).astype(np.float32)
    model = Twice()
    variables = model.init(jax.random.key(0), images)
    seen = calibration.observe(model, variables, [images[:32], images[32:]], ["layer"])["layer"]
    means = images.mean((1, 2))
    assert seen.low == pytest.approx(-3 * means.max()) and seen.high == pytest.approx(means.max())
    assert seen.counts.sum() == 2 * means.size
    expected, _ = np.histogram(
        np.concatenate([means, -3 * means]), bins=calibration.BINS, range=(seen.low, seen.high)
    )
    assert np.abs(seen.counts - expected).sum() <= 8  # Of values at the edge of a bin.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("percentil", "did you mean percentile"),
        ("percentile(percent=20)", "more than 50"),
        ("mse(bins=3)", "bins"),
    ],
)
def test_unknown_calibrations_are_told(text, words):
    with pytest.raises(UserError, match=words):
        calibration.make_calibration(text)
