"""Published weights on ImageNet's test sets: classes by number, restriction, the whole command."""

import json

import numpy as np
import pytest
from PIL import Image

from cnnjax import commands, convert, models
from cnnjax.data.packaged import imagenet as images
from cnnjax.errors import UserError
from cnnjax.evaluation.imagenet import scores
from tests.models.test_families import random_variables

# Of the 1000, at the rows 0, 1, 2 and 999.
NUMBERS = ("n01440764", "n01443537", "n01484850", "n15075141")


def test_classes_are_found_by_wordnets_numbers_and_by_their_own():
    numbers = images.wordnet_numbers()
    assert len(numbers) == len(set(numbers)) == 1000
    assert images.logit_rows(("n15075141", "n01443537")).tolist() == [999, 1]
    # As the folders of ImageNet-V2, in the order of text.
    assert images.logit_rows(("0", "1", "10", "2")).tolist() == [0, 1, 10, 2]
    with pytest.raises(UserError, match="1 of 2 classes are none of ImageNet's, such as 'cat'"):
        images.logit_rows(("n01443537", "cat"))


def test_classes_that_do_not_count_are_left_out():
    logits = np.array([[5.0, 1, 2, 9], [0, 3, 3, 9], [2, 1, 0, 9]])
    answers = np.array([0, 2, 1])
    found = scores(logits, answers, np.array([0, 1, 2]))
    # Of the second example's two equal logits the first is the prediction.
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == 1
    assert found["classes"] == 3
    kept = np.exp(logits[:, :3])
    expected = -np.log(kept[np.arange(3), answers] / kept.sum(axis=1)).mean()
    assert found["loss"] == pytest.approx(expected)
    assert scores(logits, answers, np.arange(4))["top1"] == 0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network of ImageNet's classes, in a file with PyTorch's names."""
    model = models.create("cifar_resnet20", num_classes=1000)
    variables = random_variables(model, np.zeros((1, 32, 32, 3), np.float32))
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    convert.write(path, convert.from_cnnjax(variables, model, (32, 32, 3), framework="pytorch"))
    return path, model, variables


def write_images(root, folders):
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (9 + number, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")


def converted(weights, directory):
    with pytest.raises(SystemExit) as stop:
        commands.main(
            [
                *("convert", str(weights[0]), "--out", str(directory), "--model", "cifar_resnet20"),
                *("--framework", "pytorch", "--num-classes", "1000"),
            ]
        )
    assert not stop.value.code
    return directory


def evaluated(weights, tmp_path, capsys, *flags):
    """What `cnnjax evaluate --weights` prints and writes of a folder of 4 classes, and what is
    expected."""
    _, model, variables = weights
    write_images(tmp_path / "images", NUMBERS)
    run = converted(weights, tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        commands.main(
            [
                *("evaluate", "--weights", str(run), "--dataset", f"folder:{tmp_path / 'images'}"),
                *("--out", str(tmp_path / "out"), *flags),
            ]
        )
    assert not stop.value.code, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "among 4 classes" in printed
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    opened = images.open_images(f"folder:{tmp_path / 'images'}", (32, 32), fit="resize")
    batch = next(opened.batches(12))
    logits = model.apply(variables, np.asarray(batch["image"]) / np.float32(255))
    rows = np.array([0, 1, 2, 999])
    expected = scores(np.asarray(logits), rows[np.asarray(batch["label"])], rows)
    assert found["top1"] == expected["top1"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert (found["examples"], found["classes"]) == (12, 4)
    return printed, expected


@pytest.mark.slow
def test_a_folder_of_some_classes_is_evaluated_among_them(weights, tmp_path, capsys):
    evaluated(weights, tmp_path, capsys)


# A minute, most of it to compile 95 corruptions; test_full_scores has a small one.
@pytest.mark.exhaustive
def test_a_folder_of_some_classes_has_all_scores_in_one_table(weights, tmp_path, capsys):
    printed, expected = evaluated(weights, tmp_path, capsys, "--full")
    assert "CE against AlexNet as published" in printed
    full = json.loads((tmp_path / "out" / "full.json").read_text())
    values = {row["name"]: row["value"] for row in full["rows"]}
    assert values["accuracy"] == pytest.approx(expected["top1"])
    assert values["negative log-likelihood"] == pytest.approx(expected["loss"], rel=1e-4)
    assert (tmp_path / "out" / "figures" / "corruptions.png").exists()


def test_the_images_of_a_split_are_found(tmp_path):
    write_images(tmp_path, [f"{split}/{n}" for split in ("train", "val") for n in NUMBERS[:2]])
    fit = "center(resize=9, interpolation=bicubic)"
    opened = images.open_images(f"folder:{tmp_path}", (8, 8), fit=fit)
    assert (opened.count, opened.rows.tolist()) == (6, [0, 1])
    (batch,) = opened.batches(6)
    assert batch["image"].shape == (6, 8, 8, 3)
    with pytest.raises(UserError, match=r"no directory .*: give folder:PATH"):
        images.open_images(f"folder:{tmp_path}/none", (8, 8), fit=fit)
    with pytest.raises(UserError, match="unknown dataset 'mnist'"):
        images.open_images("mnist", (8, 8), fit=fit)


@pytest.mark.slow
def test_tfds_imagenet_is_tested_on_its_validation_split(tmp_path):
    """On images made by tfds, stored under ImageNet's name."""
    from cnnjax.data.tfds_source import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    labels = tfds.features.ClassLabel(names=images.wordnet_numbers())
    rng = np.random.default_rng(0)
    examples = [
        (n, {"image": rng.integers(0, 256, (20 + n, 30, 3), np.uint8), "label": label})
        for n, label in enumerate((5, 999, 0))
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet_a",
        version="9.9.9",
        features=tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": labels}),
        split_datasets={"train": examples[:1], "validation": examples, "test": examples[:1]},
        data_dir=tmp_path,
        disable_shuffling=True,
    )
    opened = images.open_images(
        "tfds:imagenet_a:9.9.9",
        (16, 16),
        fit="center(resize=18, interpolation=bicubic)",
        data_dir=tmp_path,
    )
    assert (opened.count, opened.only_present) == (3, True)
    (batch,) = opened.batches(3)
    assert opened.rows[np.asarray(batch["label"])].tolist() == [5, 999, 0]
    assert batch["image"].shape == (3, 16, 16, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "none.pth"], "no images given"),
        # The images are looked for before the weights.
        (["--weights", "none.pth", "--dataset", "mnist"], "unknown dataset 'mnist'"),
        (["--weights", "none.pth", "--dataset", "folder:nowhere"], "no directory 'nowhere'"),
        (["--weights", "none.pth", "--tta", "flip"], "--tta is for --run, not for --weights"),
    ],
)
def test_mistakes(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["evaluate", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
