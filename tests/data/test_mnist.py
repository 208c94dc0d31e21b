"""The shipped MNIST is the published one, and damage to it is noticed."""

import hashlib
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from cnnjax.data import mnist
from cnnjax.data.dataset import channel_moments
from cnnjax.errors import UserError


def test_holds_what_was_published():
    splits = mnist.read()
    train, test = splits["train"], splits["test"]
    assert train.image.shape == (60_000, 28, 28, 1) and train.image.dtype == np.uint8
    assert test.image.shape == (10_000, 28, 28, 1) and test.label.dtype == np.int32
    # The first digits, as every book prints them, and the counts of the ten classes.
    assert train.label[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.label[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(train.label).tolist() == counts
    # The mean and deviation that are quoted for MNIST everywhere.
    (mean,), (std,) = channel_moments(train.image)
    assert mean == pytest.approx(0.1307, abs=5e-5) and std == pytest.approx(0.3081, abs=5e-5)


def test_raw_files_have_their_known_digests():
    known = [
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ]
    for name, digest in zip(mnist.SHA256, known, strict=True):
        content = mnist.read_verified(mnist.DIRECTORY, name)
        assert hashlib.sha256(content).hexdigest() == digest


def test_digests_are_those_that_tfds_has_registered():
    import tensorflow_datasets as tfds

    registered = {
        url.rpartition("/")[2]: info.checksum
        for url, info in tfds.builder_cls("mnist").url_infos.items()
    }
    assert registered == mnist.SHA256


@pytest.mark.parametrize("name", mnist.SHA256)
def test_one_flipped_bit_is_named(tmp_path, name):
    for each in mnist.SHA256:
        shutil.copy(mnist.DIRECTORY / each, tmp_path / each)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError) as error:
        mnist.read(tmp_path)
    for part in (str(tmp_path / name), mnist.SHA256[name], found, "install cnnjax again"):
        assert part in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz \(No such file"):
        mnist.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x07", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x01", "ends inside its header"),
        (struct.pack(">i2i", 0x802, 2, 2) + b"abc", r"announces shape \[2, 2\] but holds 3"),
    ],
)
def test_malformed_idx(content, message):
    with pytest.raises(UserError, match=message):
        mnist.read_idx(content)


def test_idx_by_hand():
    content = struct.pack(">i2i", 0x802, 2, 3) + bytes(range(6))
    assert mnist.read_idx(content).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_loading_needs_numpy_alone():
    script = (
        "import sys, cnnjax.data\n"
        "assert cnnjax.data.load('mnist').num_classes == 10\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'jax', 'PIL', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
