"""Experiments from their command lines: what a run leaves, how it resumes, how it refuses."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax import checkpoint
from cnnjax.augment import policy
from cnnjax.commands import evaluate, predict, show_batch
from cnnjax.data import mnist
from cnnjax.data.dataset import Dataset
from cnnjax.errors import UserError
from cnnjax.rng import stream_key
from cnnjax.run import (
    classifier,
    cli,
    files,
    load,
    record,
    settings,
)
from cnnjax.run.logs import read_metrics
from cnnjax.train import replay
from cnnjax.train.state import training_key
from experiments import classify, mnist_lenet
from tests.tiny import random_arrays

SMOKE = ["--smoke", "--devices", "1"]


def launch(module, *argv):
    """Runs an experiment's command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        settings.launch(module.Config, module.main, [str(argument) for argument in argv])
    return stop.value.code


def snapshot(directory):
    """The content of every file under a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "lenet"
    assert launch(mnist_lenet, *SMOKE, "--run-dir", directory, "--seed", 3) == 0
    return directory


def test_a_run_leaves_everything_it_promises(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert {"test_accuracy", "parameters", "seconds", "seed"} <= set(summary)
    assert (summary["parameters"], summary["seed"], summary["test_examples"]) == (44426, 3, 256)
    config = json.loads((finished_run / "config.json").read_text())
    assert config["settings"]["seed"] == 3
    assert set(config["versions"]) >= {"jax", "flax", "optax", "orbax-checkpoint"}
    figures = {path.stem for path in (finished_run / "figures").glob("*.png")}
    assert figures >= {"learning_curves", "confusion_matrix", "filters", "worst_classified"}
    assert f"{summary['test_accuracy']:.2%}" in (finished_run / "summary.md").read_text()
    assert list((finished_run / "tensorboard").rglob("events.*"))
    records = read_metrics(finished_run)
    assert {record["kind"] for record in records} == {"train", "validation", "test"}
    names = {"loss", "accuracy", "learning_rate", "gradient_norm", "update_norm"}
    assert names <= set(records[0])
    assert checkpoint.latest(finished_run / "checkpoints") == 16


@pytest.mark.parametrize("flag", ["--resume", "--run-dir"])
def test_a_finished_run_is_left_alone(finished_run, flag, capsys):
    before = snapshot(finished_run)
    settings = [] if flag == "--resume" else [*SMOKE, "--seed", "3"]
    assert launch(mnist_lenet, *settings, flag, finished_run) == 0
    assert "is finished" in capsys.readouterr().out
    assert snapshot(finished_run) == before


def test_a_run_of_another_experiment_is_not_resumed(finished_run, capsys):
    before = snapshot(finished_run)
    assert launch(classify, "--resume", finished_run) == 2
    assert "is a run of experiments.mnist_lenet, not of experiments.classify" in (
        capsys.readouterr().err
    )
    assert snapshot(finished_run) == before


def test_a_resumed_run_has_its_own_settings_but_does_not_stop_again(finished_run, tmp_path):
    config = json.loads((finished_run / "config.json").read_text())
    config["settings"] |= {"stop_after_epochs": 1, "learning_rate": 0.25, "smoke": False}
    config["settings"] |= {"model_arguments": ["pool=average"]}
    files.write_json(tmp_path / "config.json", config)
    name = "experiments.mnist_lenet"
    resumed = record.resolve(mnist_lenet.Config, name, ["--resume", str(tmp_path), "--epochs", "9"])
    assert (resumed.stop_after_epochs, resumed.learning_rate, resumed.epochs) == (0, 0.25, 9)
    assert resumed.model_arguments == ("pool=average",)
    assert resumed.run_dir == str(tmp_path)


def test_settings_that_are_no_more_are_not_dropped_in_silence(finished_run, tmp_path):
    config = json.loads((finished_run / "config.json").read_text())
    config["settings"] |= {"unheard_of": 0, "rotation": 7.0}
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=r"does not have \(rotation=7.0\): resume it with that"):
        record.resolve(mnist_lenet.Config, "experiments.mnist_lenet", ["--resume", str(tmp_path)])


def test_settings_of_a_resumed_run_are_its_own(finished_run, capsys):
    assert launch(mnist_lenet, "--resume", finished_run, "--learning-rate", "0.5") == 2
    assert "--learning-rate 0.5 differs from the resumed run's" in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_written_over(finished_run, capsys):
    before = snapshot(finished_run)
    assert launch(mnist_lenet, *SMOKE, "--run-dir", finished_run, "--seed", 4) == 2
    assert "holds a finished run with other settings" in capsys.readouterr().err
    assert snapshot(finished_run) == before


def test_evaluate_agrees_with_the_run(finished_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(
            evaluate.Config, evaluate.main, ["--run", str(finished_run), "--out", str(tmp_path)]
        )
    assert not stop.value.code
    printed = capsys.readouterr().out
    for word in (
        "accuracy",
        "precision",
        "recall",
        "F1",
        "ROC AUC",
        "macro",
        "micro",
        "calibration",
    ):
        assert word in printed
    assert json.loads((tmp_path / "evaluation.json").read_text())["examples"] == 10_000
    assert len(list((tmp_path / "figures").glob("*.png"))) == 5


def test_predict_classifies_files_of_any_size_and_color(finished_run, tmp_path, capsys):
    digit = mnist.read()["test"].image[0, :, :, 0]
    light = Image.fromarray(255 - digit).resize((90, 120)).convert("RGB")
    dark = Image.fromarray(digit).resize((300, 260))
    paths = [tmp_path / "light.jpg", tmp_path / "dark.png"]
    light.save(paths[0])
    dark.save(paths[1])
    argv = ["--run", finished_run, "--out", tmp_path / "out", *paths]
    with pytest.raises(SystemExit) as stop:
        cli.run(predict.Config, predict.main, [str(argument) for argument in argv])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    answers = [line.split(":")[1].split()[0] for line in lines if "%" in line]
    assert len(answers) == 2
    assert all(answer in mnist.CLASS_NAMES for answer in answers)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"light.jpg.png", "dark.png.png"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], "--epochs"),
        (["--epochs", "three"], "three"),
        (["--model", "lenet55"], "unknown model 'lenet55': did you mean lenet5"),
        (["--optimizer", "adamm"], "unknown optimizer 'adamm': did you mean adam"),
        (["--schedule", "cosin"], "unknown schedule 'cosin': did you mean cosine"),
        (["--dataset", "mnits"], "unknown dataset 'mnits': did you mean mnist"),
        (["--classes", "3,12"], "12"),
        (["--batch-size", "30", "--devices", "8"], "batch size 30 is not divisible by the 8"),
        (["--devices", "99"], "99 devices asked for"),
        (["--run-dir", "/proc/nowhere"], "cannot write the run directory"),
        (["--resume", "/nowhere"], "/nowhere is not a run directory"),
        (["--learning-rate", "-1"], "--learning-rate -1.0: give 0 or more"),
        (["--validation", "1.5"], "validation"),
        (["--accumulate", "7", "--devices", "1"], "64 examples each, which do not divide into 7"),
        (["--accumulate", "0"], "accumulate 0: give 1"),
        (["--precision", "bf16"], "bfloat16"),
        (["--remat"], "--remat: lenet5 has no blocks"),
        (
            ["--precision", "float16", "--model-arguments", "dtype=float32"],
            "--precision and the model argument dtype contradict each other",
        ),
        (["--model-arguments", "activation=swoosh"], "swoosh"),
        (["--augment", "flop"], "unknown augmentation 'flop': did you mean flip"),
        (["--augment", "crop:-4"], "'crop:-4': max_pixels=-4: give a magnitude of 0 or more"),
        (["--preprocess", "median:4"], "window of size=4: give an odd number"),
        (["--sam", "-0.1"], "--sam -0.1: give 0 to 1,000,000"),
        (["--max-norm", "-3"], "max_norm must be positive"),
        (["--recalibrate", "4"], "--recalibrate 4: LeNet5 has no BatchNorm"),
        (["--swa-from-epoch", "3"], "--swa-from-epoch and --ema-decay are two averages"),
        (["--ema-decay", "0", "--swa-from-epoch", "13"], "--swa-from-epoch 13: give an epoch"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    argv, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert launch(mnist_lenet, *argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not list(tmp_path.rglob("*.json"))


def test_bad_input_is_quick_and_has_no_traceback(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.mnist_lenet", "--optimizer", "adamm"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("content", [b"no image", b""])
def test_predict_refuses_what_is_no_image(finished_run, tmp_path, content, capsys):
    path = tmp_path / "digit.png"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.run(predict.Config, predict.main, ["--run", str(finished_run), str(path)])
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err


# What follows trains on a few hundred synthetic images, through the same line as every experiment.


def made_dataset(num_classes=10, data_seed=0):
    train, validation, test = (
        random_arrays(size, num_classes=num_classes, seed=data_seed) for size in (256, 64, 64)
    )
    names = tuple(map(str, range(num_classes)))
    return Dataset("made", names, train, validation, test, mean=(0.5,), std=(0.3,))


@pytest.fixture
def train_made(monkeypatch, capsys):
    """Returns `train(**settings) -> exit code` for `classify` on synthetic images."""

    def train(num_classes=10, data_seed=0, **settings):
        dataset = made_dataset(num_classes, data_seed)
        monkeypatch.setattr("cnnjax.data.load", lambda *a, **k: dataset, raising=False)
        defaults = {"model": "lenet5", "epochs": 4, "batch_size": 32, "devices": 1}
        return classify.main(classify.Config(**(defaults | settings)))

    return train


def final_state(directory):
    items = checkpoint.restore_items(
        Path(directory) / "checkpoints", ("params", "batch_stats", "opt_state", "ema", "progress")
    )
    return jax.tree.map(np.asarray, items)


def assert_same_bits(first, second):
    jax.tree.map(np.testing.assert_array_equal, final_state(first), final_state(second))
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "scan"])
def test_same_seed_same_bits_and_stopped_runs_resume_to_the_same_bits(
    train_made, tmp_path, parallel
):
    settings = {"parallel": parallel, "ema_decay": 0.9, "augment": "rotate:10"}
    settings |= {"model": "cnn_32_64_dense128_dropout", "model_arguments": ()}
    straight, again, stopped = (tmp_path / name for name in ("straight", "again", "stopped"))
    assert train_made(run_dir=str(straight), **settings) == 0
    assert train_made(run_dir=str(again), **settings) == 0
    assert_same_bits(straight, again)

    assert train_made(run_dir=str(stopped), stop_after_epochs=1, **settings) == 0
    assert not (stopped / "summary.json").exists()
    assert train_made(resume=str(stopped), stop_after_epochs=3, **settings) == 0
    assert train_made(resume=str(stopped), **settings) == 0
    assert_same_bits(straight, stopped)


@pytest.mark.slow
def test_another_seed_gives_another_network(train_made, tmp_path):
    for seed in (0, 1):
        train_made(run_dir=str(tmp_path / str(seed)), epochs=1, seed=seed)
    kernels = [final_state(tmp_path / str(s))["params"]["head"]["kernel"] for s in (0, 1)]
    assert not np.array_equal(*kernels)


@pytest.mark.slow
def test_two_classes_are_one_logit_with_binary_cross_entropy(train_made, tmp_path):
    assert train_made(num_classes=2, run_dir=str(tmp_path), epochs=8) == 0
    assert final_state(tmp_path)["params"]["head"]["kernel"].shape == (84, 1)
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("parallel", "pipeline"),
    [
        pytest.param("scan", "resident", marks=pytest.mark.slow),
        pytest.param("jit", "resident", marks=pytest.mark.slow),
        pytest.param("jit", "stream", marks=pytest.mark.slow),
    ],
)
def test_what_a_step_saw_is_made_again(train_made, tmp_path, monkeypatch, parallel, pipeline):
    """From (seed, step) alone, against what the compiled steps of a run report."""
    text, seen = "rotate:10,noise:0.1,mixup:0.4", {}

    def reporting(augment, **options):
        change = policy.make_augment(augment, **options)

        def changed(key, batch, first_index):
            batch = change(key, batch, first_index)
            jax.debug.callback(report, jax.random.key_data(key), batch["image"], batch["label"])
            return batch

        return changed

    def report(key, image, label):
        seen[tuple(np.asarray(key).tolist())] = (np.asarray(image), np.asarray(label))

    monkeypatch.setattr("cnnjax.augment.make_augment", reporting, raising=False)
    settings = {"seed": 5, "epochs": 2, "parallel": parallel, "pipeline": pipeline}
    assert train_made(run_dir=str(tmp_path), augment=text, **settings) == 0
    jax.effects_barrier()
    assert len(seen) == 16
    augment = policy.make_augment(text, num_classes=10)
    for step in (0, 11):
        stored = replay.stored_batch(
            made_dataset(), batch_size=32, seed=5, step=step, stream=pipeline == "stream"
        )
        made = replay.augmented_batch(stored, augment, seed=5, step=step)
        key = stream_key(training_key(5), "augment", step)
        image, label = seen[tuple(np.asarray(jax.random.key_data(key)).tolist())]
        # Where a position falls between pixels, its last bits show in the image.
        np.testing.assert_allclose(made["image"], image, atol=2e-4)
        np.testing.assert_allclose(made["label"], label, atol=1e-5)
        assert np.abs(image - stored["image"] / 255.0).max() > 0.1


def test_a_batch_is_drawn(tmp_path, capsys):
    flags = ["--augment", "elastic:34,cutmix:1", "--step", 3, "--count", 9, "--smoke"]
    assert drawn(show_batch, *flags, "--run-dir", tmp_path) == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"step-3-stored.png", "step-3-seen.png"}


def test_a_batch_of_a_run_is_drawn_with_its_settings(finished_run, tmp_path, capsys):
    assert drawn(show_batch, "--run", finished_run, "--run-dir", tmp_path, "--step", 2) == 0
    assert len(list(tmp_path.glob("step-2-*.png"))) == 2
    assert drawn(show_batch, "--run", finished_run, "--seed", 4) == 2
    assert "--seed 4 is not the run's 3: drop the flag, or --run" in capsys.readouterr().err


def drawn(module, *argv):
    """Runs the command line of an experiment that is no training run; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.run(module.Config, module.main, [str(argument) for argument in argv])
    return stop.value.code or 0


