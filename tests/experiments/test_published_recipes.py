"""Experiments that follow a paper: their settings, and runs on stand-ins for data not had here."""

import json

import jax
import numpy as np
import pytest

from cnnjax import schedules, spec
from cnnjax.run import load, record
from experiments import cifar10_resnet, fashion_mnist_resnet, imagenet_resnet50
from tests.experiments.test_experiments import launch


def parsed(module, *argv, tmp_path):
    name = module.__name__
    return record.resolve(
        module.Config, name, [*map(str, argv), "--run-dir", str(tmp_path / "run")]
    )


def learning_rates(config, steps_per_epoch, epochs):
    total = config.epochs * steps_per_epoch
    schedule = schedules.make_schedule(
        config.schedule,
        config.learning_rate,
        total_steps=total,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        **spec.arguments(config.schedule_arguments),
    )
    return [float(schedule(round(epoch * steps_per_epoch))) for epoch in epochs]


def test_the_imagenet_rate_falls_after_30_60_and_80_epochs():
    config = imagenet_resnet50.Config()
    epochs = (0, 2.5, 5, 29.99, 30, 59.99, 60, 79.99, 80)
    expected = [0, 0.05, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4]
    np.testing.assert_allclose(learning_rates(config, 5004, epochs), expected, rtol=1e-5)


def test_the_cifar_rate_falls_after_half_and_three_quarters_of_64000_steps():
    config = cifar10_resnet.Config()
    assert abs(config.epochs * (50_000 // config.batch_size) - 64_000) < 100
    rates = learning_rates(config, 390, (0, 81.9, 82, 122.9, 123))
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 1e-3], rtol=1e-5)


def test_a_recipe_sets_defaults_and_flags_go_before_them(tmp_path):
    config = parsed(imagenet_resnet50, "--recipe", "300", "--epochs", 100, tmp_path=tmp_path)
    assert (config.optimizer, config.batch_size, config.epochs) == ("lamb", 2048, 100)
    assert config.model_arguments == ("stochastic_depth_rate=0.05",)
    assert parsed(imagenet_resnet50, tmp_path=tmp_path).optimizer == "nesterov"
    again = imagenet_resnet50.Config(**imagenet_resnet50.RECIPES["300"])
    assert again.loss == config.loss


@pytest.mark.parametrize(
    ("module", "dataset"),
    [
        (cifar10_resnet, "cifar10"),
        (fashion_mnist_resnet, "fashion_mnist"),
        (imagenet_resnet50, "imagenet2012"),
    ],
)
def test_without_the_data_one_line_says_how_to_prepare_them(module, dataset, tmp_path, capsys):
    assert launch(module, "--data-dir", tmp_path / "data", "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"scripts/prepare_data.py {dataset}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_smoke_run_without_the_data_says_that_its_images_are_made(tmp_path, capsys):
    flags = ["--smoke", "--devices", 1, "--data-dir", tmp_path / "data"]
    flags += ["--model", "cnn_32_dense64", "--run-dir", tmp_path / "run"]
    assert launch(cifar10_resnet, *flags) == 0
    assert "synthetic    images in place of tfds:" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dataset"].endswith("(synthetic images)")


@pytest.fixture(scope="module")
def jpeg_dir(tmp_path_factory):
    """A tfds dataset of 40 JPEG files of several sizes, streamed as ImageNet is."""
    from cnnjax.data.decoding import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)

    def examples(count):
        for number in range(count):
            shape = (60 + number % 7, 90 - number % 5, 3)
            image = rng.integers(0, 128, shape, dtype=np.uint8) + np.uint8(number % 4 * 40)
            yield number, {"image": image, "label": number % 4}

    directory = tmp_path_factory.mktemp("jpeg")
    tfds.dataset_builders.store_as_tfds_dataset(
        name="made_imagenet",
        version="1.0.0",
        data_dir=directory,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cat", "dog"]),
            }
        ),
        split_datasets={"train": list(examples(32)), "validation": list(examples(8))},
    )
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        # One block a stage: the whole network compiles for a minute.
        ("90", ["zero_init_residual=True", "stage_sizes=(1, 1, 1, 1)"]),
        pytest.param(
            "300",
            ["stochastic_depth_rate=0.05", "stage_sizes=(1, 1, 1, 1)"],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_imagenet_recipes_run_20_steps_on_jpeg_files(recipe, arguments, jpeg_dir, tmp_path):
    flags = {
        "recipe": recipe,
        "dataset": "tfds:made_imagenet",
        "data-dir": jpeg_dir,
        "run-dir": tmp_path / "run",
        "image-size": 32,
        "batch-size": 8,
        "epochs": 5,
        "warmup-epochs": 1,
        "devices": 1,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert launch(imagenet_resnet50, *words, "--model-arguments", *arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["step"], summary["test_examples"]) == (20, 8)
    trained = load.load_trained(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.variables))
