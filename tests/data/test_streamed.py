"""Datasets in memory and on disk through the same functions, and training from disk."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax import checkpoint
from cnnjax.commands import evaluate
from cnnjax.data import (
    ResidentPipeline,
    StreamedDataset,
    first_examples,
    load,
    open_dataset,
    shorten,
    sources,
    split_batches,
    split_size,
    training_pipeline,
)
from cnnjax.data.dataset import Dataset
from cnnjax.data.streamed import spread_examples
from cnnjax.data.streaming import StreamingPipeline
from cnnjax.data.tfds_splits import Range, as_text, count, cut
from cnnjax.errors import UserError
from cnnjax.run import cli, settings
from experiments import classify
from tests.data.conftest import made_images

SPLITS = ("train", "validation", "test")
# `made_digits` is stored in order, so that all its splits must be named.
NAMED = "tfds:made_digits?train=train[:24]+train[30:]&validation=train[24:30]&test=test"


@pytest.fixture(scope="module")
def shuffled_dir(tmp_path_factory):
    """A data directory with the tfds dataset `shuffled`: 40 images, one split, stored shuffled."""
    from cnnjax.data.tfds_source import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp("shuffled")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="shuffled",
        version="1.0.0",
        data_dir=directory,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
        ),
        split_datasets={
            "train": [
                (number, {"image": image, "label": number % 3})
                for number, image in enumerate(made_images(40, (28, 28, 1)))
            ]
        },
    )
    return directory


def open_named(tfds_dir, pipeline="stream", **options):
    return open_dataset(NAMED, pipeline=pipeline, data_dir=tfds_dir, **options)


def open_shuffled(directory, **options):
    return open_dataset("tfds:shuffled", pipeline="stream", data_dir=directory, **options)


def examples(dataset, split):
    """(image, label) of a split, as the evaluation batches have them."""
    batches = [jax.device_get(batch) for batch in split_batches(dataset, split, 7)]
    masks = np.concatenate([batch["mask"] for batch in batches])
    return tuple(
        np.concatenate([batch[name] for batch in batches])[masks] for name in ("image", "label")
    )


def numbers(dataset, split):
    return examples(dataset, split)[0][:, 0, 0, 0].tolist()


def test_cut_takes_positions_of_the_parts_laid_end_to_end():
    parts = [Range("train", 10, 20), Range("extra", 0, 5), Range("train", 30, 40)]
    positions = [(part.split, n) for part in parts for n in range(part.start, part.stop)]
    for start, stop in ((0, 25), (3, 8), (8, 12), (10, 15), (12, 25), (24, 99), (5, 5)):
        found = cut(parts, start, stop)
        listed = [(part.split, n) for part in found for n in range(part.start, part.stop)]
        assert listed == positions[start:stop]
        assert count(found) == len(listed)
    assert as_text(cut(parts, 8, 12)) == "train[18:20]+extra[0:2]"


def test_a_dataset_on_disk_is_the_one_in_memory(tfds_dir):
    streamed, loaded = open_named(tfds_dir), load(NAMED, data_dir=tfds_dir)
    assert isinstance(streamed, StreamedDataset) and isinstance(loaded, Dataset)
    for name in ("name", "class_names", "num_classes", "image_shape", "mean", "std"):
        assert getattr(streamed, name) == getattr(loaded, name)
    for split in SPLITS:
        assert split_size(streamed, split) == split_size(loaded, split)
        for found, expected in zip(examples(streamed, split), examples(loaded, split), strict=True):
            assert (found == expected).all()
        for some in (3, 1000, None):
            for found, expected in zip(
                first_examples(streamed, split, some),
                first_examples(loaded, split, some),
                strict=True,
            ):
                assert found.dtype == expected.dtype and (found == expected).all()


def test_an_epoch_holds_the_training_images_and_no_others(tfds_dir):
    # 44 training images: an epoch of four batches of 11 leaves none out.
    pipeline = training_pipeline(open_named(tfds_dir), 11, seed=1)
    assert (pipeline.steps_per_epoch, pipeline.num_examples) == (4, 44)
    batches = pipeline.batches(0)
    seen = [n for _ in range(4) for n in np.asarray(next(batches)["image"])[:, 0, 0, 0].tolist()]
    batches.close()
    assert sorted(seen) == [*range(24), *range(30, 50)]
    assert seen != sorted(seen)


def test_which_pipeline(tfds_dir):
    streamed, loaded = open_named(tfds_dir), load(NAMED, data_dir=tfds_dir)
    assert isinstance(training_pipeline(loaded, 8, seed=0), ResidentPipeline)
    assert isinstance(training_pipeline(loaded, 8, seed=0, stream=True), StreamingPipeline)
    assert isinstance(training_pipeline(streamed, 8, seed=0), StreamingPipeline)


def test_auto_streams_what_does_not_fit_in_memory(tfds_dir, monkeypatch):
    assert isinstance(open_named(tfds_dir, "auto"), Dataset)
    assert isinstance(open_named(tfds_dir, "resident"), Dataset)
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    assert isinstance(open_named(tfds_dir, "auto"), StreamedDataset)
    with pytest.raises(UserError, match="--pipeline stream"):
        open_named(tfds_dir, "resident")


def test_what_is_no_file_is_loaded_whatever_the_pipeline():
    assert isinstance(open_dataset("digits", pipeline="stream"), Dataset)


FOLDER_OPTIONS = (
    {},
    {"validation": 0},
    {"validation": 7, "seed": 3},
    {"stratify": False},
    {"image_size": 8, "fit": "resize"},
    {"classes": "dog,cat"},
)


@pytest.mark.parametrize("options", FOLDER_OPTIONS, ids=str)
def test_a_folder_on_disk_is_the_one_in_memory(image_folder, options):
    name = f"folder:{image_folder}"
    streamed, loaded = open_dataset(name, pipeline="stream", **options), load(name, **options)
    assert isinstance(streamed, StreamedDataset) and isinstance(loaded, Dataset)
    assert isinstance(open_dataset(name, **options), Dataset)
    for attribute in ("name", "class_names", "image_shape", "mean", "std", "notes"):
        assert getattr(streamed, attribute) == getattr(loaded, attribute)
    for split in [each for each in SPLITS if split_size(loaded, each)]:
        for found, expected in zip(examples(streamed, split), examples(loaded, split), strict=True):
            np.testing.assert_array_equal(found, expected)
    found, expected = (training_pipeline(each, 6, seed=5).batches(3) for each in (streamed, loaded))
    for _ in range(8):
        one, other = next(found), next(expected)
        for key in ("image", "label", "mask"):
            np.testing.assert_array_equal(one[key], other[key])
    found.close()


def test_examples_from_all_over_a_folder_are_of_all_classes(image_folder):
    name = f"folder:{image_folder}"
    streamed, loaded = open_dataset(name, pipeline="stream"), load(name)
    for found in (spread_examples(streamed, "train", 6), spread_examples(loaded, "train", 6)):
        assert found.label.tolist() == [0, 0, 0, 1, 1, 1]
    for one, other in zip(
        spread_examples(streamed, "train", 99), spread_examples(loaded, "train", 99), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert spread_examples(streamed, "test", 0).image.shape == (0, *streamed.image_shape)


def test_a_folder_on_disk_may_move_and_be_shortened(image_folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "folder"
    shutil.copytree(image_folder, moved)
    here, there = (
        open_dataset(f"folder:{where}", pipeline="stream") for where in (image_folder, moved)
    )
    assert here.checksum == there.checksum
    short = shorten(here, {"train": 5})
    assert split_size(short, "train") == 5 and short.checksum != here.checksum
    assert split_size(short, "test") == split_size(here, "test")
    (moved / "cat" / "00.png").unlink()
    assert open_dataset(f"folder:{moved}", pipeline="stream").checksum != here.checksum


def test_a_folder_that_does_not_fit_in_memory_is_streamed(image_folder, monkeypatch):
    name = f"folder:{image_folder}"
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    assert isinstance(open_dataset(name, image_size=8), StreamedDataset)
    with pytest.raises(UserError, match="pipeline 'stream'"):
        open_dataset(name, image_size=8, pipeline="resident")
    in_part = open_dataset(name, image_size=8, pipeline="stream", smallest_area=0.3)
    batches = training_pipeline(in_part, 4, seed=0).batches(0)
    assert next(batches)["image"].shape == (4, 8, 8, 1)
    batches.close()


def test_duplicates_on_disk_are_found_as_in_memory(image_folder):
    pixels = (image_folder / "cat" / "00.png").read_bytes()
    for number in range(20):
        (image_folder / "dog" / f"{number:02}.png").write_bytes(pixels)
    name, options = f"folder:{image_folder}", {"pipeline": "stream"}
    assert open_dataset(name, **options).notes == load(name).notes != ()
    without = open_dataset(name, drop_duplicates=True, **options)
    assert split_size(without, "train") == len(load(name, drop_duplicates=True).train.label)


def test_files_of_several_sizes_need_one(image_folder):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(image_folder / "cat" / "large.png")
    with pytest.raises(UserError, match=r"2 different sizes .* 5x4 and 9x9: give image_size"):
        open_dataset(f"folder:{image_folder}", pipeline="stream")


def test_splits_are_slices_where_the_dataset_has_none(shuffled_dir):
    everything = sorted(range(40))
    by_seed = {
        seed: {split: numbers(open_shuffled(shuffled_dir, seed=seed), split) for split in SPLITS}
        for seed in (0, 1)
    }
    for splits in by_seed.values():
        # 4 of 40 to test on; 0.1 of the other 36, rounded, to validate on.
        assert [len(splits[split]) for split in SPLITS] == [32, 4, 4]
        assert sorted(n for split in SPLITS for n in splits[split]) == everything
    assert by_seed[0]["test"] == by_seed[1]["test"]
    assert by_seed[0]["validation"] != by_seed[1]["validation"]
    again = open_shuffled(shuffled_dir, seed=1)
    assert numbers(again, "validation") == by_seed[1]["validation"]

    by_number = open_shuffled(shuffled_dir, validation=7)
    assert split_size(by_number, "validation") == 7
    assert split_size(by_number, "train") == 29


def test_no_validation_images(shuffled_dir, tfds_dir):
    for dataset in (
        open_shuffled(shuffled_dir, validation=0),
        load("tfds:made_digits", data_dir=tfds_dir, validation=0),
    ):
        assert split_size(dataset, "validation") == 0
        assert first_examples(dataset, "validation").image.shape == (0, *dataset.image_shape)
        with pytest.raises(UserError, match=r"the validation split of 'tfds:\w+' is empty"):
            split_batches(dataset, "validation", 4)


def test_shortened_splits_are_the_first_examples(tfds_dir):
    for dataset in (open_named(tfds_dir), load(NAMED, data_dir=tfds_dir)):
        short = shorten(dataset, {"train": 26, "test": 5, "validation": 100})
        # 24 from before the hole that validation left, 2 from behind it.
        assert numbers(short, "train") == [*range(24), 30, 31]
        assert numbers(short, "test") == list(range(5))
        assert numbers(short, "validation") == list(range(24, 30))
        assert short.checksum != dataset.checksum


def test_checksum_depends_on_the_data_and_not_on_their_place(shuffled_dir, tmp_path):
    (tmp_path / "moved").symlink_to(shuffled_dir)
    dataset = open_shuffled(shuffled_dir)
    assert dataset.checksum == open_shuffled(tmp_path / "moved").checksum
    others = [{"seed": 1}, {"validation": 0}, {"image_size": 20}, {"fit": "resize"}]
    checksums = {open_shuffled(shuffled_dir, **options).checksum for options in others}
    assert len({dataset.checksum, *checksums}) == 5


def test_shuffle_buffer_is_bounded_in_bytes(shuffled_dir, monkeypatch):
    assert open_shuffled(shuffled_dir).shuffle_buffer == 50_000
    # Images of noise cannot be compressed: about 900 bytes each with label and frame.
    monkeypatch.setattr("cnnjax.data.on_disk.SHUFFLE_BYTES", 10_000)
    assert 5 <= open_shuffled(shuffled_dir).shuffle_buffer <= 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": "streem"}, "unknown pipeline 'streem': did you mean stream"),
        ({"classes": "0,1"}, "classes='0,1': 'tfds:shuffled' is streamed"),
        ({"validation": 36}, "cannot hold out 36 of 36 training images"),
        ({"validation": -1}, "validation=-1"),
        ({"image_size": 0}, "image_size=0"),
        ({"fit": "pat"}, "unknown fit 'pat': did you mean pad"),
    ],
)
def test_bad_input(shuffled_dir, options, message):
    options = {"pipeline": "stream", "data_dir": shuffled_dir} | options
    with pytest.raises(UserError, match=message):
        open_dataset("tfds:shuffled", **options)


def test_a_dataset_stored_in_order_is_not_sliced(tfds_dir):
    name = "tfds:made_digits"
    with pytest.raises(UserError, match=f"'{name}' is stored in order"):
        open_dataset(name, pipeline="stream", data_dir=tfds_dir)
    whole = open_dataset(name, pipeline="stream", data_dir=tfds_dir, validation=0)
    assert split_size(whole, "train") == 50


# From the command line.


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Drawing the figures of a run takes seconds, and they are not at stake here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
        yield


def train(directory, data_dir, *argv):
    """Runs `experiments.classify` in this process; returns its exit code."""
    command = ["--dataset", "tfds:shuffled", "--data-dir", str(data_dir), "--devices", "1"]
    command += ["--model", "dense_dropout", "--batch-size", "8", "--run-dir", str(directory)]
    with pytest.raises(SystemExit) as stop:
        settings.launch(classify.Config, classify.main, [*command, "--pipeline", "stream", *argv])
    return stop.value.code


def final_state(directory):
    items = ("params", "opt_state", "progress")
    return jax.tree.map(np.asarray, checkpoint.restore_items(directory / "checkpoints", items))


@pytest.fixture(scope="module")
def finished_run(shuffled_dir, tmp_path_factory, no_figures):
    directory = tmp_path_factory.mktemp("runs") / "straight"
    assert train(directory, shuffled_dir, "--epochs", "2") == 0
    return directory


@pytest.mark.slow
def test_a_streamed_run_resumes_to_the_same_bits(finished_run, shuffled_dir, tmp_path):
    stopped = tmp_path / "stopped"
    settings = ["--epochs", "2"]
    assert train(stopped, shuffled_dir, *settings, "--stop-after-epochs", "1") == 0
    assert not (stopped / "summary.json").exists()
    again = ["--stop-after-epochs", "0", "--resume", str(stopped)]
    assert train(stopped, shuffled_dir, *settings, *again) == 0
    jax.tree.map(np.testing.assert_array_equal, final_state(finished_run), final_state(stopped))
    assert (finished_run / "metrics.jsonl").read_text() == (stopped / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_evaluate_finds_the_splits_of_a_streamed_run(finished_run, shuffled_dir, tmp_path):
    for split in ("validation", "test"):
        with pytest.raises(SystemExit) as stop:
            argv = ["--run", str(finished_run), "--split", split, "--out", str(tmp_path / split)]
            cli.run(evaluate.Config, evaluate.main, argv)
        assert not stop.value.code
    report = json.loads((tmp_path / "test" / "evaluation.json").read_text())
    summary = json.loads((finished_run / "summary.json").read_text())
    assert report["examples"] == summary["test_examples"] == 4
    assert report["accuracy"] == pytest.approx(summary["test_accuracy"])
    report = json.loads((tmp_path / "validation" / "evaluation.json").read_text())
    assert report["examples"] == summary["validation_examples"] == 4


def test_training_without_validation_says_so(shuffled_dir, tmp_path, capsys):
    assert train(tmp_path / "run", shuffled_dir, "--validation", "0", "--smoke") == 0
    printed = capsys.readouterr().out
    assert "tfds:shuffled, streamed: 36 training, no validation, 4 test images" in printed
    assert "epoch 1: validation" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_examples"] == 0
    assert summary["best_validation_accuracy"] is None
    assert "| validation_examples | 0 |" in (tmp_path / "run" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--patience", "2", "--validation", "0"], "patience 2 stops by the validation accuracy"),
        (["--parallel", "scan"], "'scan' needs resident data"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(
    argv, message, shuffled_dir, tmp_path, capsys, monkeypatch
):
    def read(*arguments):
        raise AssertionError("data were read")

    monkeypatch.setattr("cnnjax.data.tfds_source.read_split", read)
    assert train(tmp_path / "run", shuffled_dir, *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
