"""Small datasets on disk: one prepared by tfds, one a directory of image files."""

import numpy as np
import pytest
from PIL import Image

TFDS_SIZES = {"train": 50, "test": 13}


def made_images(count, shape=(6, 7, 1), seed=0):
    """Images of noise whose first pixel is their number, so that each can be recognized."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def made_photos():
    """Six color images, each one row higher than the one before."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (5 + n, 9, 3), dtype=np.uint8) for n in range(6)]


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A data directory with tfds datasets `made_digits` and `made_photos` (of mixed sizes)."""
    from cnnjax.data.tfds_source import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp("tfds")

    def store(name, shape, examples):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            data_dir=directory,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
                }
            ),
            split_datasets=examples,
            disable_shuffling=True,
        )

    def digits(count):
        return [
            (number, {"image": image, "label": number % 3})
            for number, image in enumerate(made_images(count))
        ]

    photos = [
        (number, {"image": photo, "label": number % 3})
        for number, photo in enumerate(made_photos())
    ]
    store("made_digits", (6, 7, 1), {split: digits(size) for split, size in TFDS_SIZES.items()})
    store("made_photos", (None, None, 3), {"train": photos, "validation": photos[:3]})
    return directory


@pytest.fixture
def image_folder(tmp_path):
    """Twenty gray PNG files of 5x4 pixels in each of the classes `cat` and `dog`."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(20):
            pixels = np.full((5, 4), 100 * label + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number:02}.png")
    return tmp_path
