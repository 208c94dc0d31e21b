"""`cnnjax predict` prepares an image as the run was trained, and says so."""

import json

import numpy as np
import pytest
from PIL import Image

import cnnjax
from cnnjax.commands import predict
from cnnjax.run import classifier, cli, load, settings

GENERATOR = np.random.default_rng(0)


def made_folder(directory, sizes, mode):
    """Two classes, told by the shape of the photographs: tall and wide ones."""
    for name, (height, width) in sizes.items():
        (directory / name).mkdir(parents=True)
        for number in range(12):
            pixels = GENERATOR.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(directory / name / f"{number}.png")
    return directory


def trained(directory, *flags):
    argv = ["--model", "dense_dropout", "--devices", "1", "--epochs", "15", "--batch-size", "4"]
    argv += ["--run-dir", str(directory), *map(str, flags)]
    with pytest.raises(SystemExit) as stop:
        settings.launch(classifier.Config, classifier.main, argv)
    assert not stop.value.code
    return directory


def said(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(predict.Config, predict.main, [str(argument) for argument in argv])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("fit", ["pad", "resize", "crop(share=0.9)"])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 3), ("P", 3)])
def test_a_runs_own_files_become_the_arrays_that_it_was_trained_on(fit, mode, channels, tmp_path):
    folder = made_folder(tmp_path, {"tall": (40, 10), "wide": (10, 40)}, mode)
    dataset = cnnjax.data.load(
        f"folder:{folder}", image_size=(16, 16), fit=fit, validation=0, seed=0
    )
    card = {"image_shape": [16, 16, channels], "fit": fit, "dataset": dataset.name}
    prepare, _ = load.preparation(load.TrainedModel(None, {}, card, 0))
    paths = sorted(folder.glob("*/*.png"))
    made = np.stack([prepare(cnnjax.data.read_image(path)) for path in paths])
    images = np.concatenate([dataset.train.image, dataset.test.image])
    assert sorted(array.tobytes() for array in made) == sorted(array.tobytes() for array in images)


@pytest.mark.slow
def test_tall_and_wide_are_told_apart_by_predict_as_in_the_test(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
    folder = made_folder(tmp_path / "photos", {"tall": (60, 15), "wide": (15, 60)}, "L")
    run = trained(tmp_path / "run", "--dataset", f"folder:{folder}", "--image-size", 28)
    assert json.loads((run / "summary.json").read_text())["test_accuracy"] == 1.0
    paths = sorted(folder.glob("*/*.png"))
    printed = said(capsys, "--run", run, *paths)
    # 28x28 and gray, and yet no digit.
    assert "as the training images were: gray, pad to 28x28" in printed
    for path in paths:
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{path}:"))
        assert line.partition(": ")[2].split()[0] == path.parent.name


@pytest.mark.parametrize(
    ("dataset", "kind", "is_digit"),
    [
        ("mnist", "auto", True),
        ("tfds:mnist", "auto", True),
        ("mnist", "image", False),
        ("tfds:fashion_mnist", "auto", False),
        ("folder:photos", "auto", False),
        (None, "auto", False),
        (None, "digit", True),
    ],
)
def test_what_it_was_trained_on_decides_what_is_a_digit(dataset, kind, is_digit):
    card = {"image_shape": [32, 32, 1], "dataset": dataset}
    prepare, how = load.preparation(load.TrainedModel(None, {}, card, 0), kind)
    picture = np.full((60, 40, 1), 230, np.uint8)
    picture[10:50, 18:24] = 20  # A dark stroke on light paper.
    made = prepare(picture)
    assert made.shape == (32, 32, 1)
    # MNIST's ink is light, and its paper black.
    assert (made[16, 16, 0] > 128) == is_digit
    assert ("as MNIST was made" in how) == is_digit
