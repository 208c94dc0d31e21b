"""`experiments.finetune` from its command line: one base, and what is made of it."""

import json
import shutil

import jax
import numpy as np
import pytest

from cnnjax import checkpoint, models
from cnnjax.commands import evaluate
from cnnjax.data.dataset import Dataset
from cnnjax.run import classifier, cli, load
from experiments import classify, mnist_lenet
from experiments import finetune as experiment
from tests.experiments.test_experiments import SMOKE, launch, snapshot
from tests.tiny import random_arrays


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "base"
    flags = ["--run-dir", directory, "--classes", "0,1,2", "--model-arguments", "pool=average"]
    assert launch(mnist_lenet, *SMOKE, *flags) == 0
    return directory


def flags(base, directory, *more):
    few = ["--classes", "5,6,7,8", "--labels-per-class", "10", "--batch-size", "8"]
    return [*SMOKE, *few, "--base", base, "--run-dir", directory, *more]


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "lora"
    assert launch(experiment, *flags(base, directory, "--method", "lora:2")) == 0
    return directory


@pytest.mark.slow
def test_only_what_is_trained_is_saved_and_the_card_finds_the_rest(base, lora_run):
    summary = json.loads((lora_run / "summary.json").read_text())
    assert summary["trained_parameters"] < 0.1 * summary["parameters"]
    assert (summary["model"], summary["step"]) == ("lenet5", 5)
    found = checkpoint.restore_items(lora_run / "checkpoints", ["params"])
    assert set(found["params"]["conv1"]) == {"lora_a", "lora_b"}
    trained = load.load_trained(lora_run)
    assert isinstance(trained.model, models.lenet.LeNet5)
    assert (trained.model.pool, trained.model.num_classes) == ("average", 4)
    whole = load.load_trained(base)
    assert trained.card["mean"] == whole.card["mean"]
    np.testing.assert_array_equal(
        trained.variables["params"]["conv1"]["bias"], whole.variables["params"]["conv1"]["bias"]
    )


@pytest.mark.slow
def test_it_is_evaluated_like_any_run(lora_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.Config, evaluate.main, ["--run", str(lora_run), "--out", str(tmp_path)])
    assert not stop.value.code
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_left_alone_when_finished(base, lora_run):
    before = snapshot(lora_run)
    assert launch(experiment, *flags(base, lora_run, "--method", "lora:2")) == 0
    assert snapshot(lora_run) == before


@pytest.mark.slow
def test_it_resumes_with_its_own_base_only_wherever_that_is(base, lora_run, tmp_path, capsys):
    killed, moved, other = tmp_path / "killed", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(lora_run, killed)
    # As a kill just before the summary would leave it.
    (killed / "summary.json").unlink()
    shutil.copytree(base, moved)
    shutil.copytree(base, other)
    found = checkpoint.restore_items(base / "checkpoints", ["params", "batch_stats", "ema"])
    ema = jax.tree.map(lambda leaf: leaf + np.float32(1e-3), found["ema"])
    state = {**found, "ema": ema, "step": np.int32(found["step"])}
    del state["progress"]
    checkpoint.save(other / "checkpoints", state, {})

    assert launch(experiment, "--resume", killed, "--base", other) == 2
    assert "the base's weights are not those of" in capsys.readouterr().err
    assert launch(experiment, "--resume", killed, "--base", moved) == 0
    accuracy = [
        json.loads((run / "summary.json").read_text())["test_accuracy"]
        for run in (lora_run, killed)
    ]
    assert accuracy[0] == accuracy[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "lorra:2"], "unknown fine-tuning method 'lorra': did you mean lora"),
        (
            ["--labels-per-class", "1000"],
            "1000 labels per class asked for, but class 5 of mnist has",
        ),
        (["--new"], "head/kernel (float32[84,3] in it, float32[84,4] wanted)"),
        (["--model", "cnn_32_64"], "does not fit SimpleCNN"),
        (["--also-train", "conv9/.*"], "matches nothing"),
        (["--method", "head", "--l2-sp", "0.1"], "none that is trained comes from the base"),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, more, message, capsys):
    assert launch(experiment, *flags(base, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_base_is_needed_but_for_a_smoke_run(tmp_path, capsys):
    assert launch(experiment, "--run-dir", tmp_path / "run") == 2
    assert "no base given: name a run or a checkpoint directory with --base" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_smoke_run_makes_its_own_base(tmp_path):
    line = [*SMOKE, "--model", "lenet5", "--run-dir", tmp_path]
    more = ["--layer-decay", "0.5", "--unfreeze-epochs", "0.2", "--l2-sp", "0.1"]
    assert launch(experiment, *line, *more) == 0
    assert json.loads((tmp_path / "base" / "summary.json").read_text())["test_examples"] == 256
    trained = load.load_trained(tmp_path)
    assert trained.card["finetune"]["base"] == str(tmp_path / "base")


@pytest.mark.slow
def test_scratch_takes_the_settings_of_the_base_and_none_of_its_numbers(base, tmp_path):
    assert launch(experiment, *flags(base, tmp_path, "--method", "scratch")) == 0
    first = checkpoint.restore_items(tmp_path / "checkpoints", ["params"])["params"]
    loaded = load.read_base(base).variables["params"]
    for a, b in zip(jax.tree.leaves(first["conv1"]), jax.tree.leaves(loaded["conv1"]), strict=True):
        assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 0.9


def test_weights_that_want_bgr_get_it_when_fine_tuned():
    arrays = random_arrays(20, shape=(8, 8, 3))
    moments = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    names = tuple(map(str, range(10)))
    dataset = Dataset("made", names, arrays, arrays, arrays, **moments)
    config = classify.Config(batch_size=10)
    model, card = classifier.make_model(config, "cnn_32_dense64", {}, dataset)
    image = arrays.image[:2]
    plain = classifier.make_recipe(config, dataset, model, card).normalize(image)
    card |= {"mean": (0.3, 0.2, 0.1), "std": moments["std"], "channel_order": "BGR"}
    reversed_ = classifier.make_recipe(config, dataset, model, card).normalize(image)
    np.testing.assert_array_equal(reversed_, plain[..., ::-1])
