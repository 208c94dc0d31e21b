"""`experiments.distill` from its command line: what it leaves, how it resumes, how it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from cnnjax import checkpoint
from cnnjax.commands import evaluate
from cnnjax.run import classifier, cli, load
from cnnjax.trees import named_leaves
from experiments import classify, finetune
from experiments import distill as experiment
from tests.experiments.test_experiments import SMOKE, launch, snapshot
from tests.tiny import use_made_data

LOSSES = "logits, features, attention, rkd_distance, rkd_angle"
STUDENT = ["--model", "cnn_32_64", "--model-arguments", "widths=(3,4)"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
        assert launch(classify, *SMOKE, *STUDENT, "norm=batch", "--run-dir", directory) == 0
    return directory


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])


@pytest.mark.slow
def test_the_run_is_that_of_the_student_alone(teacher, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*SMOKE, *STUDENT, "--losses", LOSSES, "--ema-decay", "0.9"]
    assert launch(experiment, *flags, "--teacher", teacher, "--run-dir", run) == 0
    printed = capsys.readouterr().out
    assert "attention    weight 1000  stage1 [13x13x3] : stage1 [13x13x3]" in printed
    summary = json.loads((run / "summary.json").read_text())
    trained = load.load_trained(run)
    assert set(trained.variables["params"]) == {"conv1", "conv2", "head"}
    assert summary["parameters"] == sum(map(np.size, jax.tree.leaves(trained.variables["params"])))
    # Of the teacher nothing is saved.
    saved = checkpoint.restore_items(run / "checkpoints", ["params", "ema"])
    assert not [path for path in named_leaves(saved["ema"]) if "teacher" in path]
    assert trained.card["mean"] == load.load_trained(teacher).card["mean"]

    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.Config, evaluate.main, ["--run", str(run), "--out", str(tmp_path / "o")])
    assert not stop.value.code
    assert "on 10,000 test images of mnist" in capsys.readouterr().out
    base = ["--base", run, "--method", "head", "--labels-per-class", "5"]
    assert launch(finetune, *SMOKE, *base, "--run-dir", tmp_path / "tuned") == 0
    # It teaches in its turn.
    flags = [*SMOKE, "--teacher", run, "--model", "mlp", "--run-dir", tmp_path / "next"]
    assert launch(experiment, *flags, "--losses", "logits,features") == 0
    capsys.readouterr()
    before = snapshot(run)
    flags = [*SMOKE, *STUDENT, "--losses", LOSSES, "--ema-decay", "0.9"]
    assert launch(experiment, *flags, "--teacher", teacher, "--run-dir", run) == 0
    assert snapshot(run) == before


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(teacher, tmp_path, monkeypatch, capsys):
    use_made_data(monkeypatch)
    monkeypatch.setattr("cnnjax.data.open_dataset", lambda *a, **k: classifier.cnnjax.data.load())
    flags = [*STUDENT, "--devices", "1", "--epochs", "2", "--batch-size", "32", "--losses", LOSSES]
    own = tmp_path / "own"
    assert launch(classify, *STUDENT, "--devices", "1", "--epochs", "1", "--run-dir", own) == 0
    flags += ["--teacher", own]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert launch(experiment, *flags, "--run-dir", straight) == 0
    assert launch(experiment, *flags, "--run-dir", stopped, "--stop-after-epochs", "1") == 0
    shutil.copytree(own, tmp_path / "moved")
    # Another teacher is refused, the same one is taken from wherever it is.
    other = tmp_path / "other"
    launch(classify, *STUDENT, "--devices", "1", "--epochs", "1", "--seed", "5", "--run-dir", other)
    capsys.readouterr()
    assert launch(experiment, "--resume", stopped, "--teacher", other) == 2
    assert "the teacher's weights are not those of" in capsys.readouterr().err
    assert launch(experiment, "--resume", stopped, "--teacher", tmp_path / "moved") == 0
    names = ["params", "opt_state"]
    ends = [checkpoint.restore_items(run / "checkpoints", names) for run in (straight, stopped)]
    assert ends[0]["step"] == ends[1]["step"] == 16
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])


@pytest.mark.slow
def test_generations_learn_of_the_one_before(tmp_path):
    run = tmp_path / "run"
    flags = [*SMOKE, *STUDENT, "--generations", "2", "--run-dir", run]
    assert launch(experiment, *flags) == 0
    cards = [load.load_trained(each).card for each in (run / "generation1", run)]
    taught = [card["distill"]["teacher"] for card in cards]
    assert taught == [str(run / "teacher"), str(run / "generation1")]
    settings = [
        json.loads((each / "config.json").read_text())["settings"]
        for each in (run / "teacher", run / "generation1", run)
    ]
    # Other initial parameters, the same data.
    assert [each["seed"] for each in settings] == [2, 1, 0]
    assert [each["data_seed"] for each in settings[:2]] == [0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no teacher given: name a run with --teacher"),
        (["--generations", "-1"], "--generations -1: give 0 or more."),
        (["--label-weight", "-2"], "--label-weight -2: give 0 or more, or -1"),
        (["--losses", "atention"], "unknown distillation loss 'atention': did you mean attention"),
        (["--losses", ""], "no distillation loss given"),
        (["--teacher", "nowhere"], "nowhere is not a run directory"),
    ],
)
def test_bad_flags_are_one_line_before_anything(flags, message, tmp_path, capsys):
    assert launch(experiment, "--devices", "1", "--run-dir", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "1,2"], "the classes are 2 (1, 2), and the teacher's are 10 (0, 1, 2"),
        (["--image-size", "32"], "--image-size 32: the teacher's is 28"),
        (["--preprocess", "median:3"], "--preprocess median:3: the teacher's is none"),
        (["--losses", "features(layers=conv9)"], "unknown layer of the student SimpleCNN 'conv9'"),
        (["--losses", "rkd_angle", "--accumulate", "2"], "needs all examples of a batch at once"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line_before_training(
    teacher, flags, message, tmp_path, capsys
):
    run = ["--teacher", teacher, "--run-dir", tmp_path / "run"]
    assert launch(experiment, *SMOKE, *STUDENT, *run, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
