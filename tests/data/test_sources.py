"""`load` by name: the shipped MNIST, folders, and what is said about wrong names."""

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import load, mnist
from cnnjax.errors import UserError


def test_mnist():
    dataset = load("mnist")
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.class_names == tuple("0123456789")
    sizes = [len(part.label) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [54_000, 6_000, 10_000]
    assert dataset.mean[0] == pytest.approx(0.1307, abs=5e-4)
    assert dataset.std[0] == pytest.approx(0.3081, abs=1e-3)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    dataset = load("digits")
    assert dataset.image_shape == (8, 8, 1)
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [len(split.label) for split in splits] == [1455, 162, 180]
    published = load_digits()
    wanted = {
        (image.astype(int).tobytes(), int(label))
        for image, label in zip(published.images, published.target, strict=True)
    }
    for split in splits:
        counts = np.round(split.image[..., 0] * (16 / 255)).astype(int)
        for image, label in zip(counts, split.label, strict=True):
            assert (image.tobytes(), int(label)) in wanted
    assert (load("digits", seed=1).test.image == dataset.test.image).all()


def test_image_size_pads_around_the_digit():
    dataset = load("mnist", image_size=32, classes="3,8", validation=0)
    assert dataset.image_shape == (32, 32, 1)
    published = mnist.read()["test"]
    chosen = published.image[np.isin(published.label, [3, 8])]
    assert (dataset.test.image[:, 2:30, 2:30] == chosen).all()
    assert dataset.test.image.sum(dtype=np.int64) == chosen.sum(dtype=np.int64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minst", "unknown dataset 'minst': did you mean mnist"),
        ("fashion_mnist", "did you mean tfds:fashion_mnist"),
        ("fashion", "did you mean tfds:fashion_mnist"),
        ("cifar", "did you mean tfds:cifar10"),
        # No name of hundreds is meant, however alike some short one is.
        ("bogus", "unknown dataset 'bogus'. Datasets are named"),
        (
            "xyzzyplugh",
            "'xyzzyplugh'. Datasets are named 'mnist', 'digits', 'tfds:NAME' or 'folder:PATH'",
        ),
        ("folder:/nowhere/at/all", "no directory '/nowhere/at/all'"),
        ("tfds:", "Datasets are named"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_directory_without_prefix(tmp_path):
    with pytest.raises(UserError, match=f"write 'folder:{tmp_path}'"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fit": "cut"}, "unknown fit 'cut'"),
        ({"image_size": 0}, "image_size=0: give a positive side"),
        ({"image_size": (28, 0)}, r"image_size=\(28, 0\)"),
        ({"validation": 60_000}, "validation=60000 is not fewer than the 60000 training images"),
        ({"classes": "zero,one"}, "unknown class 'zero'"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_read(monkeypatch, arguments, message):
    monkeypatch.setattr(mnist, "read", lambda: pytest.fail("the images were read"))
    with pytest.raises(UserError, match=message):
        load("mnist", **arguments)


def test_folder(image_folder):
    dataset = load(f"folder:{image_folder}", validation=6)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (5, 4, 1)
    sizes = [len(part.label) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [30, 6, 4]
    for part in (dataset.train, dataset.validation, dataset.test):
        assert (part.label == part.image[:, 0, 0, 0] // 100).all()


def test_folder_with_splits(image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    for name in ("train", "val", "test"):
        (root / name).mkdir()
        for kind in ("cat", "dog"):
            (root / name / kind).symlink_to(image_folder / kind)
    dataset = load(f"folder:{root}")
    sizes = [len(part.label) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sizes == [40, 40, 40]
    (root / "test" / "dog").unlink()
    (root / "train" / "bird").symlink_to(image_folder / "cat")
    assert len(load(f"folder:{root}").test.label) == 20


def test_folder_of_mixed_files(image_folder):
    Image.new("RGB", (8, 10), (255, 0, 0)).save(image_folder / "dog" / "zebra.jpg")
    with pytest.raises(UserError, match=r"2 different sizes.*5x4 in .*10x8 in .*zebra.jpg"):
        load(f"folder:{image_folder}")
    dataset = load(f"folder:{image_folder}", image_size=(10, 8), fit="resize", validation=0)
    assert dataset.image_shape == (10, 8, 3)
    everything = np.concatenate([dataset.train.image, dataset.test.image]).astype(int)
    is_red = (np.abs(everything - [254, 0, 0]) <= 2).all((1, 2, 3))
    is_gray = (np.ptp(everything, axis=-1) == 0).all((1, 2))
    assert is_red.sum() == 1 and is_gray.sum() == 40


def test_unreadable_files_are_all_named(image_folder):
    (image_folder / "cat" / "notes.txt").write_text("not an image, and not named as one")
    (image_folder / "cat" / "broken.png").write_bytes(b"not a PNG")
    whole = (image_folder / "dog" / "03.png").read_bytes()
    (image_folder / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 unreadable image files.*broken.png.*empty.png"):
        load(f"folder:{image_folder}")
    (image_folder / "cat" / "broken.png").unlink()
    (image_folder / "dog" / "empty.png").write_bytes(whole[: len(whole) - 30])
    with pytest.raises(UserError, match=r"empty.png"):
        load(f"folder:{image_folder}")


def test_folder_without_classes(tmp_path):
    with pytest.raises(UserError, match="has 0 sub-directories"):
        load(f"folder:{tmp_path}")
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"no image files in '.*cat'"):
        load(f"folder:{tmp_path}")


def test_folder_larger_than_memory(image_folder):
    with pytest.raises(UserError, match="take more than 4 GiB"):
        load(f"folder:{image_folder}", image_size=20_000)
