"""The digits of scikit-learn."""

import numpy as np
from sklearn.datasets import load_digits

from cnnjax.data import load


def test_digits_are_those_of_scikit_learn_in_eight_bits():
    dataset = load("digits", validation=0)
    assert dataset.image_shape == (8, 8, 1)
    assert (len(dataset.train.label), len(dataset.test.label)) == (1617, 180)
    images = np.concatenate([dataset.train.image, dataset.test.image])[..., 0]
    labels = np.concatenate([dataset.train.label, dataset.test.label])
    known = load_digits()
    ours = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    theirs = np.round(known.images * (255 / 16)).astype(np.uint8)
    assert ours == {
        (image.tobytes(), int(label)) for image, label in zip(theirs, known.target, strict=True)
    }


def test_digits_are_resized_on_demand():
    assert load("digits", image_size=28, fit="resize").image_shape == (28, 28, 1)
