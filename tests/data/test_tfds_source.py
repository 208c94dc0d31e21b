"""tfds datasets: names, splits, features, and what is said when one is not there."""

import hashlib
import os
import pwd
import time

import numpy as np
import pytest

from cnnjax import paths
from cnnjax.data import load, mnist, open_dataset, tfds_source
from cnnjax.data.image_files import fit_image
from cnnjax.data.tfds_splits import choose_splits, parse_spec, split_size
from cnnjax.errors import UserError
from tests.data.conftest import made_images, made_photos


def test_spec():
    assert parse_spec("mnist:3.0.1") == ("mnist:3.0.1", {})
    spec = parse_spec("emnist/letters?train=train[:10%]+test[5:]&test=test[:5]")
    assert spec.name == "emnist/letters"
    assert spec.splits == {"train": "train[:10%]+test[5:]", "test": "test[:5]"}


@pytest.mark.parametrize("text", ["a?tst=x", "a?train", "a?train=", "a?", "a?train=x&&test=y"])
def test_wrong_spec(text):
    with pytest.raises(UserError, match=r"such as 'tfds:mnist\?train=train\[:10%\]&test=test'"):
        parse_spec(text)


def test_not_prepared_is_told_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load("tfds:cifar10", data_dir=tmp_path)
    assert time.monotonic() - start < 10
    command = f"python scripts/prepare_data.py cifar10 --data-dir {tmp_path} --download"
    for part in ("cifar10/3.0.2", "is not prepared", str(tmp_path), command):
        assert part in str(error.value)


def test_default_data_directory(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/some/where")
    with pytest.raises(UserError, match="is not prepared in /some/where"):
        load("tfds:cifar10")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert paths.default_data_dir() == "~/tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    monkeypatch.setenv("HOME", "/home/of/nobody")
    with pytest.raises(UserError, match="not prepared in /home/of/nobody/tensorflow_datasets"):
        load("tfds:cifar10")
    assert "TFDS_DATA_DIR" not in os.environ
    # Without a home directory nothing is looked for, or made, in a directory named "~".
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(UserError, match="home directory for '~/tensorflow_datasets': set HOME"):
        load("tfds:cifar10")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:fashion_mnst", "unknown tfds dataset 'fashion_mnst': did you mean fashion_mnist"),
        ("tfds:emnist/lettrs", "'emnist': 'lettrs': did you mean letters"),
        ("tfds:mnist/big", "has no configurations"),
        ("tfds:mnist:2.0.0", "cannot be loaded at version 2.0.0"),
        ("tfds:imdb_reviews", "not for image classification: its features are text"),
    ],
)
def test_unknown_variants(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load(name, data_dir=tmp_path)


def test_arrays_of_a_prepared_dataset(tfds_dir):
    dataset = load("tfds:made_digits", data_dir=tfds_dir, validation=0)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert (dataset.train.image == made_images(50)).all()
    assert (dataset.test.image == made_images(13)).all()
    assert (dataset.train.label == np.arange(50) % 3).all()


def test_slices(tfds_dir):
    name = "tfds:made_digits?train=train[:20]&validation=train[20:24]&test=train[45:]+test"
    dataset = load(name, data_dir=tfds_dir, classes="cat,ant")
    numbers = {
        split: getattr(dataset, split).image[:, 0, 0, 0].tolist()
        for split in ("train", "validation", "test")
    }
    assert numbers["train"] == [n for n in range(20) if n % 3 != 1]
    assert numbers["validation"] == [20, 21, 23]
    tail = [n for n in range(45, 50) if n % 3 != 1] + [n for n in range(13) if n % 3 != 1]
    assert numbers["test"] == tail


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("train=train[:10]&test=train[9:20]", "share examples"),
        ("test=train[:10]", r"train=train overlaps .* give train=SPLIT too"),
        ("train=train[:0]", "is empty"),
        ("train=extra", r"no split 'extra': its splits are .*train \(50\)"),
        ("train=train[", "no split 'train\\['"),
    ],
)
def test_wrong_splits(tfds_dir, query, message):
    with pytest.raises(UserError, match=message):
        load(f"tfds:made_digits?{query}", data_dir=tfds_dir)


def test_split_sizes(tfds_dir):
    builder = tfds_source.prepared_builder("made_digits", tfds_dir)
    assert split_size(builder, "train[:10%]+test[3:]") == 15
    assert choose_splits(builder, {"train": "train[:5]"}) == {"train": "train[:5]", "test": "test"}


def test_mixed_sizes(tfds_dir):
    with pytest.raises(UserError, match="differ in size: give image_size"):
        load("tfds:made_photos?train=train[3:]", data_dir=tfds_dir)
    dataset = load(
        "tfds:made_photos?train=train[3:]", data_dir=tfds_dir, image_size=(12, 9), validation=0
    )
    # Without a test split the own validation split is tested on.
    assert dataset.image_shape == (12, 9, 3) and len(dataset.test.label) == 3
    for found, photo in zip(dataset.train.image, made_photos()[3:], strict=True):
        assert (found == fit_image(photo, (12, 9))).all()


def test_scaling_agrees_with_pillow(tfds_dir):
    arguments = {"data_dir": tfds_dir, "image_size": 4, "validation": 0}
    for fit in ("resize", "pad"):
        found = load("tfds:made_digits", fit=fit, **arguments).train.image.astype(int)
        expected = np.stack([fit_image(image, (4, 4), fit) for image in made_images(50)])
        assert np.abs(found - expected).max() <= 1


def test_larger_than_memory(tfds_dir):
    with pytest.raises(UserError, match=r"GiB of memory.*stream it by cnnjax.data.stream_tfds"):
        load("tfds:made_digits", data_dir=tfds_dir, image_size=20_000)


def test_tensorflow_sees_no_accelerator(tfds_dir):
    tf = tfds_source.tensorflow()
    assert tf.config.get_visible_devices("GPU") == []
    assert tf.config.get_visible_devices("TPU") == []


@pytest.mark.slow
def test_tfds_mnist_is_prepared_offline_and_holds_the_shipped_images(tmp_path):
    dataset = load("tfds:mnist", data_dir=tmp_path, validation=0)
    for split, shipped in mnist.read().items():
        found = getattr(dataset, split)

        # tfds stores the examples in another order: compare as multisets.
        def digests(arrays):
            pairs = zip(arrays.image, arrays.label, strict=True)
            return sorted(
                hashlib.sha256(image.tobytes() + bytes([n])).digest() for image, n in pairs
            )

        assert digests(found) == digests(shipped)


def test_what_is_drawn_in_memory_is_drawn_by_class(tfds_dir):
    name = "tfds:made_digits?train=train[:40]+train[46:49]"
    dataset = load(name, data_dir=tfds_dir, validation=9)
    # Of 43 images there are 14, 15 and 14 of the classes: 2.9, 3.1 and 2.9 of 9.
    assert np.bincount(dataset.validation.label).tolist() == [3, 3, 3]
    alike = load(name, data_dir=tfds_dir, validation=9, stratify=False)
    assert len(alike.validation.label) == 9 and alike.checksum != dataset.checksum
    for pipeline in ("resident", "stream"):
        with pytest.raises(UserError, match="is no folder of files"):
            open_dataset(name, pipeline=pipeline, data_dir=tfds_dir, drop_duplicates=True)
