"""Weights, images and samples from formulas, the same here and in `scripts/make_references.py`.

NumPy's old generator, because its numbers are the same in every version.
"""

import math
import zlib

import numpy as np

# The numbers of a larger tensor repeat; a prime period is no multiple of any of its sizes.
PERIOD = 1_000_003
NUM_SAMPLES = 64
# Of the kernels of networks in which the signal would grow from block to block, until their gates
# have no digits left to agree in.
FACTORS = dict.fromkeys(
    ("efficientnet_v2_s", "tf_efficientnetv2_s", "ghostnet_100", "ghostnetv2_100"), 0.7
)


def generator(*names):
    return np.random.RandomState(zlib.crc32("/".join(map(str, names)).encode()))


def weight(name, shape, network=None):
    """Returns float32 numbers that keep a signal's size and move every mean and variance.

    Those of a network's kernels times its factor among `FACTORS`, if it has one.
    """
    size = math.prod(shape)
    uniform = np.resize(generator(name).uniform(size=min(size, PERIOD)), size).reshape(shape)
    if name.endswith("running_var"):
        low, high = 0.5, 1.5
    elif name.endswith(("running_mean", "bias")):
        low, high = -0.2, 0.3
    elif len(shape) <= 1 or name.endswith(("gain", "layer_scale")):
        low, high = 0.7, 1.2
    else:
        high = math.sqrt(6 / math.prod(shape[1:]))  # of variance 2 / fan-in
        low = -high
    numbers = np.asarray(low + (high - low) * uniform, np.float32)
    return (
        numbers * np.float32(FACTORS[network]) if len(shape) > 1 and network in FACTORS else numbers
    )


def image(batch, size, channels=3):
    """Returns float32 images `[batch, channels, size, size]`, PyTorch's order."""
    return generator("image").uniform(-2, 2, (batch, channels, size, size)).astype(np.float32)


def samples(name, array):
    """Returns some numbers of an array and, at last, its largest absolute one."""
    flat = np.asarray(array).reshape(-1)
    places = generator("samples", name).randint(flat.size, size=NUM_SAMPLES)
    return np.append(flat[places], np.abs(flat).max()).astype(np.float32)


def training_batches(num_steps, batch, size, num_classes):
    """Returns `(image [batch, 3, size, size], label [batch])` for each step."""
    draw = generator("training")
    for _ in range(num_steps):
        images = draw.uniform(-2, 2, (batch, 3, size, size)).astype(np.float32)
        yield images, draw.randint(num_classes, size=batch)