@pytest.mark.slow
def test_averaged_weights_are_tested_with_statistics_of_their_own(tmp_path, capsys):
    """SWA with recalibration, SAM, max-norm and a filter, from the command line and read back."""
    flags = ["--epochs", 4, "--swa-from-epoch", 2, "--recalibrate", 4, "--sam", 0.05]
    flags += ["--max-norm", 3, "--preprocess", "median:3", "--augment", "crop:2,cutmix:1"]
    flags += ["--model", "cnn_32_64", "--model-arguments", "norm=batch", "widths=(8,16)"]
    flags += ["--run-dir", tmp_path, "--devices", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnjax.data.load", lambda *a, **k: made_dataset(), raising=False)
        assert launch(classify, *flags, "--batch-size", 64) == 0
        trained = load.load_trained(tmp_path)
    saved_items = checkpoint.restore_items(tmp_path / "checkpoints", ("batch_stats", "ema"))
    running, measured = saved_items["batch_stats"], trained.variables["batch_stats"]
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), running, measured)
    assert max(jax.tree.leaves(difference)) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, trained.variables["params"], saved_items["ema"])
    kernels = [leaf for leaf in jax.tree.leaves(final_state(tmp_path)["params"]) if leaf.ndim > 1]
    norms = [np.linalg.norm(k.reshape(-1, k.shape[-1]), axis=0).max() for k in kernels]
    assert max(norms) < 3 * (1 + 1e-5)
    test = made_dataset().test
    logits = trained.model.apply(trained.variables, trained.normalize(test.image), train=False)
    accuracy = (np.asarray(logits).argmax(1) == test.label).mean()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_early_stopping_reports_the_best_weights(train_made, tmp_path):
    # A learning rate that is far too high: validation soon stops improving.
    train_made(
        run_dir=str(tmp_path), epochs=30, patience=2, learning_rate=0.03, schedule="constant"
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ended"] == "early stopping"
    validations = [r for r in read_metrics(tmp_path) if r["kind"] == "validation"]
    best = max(validations, key=lambda record: record["accuracy"])
    assert summary["step"] == best["step"]
    assert len(validations) < 30


@pytest.mark.slow
def test_divergence_keeps_the_last_good_checkpoint(train_made, tmp_path):
    # A step of 1e30 overflows within an epoch or two.
    with pytest.raises(UserError, match=r"diverged at step \d+ \(learning rate"):
        train_made(run_dir=str(tmp_path), learning_rate=1e30, optimizer="sgd", warmup_epochs=2.0)
    for leaf in jax.tree.leaves(final_state(tmp_path)["params"] if saved(tmp_path) else {}):
        assert np.isfinite(leaf).all()


def saved(directory):
    return checkpoint.steps(Path(directory) / "checkpoints")


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(train_made, tmp_path, capsys):
    straight, damaged = tmp_path / "straight", tmp_path / "damaged"
    train_made(run_dir=str(straight))
    train_made(run_dir=str(damaged), stop_after_epochs=3)
    newest = damaged / "checkpoints" / "00000024"
    file = max(
        (newest / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert train_made(resume=str(damaged)) == 0
    assert "00000024" in capsys.readouterr().err
    assert_same_bits(straight, damaged)


@pytest.mark.slow
def test_other_data_are_not_mixed_into_a_run(train_made, tmp_path):
    train_made(run_dir=str(tmp_path), stop_after_epochs=1)
    with pytest.raises(UserError, match="the data are not those of"):
        train_made(resume=str(tmp_path), data_seed=1)


@pytest.mark.slow
def test_a_float16_run_in_parts_logs_its_scale_and_is_read_back_in_float16(tmp_path, capsys):
    flags = ["--precision", "float16", "--accumulate", "4", "--run-dir", tmp_path]
    assert launch(mnist_lenet, *SMOKE, *flags) == 0
    train = [record for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert train[0]["loss_scale"] == 65536
    assert all(0 <= record["skipped"] <= 1 for record in train)
    assert load.load_trained(tmp_path).model.dtype == np.float16
    with pytest.raises(SystemExit):
        cli.run(evaluate.Config, evaluate.main, ["--run", str(tmp_path), "--split", "validation"])
    report = json.loads((tmp_path / "evaluation-validation" / "evaluation.json").read_text())
    assert 0 < report["accuracy"] < 1


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143_and_the_resumed_run_has_the_same_bits(tmp_path):
    def command(*arguments):
        return [sys.executable, "-m", "experiments.mnist_lenet", *map(str, arguments)]

    root = Path(__file__).parents[2]
    environment = os.environ | {"XLA_FLAGS": ""}
    options = {"cwd": root, "env": environment, "text": True}
    short = ["--epochs", "2", "--devices", "1"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    subprocess.run(command(*short, "--run-dir", straight), check=True, **options)

    process = subprocess.Popen(command(*short, "--run-dir", stopped), **options)
    metrics = stopped / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert len(saved(stopped)) == 1
    subprocess.run(command("--resume", stopped), check=True, **options)
    assert_same_bits(straight, stopped)


def test_every_setting_is_read():
    source = "".join(path.read_text() for path in Path(classifier.__file__).parent.glob("*.py"))
    for field in dataclasses.fields(classify.Config):
        assert f"config.{field.name}" in source, f"--{field.name} is read nowhere"
