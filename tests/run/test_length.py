"""How long a run trains: what is refused, said and recorded when it is resumed."""

import json
import shutil

import numpy as np
import pytest

from cnnjax import checkpoint
from cnnjax.errors import UserError
from cnnjax.run import record, settings
from experiments import classify
from tests.tiny import use_made_data

FLAGS = {"model": "dense_dropout", "batch_size": 32, "devices": 1}


@pytest.fixture(autouse=True)
def made_data(monkeypatch):
    use_made_data(monkeypatch)


def launch(capsys, *argv):
    """Returns the exit code, and what was printed."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    with pytest.raises(SystemExit) as stop:
        settings.launch(classify.Config, classify.main, [*flags, *map(str, argv)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out + captured.err


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("length") / "run"


@pytest.fixture
def three_epochs(shared, tmp_path, capsys):
    """A finished run of three epochs: trained once, and copied for each test."""
    if not shared.exists():
        assert launch(capsys, "--epochs", 3, "--run-dir", shared)[0] == 0
    return shutil.copytree(shared, tmp_path / "run")


@pytest.mark.slow
def test_fewer_epochs_than_were_trained_are_refused_and_nothing_is_lost(three_epochs, capsys):
    before = {path: path.read_bytes() for path in three_epochs.glob("*.*")}
    code, said = launch(capsys, "--resume", three_epochs, "--epochs", 2)
    assert code == 2
    assert "has trained for 3 epochs already, more than --epochs 2: give at least 3" in said
    assert {path: path.read_bytes() for path in three_epochs.glob("*.*")} == before


def test_more_epochs_train_on_and_the_earlier_summary_is_history(three_epochs, capsys):
    first = summary_of(three_epochs)
    assert first["epochs"] == 3
    code, said = launch(capsys, "--resume", three_epochs, "--epochs", 5, "--stop-after-epochs", 4)
    assert code == 0 and "stopped as asked" in said
    # Stopped between: not finished, so the next start goes on.
    assert not (three_epochs / "summary.json").exists()
    assert launch(capsys, "--resume", three_epochs)[0] == 0
    assert summary_of(three_epochs)["epochs"] == 5
    history = record.read_config(three_epochs)["history"]
    assert [each.get("summary") for each in history] == [first, None]
    assert checkpoint.latest(three_epochs / "checkpoints") == 5 * 8


@pytest.mark.slow
def test_a_run_that_patience_ended_says_so_and_takes_a_larger_one(tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--learning-rate", 0.5, "--schedule", "constant", "--epochs", 30]
    assert launch(capsys, *flags, "--patience", 1, "--run-dir", run)[0] == 0
    ended = summary_of(run)
    assert ended["ended"] == "early stopping" and ended["epochs"] < 30
    assert ended["epochs"] == checkpoint.latest(run / "checkpoints") / 8

    code, said = launch(capsys, "--resume", run)
    assert code == 0 and "It was ended by --patience. A larger one" in said
    code, said = launch(capsys, "--resume", run, "--epochs", 40)
    assert code == 2
    assert f"ended by --patience 1 after {ended['epochs']:g} epochs" in said
    assert summary_of(run) == ended
    code, said = launch(capsys, "--resume", run, "--patience", 0, "--epochs", 31)
    assert code == 0
    assert summary_of(run)["epochs"] == 31


@pytest.mark.slow
def test_a_schedule_of_few_updates_is_noted_before_it_starts(tmp_path, capsys):
    _, said = launch(capsys, "--epochs", 1, "--run-dir", tmp_path / "short")
    assert "only 8 updates of 32 examples" in said
    _, said = launch(capsys, "--epochs", 7, "--run-dir", tmp_path / "longer")
    assert "only" not in said


def test_the_same_line_again_finds_what_was_left_open_filled_in(tmp_path):
    from experiments import finetune

    given = finetune.Config(base="somewhere", run_dir=str(tmp_path))
    filled = {"epochs": 150, "batch_size": 24, "learning_rate": 0.003, "warmup_epochs": 15.0}
    # A run from before the precision was a setting computed in float32.
    expected = filled | {"precision": "float32"}
    assert record.filled_in(given, filled | {"seed": 3}) == expected
    assert record.filled_in(given, filled | {"precision": "bfloat16"})["precision"] == "bfloat16"
    assert "precision" not in record.filled_in(finetune.Config(precision="float16"), filled)
    own = finetune.Config(base="somewhere", epochs=7)
    assert record.filled_in(own, filled)["batch_size"] == 24
    assert "epochs" not in record.filled_in(own, filled)


def test_short_epochs_are_validated_after_enough_steps(tmp_path, capsys):
    run = tmp_path / "run"
    launch(capsys, "--epochs", 7, "--validate-every-steps", 20, "--run-dir", run)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    # Epochs end at 8, 16, 24, ...: the first ones past 20 and 40, and the last.
    assert [each["step"] for each in lines if each["kind"] == "validation"] == [24, 40, 56]
    assert np.isfinite(summary_of(run)["best_validation_accuracy"])


def test_less_than_no_steps_between_validations_is_refused(tmp_path):
    config = classify.Config(**FLAGS, validate_every_steps=-1, run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="--validate-every-steps -1 is negative"):
        classify.main(config)


@pytest.mark.parametrize(
    ("file", "content", "flags", "message"),
    [
        ("summary.json", "{}", [], "is finished (test accuracy unknown"),
        ("summary.json", "[]", [], "holds list, not names and values"),
        ("config.json", "{}", [], "config.json is damaged"),
        ("config.json", '{"settings": [], "experiment": "x"}', [], "config.json is damaged"),
        ("summary.json", '{"ended": "early stopping"}', ["--epochs", 2], "for 3 epochs already"),
    ],
)
def test_damaged_records_are_one_line(three_epochs, capsys, file, content, flags, message):
    (three_epochs / file).write_text(content)
    code, said = launch(capsys, "--resume", three_epochs, *flags)
    assert message in said and code in (0, 2)


def test_the_same_line_finds_its_run_however_it_is_spelled(three_epochs, capsys):
    again = three_epochs.parent / "x" / ".." / "run"
    (three_epochs.parent / "x").mkdir()
    code, said = launch(capsys, "--epochs", 3, "--run-dir", again, "--keep-last", 1)
    assert code == 0 and "is finished" in said
    code, said = launch(capsys, "--epochs", 3, "--run-dir", three_epochs, "--seed", 1)
    assert code == 2 and "other settings (seed)" in said
