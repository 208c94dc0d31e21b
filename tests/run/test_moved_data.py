"""A folder of images is told by its content: a run goes on, and is read, wherever it lies."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cnnjax import commands
from cnnjax.run import settings as runs
from experiments import classify, finetune

FLAGS = ["--model=lenet5", "--image-size=28", "--batch-size=8", "--devices=1", "--seed=3"]


def folder(path, seed=0):
    draw = np.random.default_rng(seed)
    for shade, name in enumerate(("dark", "middle", "light")):
        (path / name).mkdir(parents=True)
        for number in range(20):
            image = draw.integers(0, 80, (28, 28)) + 80 * shade
            Image.fromarray(image.astype(np.uint8)).save(path / name / f"{number}.png")
    return path


def launch(module, *argv):
    with pytest.raises(SystemExit) as stop:
        runs.launch(module.Config, module.main, [str(each) for each in argv])
    return stop.value.code or 0


def command(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        commands.main([str(each) for each in argv])
    return (stop.value.code or 0, *capsys.readouterr())


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run of one epoch of two whose folder was then moved, the new place, and another folder."""
    root = tmp_path_factory.mktemp("moved")
    old, new, run = folder(root / "old"), root / "far" / "new", root / "run"
    where = [f"--dataset=folder:{old}", f"--run-dir={run}"]
    assert launch(classify, *FLAGS, *where, "--epochs=2", "--stop-after-epochs=1") == 0
    new.parent.mkdir()
    shutil.move(old, new)
    return run, new, folder(root / "other", seed=1)


@pytest.mark.slow
def test_a_run_is_resumed_from_where_its_folder_is_now(moved, tmp_path, capsys):
    run, new, other = moved
    run = shutil.copytree(run, tmp_path / "run")
    assert launch(classify, "--resume", run) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--dataset folder:NEW" in err
    for dataset in (f"folder:{other}", "mnist"):
        assert launch(classify, "--resume", run, "--dataset", dataset) == 2
        assert "the data are not those of" in capsys.readouterr().err.splitlines()[-1]
    assert launch(classify, "--resume", run, "--dataset", f"folder:{new}") == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    # From then on that is where it is.
    assert json.loads((run / "config.json").read_text())["settings"]["dataset"] == f"folder:{new}"


@pytest.mark.slow
def test_other_data_are_refused_before_the_first_checkpoint_too(moved, tmp_path, capsys):
    run, new, other = moved
    run = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert launch(classify, "--resume", run, "--dataset", f"folder:{other}") == 2
    assert "the data are not those of" in capsys.readouterr().err.splitlines()[-1]
    flags = ["--dataset", f"folder:{new}", "--stop-after-epochs", 1]
    assert launch(classify, "--resume", run, *flags) == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["inspect-labels", "--out", "OUT", "--run"],
        ["show-batch", "--run-dir", "OUT", "--run"],
        ["probe", "--labels", "2", "--smoke", "--run"],
    ],
)
@pytest.mark.slow
def test_commands_take_the_folder_from_where_it_is_now(moved, tmp_path, capsys, flags):
    run, new, other = moved
    argv = [str(tmp_path / "out") if flag == "OUT" else flag for flag in flags]
    code, _, err = command(capsys, *argv, run)
    assert code == 2 and "--dataset folder:NEW" in err
    code, _, err = command(capsys, *argv, run, "--dataset", f"folder:{other}")
    assert code == 2 and "the data of folder:" in err and "are not those of" in err
    code, _, err = command(capsys, *argv, run, "--dataset", f"folder:{new}")
    assert code == 0, err


@pytest.mark.slow
def test_a_run_is_evaluated_and_fine_tuned_without_its_folder(moved, tmp_path, capsys):
    run, new, other = moved
    for dataset in (new, other):
        flags = ["--dataset", f"folder:{dataset}", "--out", tmp_path / dataset.name]
        assert command(capsys, "evaluate", "--run", run, *flags)[0] == 0
    picture = tmp_path / "digit.png"
    Image.fromarray(np.pad(np.zeros((20, 4), np.uint8), 8, constant_values=255)).save(picture)
    assert command(capsys, "predict", "--run", run, picture, "--out", tmp_path)[0] == 0
    tuned = [f"--base={run}", f"--dataset=folder:{other}", f"--run-dir={tmp_path / 'tuned'}"]
    assert launch(finetune, *FLAGS[1:], *tuned, "--epochs=1", "--method=head") == 0
    # Its base and its data have both moved.
    base, there = shutil.move(run, tmp_path / "base"), shutil.move(other, tmp_path / "there")
    try:
        resumed = [f"--resume={tmp_path / 'tuned'}", f"--base={base}", "--epochs=2"]
        assert launch(finetune, *resumed, f"--dataset=folder:{there}") == 0
    finally:
        shutil.move(base, run)
        shutil.move(there, other)


@pytest.mark.slow
def test_a_batch_of_a_run_is_of_the_images_that_it_trained_on(moved, tmp_path, capsys):
    _, new, _ = moved
    where = [f"--dataset=folder:{new}", f"--run-dir={tmp_path / 'run'}", "--train-examples=16"]
    assert launch(classify, *FLAGS, *where, "--epochs=1") == 0
    from cnnjax.run import again

    kept = again.data_of_run(tmp_path / "run", dataset=f"folder:{new}")
    assert len(kept.train.label) == 16
    out = tmp_path / "out"
    assert command(capsys, "show-batch", "--run", tmp_path / "run", "--run-dir", out)[0] == 0
