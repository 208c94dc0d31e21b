"""A run that ends badly, in any place, goes on to the bits of one that did not."""

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnnjax import checkpoint
from cnnjax.errors import UserError
from cnnjax.run import files, settings
from cnnjax.run.logs import MetricsLog
from cnnjax.run.verify_resume import compare_runs
from experiments import classify
from tests import disks
from tests.run.test_logs import shown_by_tensorboard
from tests.tiny import use_made_data


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


@pytest.fixture(autouse=True)
def made_data(monkeypatch):
    use_made_data(monkeypatch)


SETTINGS = {"model": "lenet5", "epochs": 3, "batch_size": 32, "devices": 1, "save_every_steps": 3}


def train(run, **settings):
    """Starts or goes on with a run of 8 steps an epoch."""
    where = {"resume": str(run)} if (run / "config.json").exists() else {"run_dir": str(run)}
    return classify.main(classify.Config(**(SETTINGS | settings | where)))


def launch(*argv):
    """The same from the command line; returns the exit code."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    with pytest.raises(SystemExit) as stop:
        settings.launch(classify.Config, classify.main, [*flags, *map(str, argv)])
    return stop.value.code


def kill_after(monkeypatch, owner, name, calls):
    """Lets a method do its work so many times, and kills then."""
    original = getattr(owner, name)
    made = []

    def method(self, *arguments, **options):
        result = original(self, *arguments, **options)
        made.append(None)
        if len(made) == calls:
            if owner is checkpoint.Saver:
                self.wait()
            raise Killed
        return result

    monkeypatch.setattr(owner, name, method)


def assert_same(first, second):
    assert [each for each in compare_runs(first, second) if each.different] == []
    for kind in ("train", "validation", "test"):
        shown = [shown_by_tensorboard(run / "tensorboard" / kind) for run in (first, second)]
        assert shown[0] == shown[1] != []


# Ways to feed and compile, with everything that draws at random or averages.
EVERYTHING = {"ema_decay": 0.9, "augment": "rotate:10", "patience": 5}
WAYS = {
    "scan": {**EVERYTHING, "parallel": "scan"},
    "streamed": {
        **EVERYTHING,
        "parallel": "jit",
        "pipeline": "stream",
        "model": "cnn_32_64_dense128_dropout",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_in_the_middle_of_epochs_it_ends_with_the_same_bits(way, tmp_path, monkeypatch):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(straight, **WAYS[way])
    # Saves are at 3, 6, 8, 11, 14, 16, ...: kill in the first epoch, and twice later.
    for saves in (2, 3, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, checkpoint.Saver, "save", saves)
            train(killed, **WAYS[way])
    assert checkpoint.latest(killed / "checkpoints") == 19
    assert train(killed, **WAYS[way]) == 0
    assert_same(straight, killed)


@pytest.mark.slow
def test_killed_after_any_record_no_log_has_a_gap_or_a_double(tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    settings = {"model": "dense_dropout", "epochs": 1, "save_every_steps": 4}
    train(straight, **settings)
    # Of training: one each step; then one of validation and one of the test.
    assert (straight / "metrics.jsonl").read_text().count("\n") == 10
    for records in (1, 6, 8, 9, 10):
        killed = tmp_path / f"killed-{records}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, MetricsLog, "write", records)
            train(killed, **settings)
        train(killed, **settings)
        assert_same(straight, killed)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before the test", "before the summary"])
def test_killed_after_stopping_early_it_stops_there_again(place, tmp_path, monkeypatch):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    # A learning rate that is far too high: validation soon stops improving.
    settings = {"epochs": 30, "patience": 2, "learning_rate": 0.03, "schedule": "constant"}
    train(straight, **settings)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["ended"] == "early stopping"

    def kill(*arguments, **options):
        raise Killed

    name = "trainer.finish" if place == "before the test" else "report.write_summary"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"cnnjax.run.{name}", kill)
        train(killed, **settings)
    train(killed, **settings)
    assert_same(straight, killed)


@pytest.mark.slow
def test_by_loss_the_step_of_the_lowest_loss_is_kept_and_tested(tmp_path):
    settings = {"epochs": 6, "learning_rate": 0.02, "schedule": "constant", "patience": 6}
    train(tmp_path, monitor="loss", keep_last=1, **settings)
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    losses = {each["step"]: each["loss"] for each in records if each["kind"] == "validation"}
    best = min(losses, key=lambda step: losses[step])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_validation_loss"] == losses[best]
    assert summary["step"] == best
    assert checkpoint.steps(tmp_path / "checkpoints") == sorted({best, 48})


@pytest.mark.slow
def test_best_steps_are_kept_as_asked(tmp_path):
    train(tmp_path, keep_last=1, keep_best=2, epochs=5)
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    scores = {each["step"]: each["accuracy"] for each in records if each["kind"] == "validation"}
    best = sorted(scores, key=lambda step: (-scores[step], step))[:2]
    assert checkpoint.steps(tmp_path / "checkpoints") == sorted({*best, 40})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": -1}, "--keep-last -1 is negative"),
        ({"save_every_steps": -1}, "--save-every-steps -1 is negative"),
        ({"patience": 1, "keep_best": 0}, "--patience keeps the best weights: use --keep-best 1"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# One line for every start


@pytest.mark.slow
def test_one_command_line_starts_goes_on_and_is_done(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    line = ["--run-dir", run, "--resume", run, "--augment", "flip"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "__init__", lambda *a, **k: (_ for _ in ()).throw(Killed))
        launch(*line)
    assert launch(*line) == 0
    assert "at step 0: it had saved no checkpoint yet" in capsys.readouterr().out
    assert launch(*line) == 0
    assert "is finished" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["augment"] == "flip"
    assert [each["experiment"] for each in config["history"]] == ["experiments.classify"]
    assert {"versions", "devices", "flags", "jax", "code", "data_checksum"} <= set(config)
    assert "history" not in config["history"][0]


def test_two_directories_are_refused(tmp_path, capsys):
    assert launch("--run-dir", tmp_path / "a", "--resume", tmp_path / "b") == 2
    assert "are two directories" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_its_config_is_not_taken_for_a_new_one(tmp_path, capsys):
    train(tmp_path, epochs=1)
    (tmp_path / "config.json").unlink()
    (tmp_path / "summary.json").unlink()
    assert launch("--run-dir", tmp_path, "--resume", tmp_path) == 2
    assert "holds checkpoints but no config.json" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "checkpoints") == [6, 8]


@pytest.mark.slow
def test_an_edited_config_does_not_change_a_run(tmp_path):
    train(tmp_path, stop_after_epochs=1)
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"]["learning_rate"] = 0.5
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=r"learning_rate 0\.5, but its checkpoints were saved with"):
        train(tmp_path, learning_rate=0.5)


@pytest.mark.slow
def test_when_every_checkpoint_is_damaged_nothing_is_deleted(tmp_path):
    train(tmp_path, stop_after_epochs=1)
    for step in (tmp_path / "checkpoints").glob("0*"):
        (step / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints is undamaged"):
        train(tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("0*"))) == 2


# Two writers


def test_a_run_has_one_writer_at_a_time(tmp_path):
    with (
        files.only_writer(tmp_path),
        pytest.raises(UserError, match=r"is being trained by process \d+ on .*: wait for it"),
        files.only_writer(tmp_path),
    ):
        pass
    with files.only_writer(tmp_path):
        pass


def test_a_killed_writer_lets_go(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from cnnjax.run import files\n"
        "with files.only_writer(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    assert done.returncode == -9
    with files.only_writer(tmp_path):
        pass


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    with disks.mounted(tmp_path / "disk", "size=16m") as disk:
        yield disk


def fill(disk):
    with pytest.raises(OSError) as full, (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC


@pytest.mark.slow
@pytest.mark.parametrize("owner", [MetricsLog, checkpoint.Saver], ids=["logging", "saving"])
def test_a_disk_that_fills_up_stops_the_run_cleanly(
    owner, small_disk, tmp_path, monkeypatch, capsys
):
    straight, run = tmp_path / "straight", small_disk / "run"
    train(straight)
    name = "write" if owner is MetricsLog else "save"
    original = getattr(owner, name)
    made = []

    def fill_then(self, *arguments):
        made.append(None)
        if len(made) == 6:
            while not checkpoint.steps(run / "checkpoints"):
                time.sleep(0.01)
            fill(small_disk)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fill_then)
        assert launch("--run-dir", run) == 2
    printed = capsys.readouterr().err
    error = printed.strip().splitlines()[-1]
    assert error.startswith("error: cannot ")
    assert "No space left on device" in error and "free some space" in error
    assert "Traceback" not in printed
    steps = checkpoint.steps(run / "checkpoints")
    assert steps
    for step in steps:
        checkpoint.restore_items(run / "checkpoints", step=step)

    assert launch("--resume", run) == 2  # Still full.
    assert capsys.readouterr().err.startswith("error: ")
    (small_disk / "filler").unlink()
    assert launch("--resume", run) == 0
    assert_same(straight, run)


def test_a_full_disk_leaves_no_half_of_a_json_file(small_disk):
    path = small_disk / "config.json"
    files.write_json(path, {"a": 1})
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"a": "b" * 100_000})
    assert json.loads(path.read_text()) == {"a": 1}
    assert sorted(each.name for each in small_disk.iterdir()) == ["config.json", "filler"]


@pytest.fixture
def read_only_disk(tmp_path):
    """A file system that nobody can write to, root included."""
    with disks.mounted(tmp_path / "read-only", "ro,size=1m") as disk:
        yield disk


@pytest.mark.slow
def test_a_read_only_directory_is_one_line(read_only_disk, tmp_path, capsys):
    (tmp_path / "file").touch()
    for run in (read_only_disk / "run", tmp_path / "file" / "run"):
        assert launch("--run-dir", run) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: cannot write the run directory {run}")
        assert "\n" not in error


def test_only_trouble_with_the_disk_is_explained_as_such(tmp_path):
    for code in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
        with (
            pytest.raises(UserError, match=r"cannot write .* \(.*\): free .*--resume"),
            files.writing_errors(tmp_path),
        ):
            raise OSError(code, "text")
    with pytest.raises(ConnectionError), files.writing_errors(tmp_path):
        raise ConnectionError("another trouble")
