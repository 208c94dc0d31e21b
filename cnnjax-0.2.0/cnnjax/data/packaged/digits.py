"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn.

Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository: its test set, 43 writers, counts of ink in 4x4 blocks of 32x32 bitmaps. Small enough for
a network to be trained within seconds.
"""

from __future__ import annotations

import numpy as np

from cnnjax.data.dataset import Arrays

CLASS_NAMES = tuple("0123456789")
NUM_EXAMPLES = 1797
# Counts run from 0 to 16.
WHITE = 16


def read() -> Arrays:
    """Returns all examples, uint8 `[1797, 8, 8, 1]` with 255 as white, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = np.round(digits.images * (255 / WHITE)).astype(np.uint8)
    return Arrays(image[..., None], digits.target.astype(np.int32))
