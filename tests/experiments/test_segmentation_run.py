"""A U-Net trained on a segmentation task: a whole run, and the same step on many devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnnjax
from cnnjax import commands, models
from cnnjax.models.unet import UNet
from cnnjax.run import files
from cnnjax.tasks.segmentation import segmentation
from cnnjax.train.evaluate import evaluate
from cnnjax.train.predict import make_eval_step
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step
from experiments import segment_digits
from tests.experiments.test_experiments import launch
from tests.models.quick import quick_jit

SIDE = 8


def bright_and_dark(count, seed):
    """A bright and a dark square on gray ground; their edges are ignored now and then."""
    generator = np.random.default_rng(seed)
    image = np.full((count, SIDE, SIDE, 1), 120, np.uint8)
    class_map = np.zeros((count, SIDE, SIDE), np.uint8)
    for index in range(count):
        for number, level in ((1, 220), (2, 20)):
            top, left = generator.integers(0, SIDE - 3, 2)
            image[index, top : top + 3, left : left + 3] = level
            class_map[index, top : top + 3, left : left + 3] = number
            class_map[index, top, left] = 255 if generator.uniform() < 0.5 else number
    return {"image": image, "class_map": class_map}


def squares():
    task = segmentation(3, class_names=("ground", "bright", "dark"))
    return task, cnnjax.data.ArrayDataset(
        "squares",
        task.inputs,
        train=bright_and_dark(256, 0),
        validation=bright_and_dark(32, 1),
        test=bright_and_dark(40, 2),
    )


@pytest.mark.slow
def test_a_run_monitors_and_reports_the_mean_iou(tmp_path):
    task, data = squares()
    trained = cnnjax.run.train(
        models.create("unet", num_classes=3, widths=(8, 8), norm="batch"),
        task,
        data,
        "adam",
        learning_rate=0.03,
        epochs=6,
        batch_size=16,
        run_dir=str(tmp_path / "run"),
        devices=1,
    )
    summary = trained.summary
    assert summary["monitor"] == "mean_iou"
    assert summary["test_mean_iou"] > 0.9
    assert summary["test_mean_iou"] <= summary["test_mean_dice"] <= 1.0
    assert {"test_loss", "test_pixel_accuracy", "best_validation_mean_iou"} <= set(summary)
    assert "bright" in (trained.directory / "summary.md").read_text()
    figures = {path.stem for path in (trained.directory / "figures").glob("*.png")}
    assert figures >= {"overlays", "confusion_matrix", "learning_curves"}


@pytest.fixture(scope="module")
def stepped():
    """Returns a maker of steps, a state and a batch of which every image ignores other pixels."""
    task, data = squares()
    model = models.create("unet", num_classes=3, widths=(2, 2), norm="batch")
    optimizer = optax.sgd(1.0)
    variables = quick_jit(model.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
    state = create_state(variables, optimizer, jax.random.key(1))
    batch = {name: array[:16] for name, array in data.train.items()}
    batch["mask"] = np.arange(16) != 5

    def make(axis_name=None):
        return make_step(model, optimizer, task, schedule=lambda step: 1.0, axis_name=axis_name)

    return make, state, batch


@pytest.mark.slow
def test_one_and_eight_devices_make_the_same_step(stepped):
    make, state, batch = stepped
    expected, metrics = jax.jit(make())(state, batch)
    found, metrics_of_eight = jax.pmap(make("data"), axis_name="data")(
        jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state),
        {name: array.reshape(8, 2, *array.shape[1:]) for name, array in batch.items()},
    )
    for one, other in zip(
        jax.tree.leaves((expected.params, expected.batch_stats)),
        jax.tree.leaves((found.params, found.batch_stats)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other[0], rtol=1e-4, atol=1e-5)
    counted = (batch["class_map"] != 255) & batch["mask"][:, None, None]
    assert int(metrics["loss"][1]) == int(metrics_of_eight["loss"][1][0]) == counted.sum()


@pytest.mark.parametrize("batch_size", [40, 16])
def test_evaluation_counts_each_pixel_once(batch_size):
    """However the 40 images are cut into batches, the last of which is padded."""
    task, data = squares()
    model = UNet(num_classes=3, widths=(2, 2))
    variables = quick_jit(model.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
    step = jax.jit(make_eval_step(model, task))
    batches = cnnjax.data.split_batches(data, "test", batch_size)
    found = evaluate(step, variables, batches, scores_of=task.scores)
    truth = data.test["class_map"]
    rows = [int(np.sum(truth == number)) for number in range(3)]
    assert found["confusion"].sum(axis=1).tolist() == rows
    assert found["confusion"].dtype == np.int64
    assert 0 <= found["mean_iou"] <= found["mean_dice"] <= 1


def test_the_experiment_composes_scenes_of_each_splits_own_digits():
    config = segment_digits.Config(smoke=True, model_arguments=("widths=(4,8)",))
    recipe = segment_digits.recipe(config)
    sizes = {
        split: len(getattr(recipe.dataset, split)["image"]) for split in segment_digits.SMOKE_SCENES
    }
    assert sizes == segment_digits.SMOKE_SCENES
    assert recipe.task.monitor == ("mean_iou", "max")
    assert recipe.model.widths == (4, 8)


@pytest.mark.slow
def test_evaluate_scores_a_run_of_another_task_as_its_own_end_did(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--smoke", "--devices", "1", "--model-arguments", "widths=(4,8)", "--run-dir", run]
    assert launch(segment_digits, *flags) == 0
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        commands.main(["evaluate", "--run", str(run), "--out", str(tmp_path / "out")])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert f"on {summary['test_examples']} test examples" in printed
    assert f"mean_iou {summary['test_mean_iou']:.4f}" in printed
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["mean_iou"] == summary["test_mean_iou"]
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "overlays",
        "confusion_matrix",
    }

    def refused(*flags):
        with pytest.raises(SystemExit) as stop:
            commands.main(["evaluate", "--run", str(run), *flags])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "--tta is for classifiers" in refused("--tta", "flip")
    config = json.loads((run / "config.json").read_text())
    files.write_json(run / "config.json", config | {"experiment": "cnnjax.run.train"})
    assert "its task and data are in the program that called it" in refused()
    files.write_json(run / "config.json", config | {"experiment": "experiments.mnist_lenet"})
    assert "has no function `recipe(config)`" in refused()
    files.write_json(run / "config.json", config | {"experiment": "experiments.gone"})
    assert "which cannot be imported" in refused()
