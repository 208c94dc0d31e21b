"""Directories as users have them: names of splits, hidden files, links, duplicates, odd names."""

import json
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cnnjax.data import load
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator
from cnnjax.run import again, record

NUMBERS = iter(range(10**9))


def image(path):
    """An image file that no other has the bytes of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = next(NUMBERS)
    pixels = np.full((4, 3), 7, np.uint8)
    pixels[0] = number % 251, number // 251 % 251, number // 251**2
    Image.fromarray(pixels).save(path)
    return path


def fill(root, *directories, count=20):
    for directory in directories:
        for number in range(count):
            image(root / directory / f"{number:02}.png")
    return root


def sizes(dataset):
    return [len(part.label) for part in (dataset.train, dataset.validation, dataset.test)]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("training", "validation", "testing"),
        ("Train", "Val", "Test"),
        ("TRAIN", "dev", "TEST"),
        ("train_set", "val_set", "test_set"),
        ("trainset", "valset", "testset"),
        ("training-set", "valid", "test-set"),
        ("Training Set", "Validation Set", "Test Set"),
        ("train_images", "val_images", "test_data"),
        ("train", "eval", "testing"),
    ],
)
def test_splits_by_their_usual_names(tmp_path, train, validation, test):
    fill(tmp_path, f"{train}/cat", f"{train}/dog", count=5)
    fill(tmp_path, f"{validation}/cat", f"{validation}/dog", count=3)
    fill(tmp_path, f"{test}/cat", f"{test}/dog", count=2)
    dataset = load(f"folder:{tmp_path}")
    assert dataset.class_names == ("cat", "dog")
    assert sizes(dataset) == [10, 6, 4]


@pytest.mark.parametrize(
    ("directories", "message"),
    [
        (("train/a", "train/b", "val/a", "valid/a"), "two .* validation split, 'val' and 'valid'"),
        (("train/a", "train/b", "Train/a", "Train/b"), "two .* train split, 'Train' and 'train'"),
        (("valid/a", "valid/b", "test/a", "test/b"), "has 'test' and 'valid', .* but no 'train'"),
        (("train/a", "train/b", "a", "b"), "has both 'train', .* and 'a': put every class below"),
        (("train", "train/a", "train/b", "extra"), "has both 'train', .* and 'extra'"),
        (("cat", "dog", "test/cat", "test/dog"), "has both 'test', .* and 'cat'"),
        (("fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"), r"'fold1' and 'fold2' .*cat, dog"),
        (("train2017/a", "train2017/b", "val2017/a", "val2017/b"), "hold the same sub-dir"),
        (("a/train/cat", "a/test/cat"), "has 1 sub-directories: .*/a' that you mean"),
        (("train/train/cat", "train/test/cat"), "train/test' is named as a split, but stands"),
        (("train", "test"), "has 0 sub-directories: one per class"),
        (("train/a", "train/b", "test"), "no image files in the class directories of .*test"),
    ],
)
def test_layouts_that_are_no_classes_are_refused(tmp_path, directories, message):
    fill(tmp_path, *directories, count=2)
    with pytest.raises(UserError, match=message):
        load(f"folder:{tmp_path}")


def test_a_class_may_be_named_as_a_split_and_may_have_directories(tmp_path):
    fill(tmp_path / "vehicles", "train", "car", "test")
    assert load(f"folder:{tmp_path / 'vehicles'}").class_names == ("car", "test", "train")
    # As Tiny ImageNet has it.
    fill(tmp_path / "tiny", "train/n01/images", "train/n02/images", "val/n01/images")
    assert load(f"folder:{tmp_path / 'tiny'}").class_names == ("n01", "n02")


HIDDEN = [
    ".ipynb_checkpoints/00.png",
    "deeper/.cache/00.png",
    "__MACOSX/00.png",
    "__MACOSX/deeper/00.png",
    "@eaDir/00.png",
    "$RECYCLE.BIN/00.png",
    "System Volume Information/00.png",
    "lost+found/00.png",
    ".thumbnails/large/00.png",
    "._00.png",
]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_and_system_entries_are_no_images(tmp_path, name):
    root = fill(tmp_path / ".hidden_root_is_fine", "cat", "dog")
    image(root / "cat" / name)
    if not name.startswith("deeper"):
        image(root / name.replace("00.png", "cat/00.png"))
    (root / "cat" / "Thumbs.db").write_bytes(b"thumbs")
    dataset = load(f"folder:{root}")
    assert dataset.class_names == ("cat", "dog")
    assert sum(sizes(dataset)) == 40


def test_directories_named_as_images(tmp_path):
    root = fill(tmp_path, "cat", "dog")
    # As network disks and some downloads leave them.
    image(root / "cat" / "@eaDir" / "01.png" / "SYNOPHOTO_THUMB_M.jpg")
    image(root / "dog" / "photo.jpg" / "photo.png")
    assert sum(sizes(load(f"folder:{root}"))) == 41


def test_links_to_directories_are_followed_once(tmp_path):
    root = fill(tmp_path / "data", "cat", "dog")
    elsewhere = fill(tmp_path, "elsewhere/more", "elsewhere/more/deeper") / "elsewhere"
    (root / "cat" / "more").symlink_to(elsewhere / "more")
    (root / "cat" / "again").symlink_to(elsewhere / "more")
    (root / "cat" / "loop").symlink_to(root / "cat")
    (elsewhere / "more" / "deeper" / "loop").symlink_to(elsewhere)
    assert sum(sizes(load(f"folder:{root}"))) == 80
    # In the other class the same directories count once more.
    (root / "dog" / "more").symlink_to(elsewhere / "more" / "deeper")
    assert sum(sizes(load(f"folder:{root}"))) == 120


def test_links_that_lead_out_of_the_class_or_nowhere_are_refused(tmp_path):
    root = fill(tmp_path, "cat", "dog")
    (root / "cat" / "up").symlink_to(root)
    with pytest.raises(UserError, match=r"cat/up' links to .*holds the other classes too"):
        load(f"folder:{root}")
    (root / "cat" / "up").unlink()
    for place in ("bird", "cat/more"):
        (root / place).symlink_to(root / "nowhere")
        with pytest.raises(UserError, match=rf"{place}' is a broken link to .*nowhere"):
            load(f"folder:{root}")
        (root / place).unlink()
    (root / "cat" / "99.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"99.png': the link to 'nowhere' is broken"):
        load(f"folder:{root}")
    (root / "cat" / "99.png").unlink()
    os.mkfifo(root / "cat" / "99.png")
    with pytest.raises(UserError, match=r"99.png' is no file on a disk"):
        load(f"folder:{root}")


def test_files_that_are_held_out_too_are_counted_and_named(tmp_path):
    root = fill(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog")
    assert load(f"folder:{root}").notes == ()
    for number in range(4):
        copied = (root / "test" / "cat" / f"{number:02}.png").read_bytes()
        (root / "train" / "dog" / f"copy{number}.png").write_bytes(copied)
    (root / "train" / "cat" / "link.png").symlink_to(root / "val" / "cat" / "07.png")
    dataset = load(f"folder:{root}")
    assert sizes(dataset) == [45, 40, 40]
    (note,) = dataset.notes
    for part in ("5 training images are", "train/cat/link.png", "val/cat/07.png", "and 2 more"):
        assert part in note
    assert "--drop-duplicates" in note and "\n" not in note
    without = load(f"folder:{root}", drop_duplicates=True)
    assert sizes(without) == [40, 40, 40]
    assert "5 training images are held out too" in without.notes[0]
    # What is resumed must be the same data.
    assert without.checksum != dataset.checksum
    assert not {"drop_duplicates", "stratify"} & record.CHANGEABLE_ON_RESUME


def test_a_run_of_an_earlier_version_keeps_its_draws(tmp_path):
    recorded = {"dataset": "folder:pets", "validation": 0.2}
    (tmp_path / "config.json").write_text(json.dumps({"settings": recorded, "experiment": "x"}))
    assert not again.settings_of_run(tmp_path).stratify
    root = fill(tmp_path / "pets", "cat", "dog", count=10)
    drawn = numpy_generator(0, "test split").permutation(20)[:2] >= 10
    held = load(f"folder:{root}", stratify=False).test.label
    assert sorted(held) == sorted(drawn)


def test_nothing_is_left_where_all_is_held_out(tmp_path):
    root = fill(tmp_path, "train/cat", "train/dog")
    (root / "test").symlink_to(root / "train")
    with pytest.raises(UserError, match="drop_duplicates leaves no training image"):
        load(f"folder:{root}", drop_duplicates=True)


def test_copies_that_a_drawn_split_divides_are_found(tmp_path):
    root = fill(tmp_path, "cat", "dog")
    for number in range(20):
        copied = (root / "cat" / f"{number:02}.png").read_bytes()
        (root / "cat" / f"copy{number:02}.png").write_bytes(copied)
    dataset = load(f"folder:{root}", validation=0.2)

    def pictures(part):
        return {each.tobytes() for each in part.image}

    held = pictures(dataset.test) | pictures(dataset.validation)
    double = sum(each.tobytes() in held for each in dataset.train.image)
    assert double > 0 and dataset.notes[0].startswith(f"{double} training image")
    without = load(f"folder:{root}", validation=0.2, drop_duplicates=True)
    assert not pictures(without.train) & held
    assert len(without.train.label) == len(dataset.train.label) - double
    assert (without.test.image == dataset.test.image).all()


def test_only_files_of_the_same_length_are_compared(tmp_path, monkeypatch):
    root = fill(tmp_path, "cat", "dog")
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        # What follows the end of a PNG is no part of the picture.
        path.write_bytes(path.read_bytes() + bytes(200 + number))
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was read"))
    assert load(f"folder:{root}").notes == ()


def test_duplicates_are_dropped_from_folders_only():
    with pytest.raises(UserError, match=r"--drop-duplicates\): 'mnist' is no folder"):
        load("mnist", drop_duplicates=True)


def test_every_class_is_held_out_where_it_can_be(tmp_path):
    counts = {"a": 60, "b": 25, "c": 10, "d": 3, "e": 2, "f": 1}
    for name, count in counts.items():
        fill(tmp_path, name, count=count)
    dataset = load(f"folder:{tmp_path}")
    held = {
        split: np.bincount(getattr(dataset, split).label, minlength=6).tolist()
        for split in ("train", "validation", "test")
    }
    assert sizes(dataset) == [82, 9, 10]
    assert held["test"][:5] == [5, 2, 1, 1, 1] and held["test"][5] == 0
    assert held["validation"][:4] == [5, 2, 1, 1] and held["train"][4:] == [1, 1]
    assert dataset.notes == (
        "no test images of 'f': the test scores say nothing about it",
        "no validation images of 'e', 'f': the validation scores say nothing about them",
    )
    again, other = load(f"folder:{tmp_path}"), load(f"folder:{tmp_path}", seed=1)
    assert again.checksum == dataset.checksum != other.checksum
    assert (other.test.image == dataset.test.image).all()


def test_a_class_that_only_training_has_is_a_note_and_a_new_one_an_error(tmp_path):
    root = fill(tmp_path, "train/cat", "train/dog", "train/Emu", "val/cat", "test/dog", "test/cat")
    (root / "test" / "Emu").mkdir()
    dataset = load(f"folder:{root}")
    assert sizes(dataset) == [60, 20, 40]
    assert dataset.notes == (
        "no test images of 'Emu': the test scores say nothing about it",
        "no validation images of 'Emu', 'dog': the validation scores say nothing about them",
    )
    fill(root, "test/emu")
    with pytest.raises(UserError, match=r"test' are .* new \['emu'\], where training has 'Emu'"):
        load(f"folder:{root}")


def test_names_that_cannot_be_shown_are_refused_at_once(tmp_path):
    for number, name in enumerate((b"caf\xe9", b"a\nb", b"a\x1b[31m", b" ")):
        root = fill(tmp_path / str(number), "cat", "dog")
        os.mkdir(os.path.join(os.fsencode(root), name))
        with pytest.raises(
            UserError, match=r"name of the class directory of .*: rename it"
        ) as error:
            load(f"folder:{root}")
        assert str(error.value).isprintable()
    root = os.path.join(os.fsencode(tmp_path), b"r\xe9")
    os.mkdir(root)
    with pytest.raises(UserError, match="name of the directory is not UTF-8"):
        load(f"folder:{os.fsdecode(root)}")


def test_files_may_have_names_of_any_bytes(tmp_path):
    root = fill(tmp_path, "cat", "dog")
    name = os.path.join(os.fsencode(root), b"cat", b"caf\xe9.png")
    os.rename(root / "cat" / "00.png", name)
    assert sum(sizes(load(f"folder:{root}"))) == 40
    with open(name, "wb") as file:
        file.write(b"")
    with pytest.raises(UserError, match="1 unreadable image files") as error:
        load(f"folder:{root}")
    assert str(error.value).isprintable()


def test_one_spelling_of_a_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = fill(tmp_path, f"train/{decomposed}", "train/dog ", f"test/{composed}", "test/dog")
    dataset = load(f"folder:{root}")
    assert dataset.class_names == (composed, "dog")
    assert dataset.notes == ()
    fill(root, f"train/{composed}")
    with pytest.raises(UserError, match="read the same"):
        load(f"folder:{root}")
    root = fill(tmp_path / "case", "Cat", "cat")
    assert load(f"folder:{root}").class_names == ("Cat", "cat")


def test_home_directory(tmp_path, monkeypatch):
    fill(tmp_path, "pets/cat", "pets/dog")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sum(sizes(load("folder:~/pets"))) == 40


def test_unreadable_directories(tmp_path, monkeypatch):
    root = fill(tmp_path, "cat", "dog")
    allowed = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the directory '.*dog': Permission denied"):
        load(f"folder:{root}")


def test_orientation_is_known_before_images_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("png", "webp", "tif", "jpg"):
        root = fill(tmp_path / suffix, "cat", "dog", count=10)
        Image.fromarray(np.full((3, 4), 9, np.uint8)).save(
            root / "cat" / f"turned.{suffix}", exif=exif
        )
        dataset = load(f"folder:{root}")
        assert dataset.image_shape[:2] == (4, 3)


@pytest.mark.slow
def test_a_run_on_classes_of_any_name_ends_with_its_summary(tmp_path):
    names = ("$x_{$", "a|b", "猫", "dog & cat", "-1", "ß" * 40, "مرحبا", "%s{}")
    root = fill(tmp_path / "data", *(f"train/{name}" for name in names), count=12)
    # Of one class there is nothing to test on, and of several nothing to validate on.
    fill(root, *(f"test/{name}" for name in names[:-1]), count=3)
    os.rename(root / "train" / "猫" / "00.png", os.fsencode(root) + b"/train/-1/caf\xe9.png")
    line = [sys.executable, "-m", "experiments.classify", "--model", "lenet5", "--epochs", "1"]
    line += ["--dataset", f"folder:{root}", "--image-size", "28", "--run-dir", f"{tmp_path}/run"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([*line, "--batch-size", "16"], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"no test images of '%s{}'" in done.stdout
    saved = json.loads((tmp_path / "run" / "model.json").read_text())
    assert saved["class_names"] == sorted(names)
    assert (tmp_path / "run" / "summary.json").exists()
    predict = [sys.executable, "-m", "cnnjax", "predict", "--run", f"{tmp_path}/run"]
    image = os.fsencode(root) + b"/train/-1/caf\xe9.png"
    done = subprocess.run([*predict, image], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"caf\\udce9.png: " in done.stdout
