"""Whole searches by the command line: killed, resumed, finished, refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("optuna")

SPACE = ["--space", "learning_rate=log(1e-3, 1e-1)", "batch_size=choice(32, 64)"]


def cnnjax(*argv):
    return subprocess.run(
        [sys.executable, "-m", "cnnjax", *argv], capture_output=True, text=True, check=False
    )


def states(directory):
    import optuna

    study = optuna.load_study(study_name=directory.name, storage=f"sqlite:///{directory}/study.db")
    return [(each.number, each.state.name, each.params) for each in study.trials]


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_trials(tmp_path):
    out = tmp_path / "search"
    command = [sys.executable, "-m", "cnnjax", "search", "experiments.digits_mlp", *SPACE]
    command += ["--trials", "4", "--epochs", "3", "--workers", "2", "--out", str(out)]
    command += ["--prune", "median(startup=2)"]
    search = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # Until a trial has been validated.
    for _ in range(600):
        time.sleep(0.2)
        if list(out.glob("trials/*/checkpoints/0*")):
            break
    os.kill(search.pid, signal.SIGKILL)
    search.wait()
    begun = {number: params for number, _, params in states(out)}
    assert begun

    resumed = cnnjax("search", "--resume", str(out), "--workers", "2")
    assert resumed.returncode == 0, resumed.stderr
    found = states(out)
    assert [number for number, _, _ in found] == list(range(4))
    assert {state for _, state, _ in found} <= {"COMPLETE", "PRUNED"}
    assert {number: params for number, _, params in found}.items() >= begun.items()
    assert (out / "report" / "index.html").stat().st_size > 10_000

    # No trial has looked at the test set.
    for number in range(4):
        lines = (out / "trials" / f"{number:04}" / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(line)["kind"] for line in lines} == {"train", "validation"}

    best = json.loads((out / "best.json").read_text())[0]
    finished = cnnjax("finish-search", "--search", str(out), "--seeds", "0", "1", "--epochs", "2")
    assert finished.returncode == 0, finished.stderr
    assert "Found minus default, paired over 2 seeds" in finished.stdout
    final = json.loads((out / "final.json").read_text())
    rate = final["flags"]["found"][final["flags"]["found"].index("--learning-rate") + 1]
    assert float(rate) == best["settings"]["learning_rate"]
    assert all(0 < score <= 1 for scores in final["scores"].values() for score in scores)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiments.nosuch"], "no experiment 'experiments.nosuch'"),
        (["cnnjax.spec"], "is no experiment"),
        ([], "name an experiment"),
        (["--resume", "nosuch"], "nosuch is not the directory of a search"),
        (
            ["experiments.digits_mlp", "--space", "learnin_rate=log(1,2)"],
            "did you mean learning_rate",
        ),
        (["experiments.digits_mlp", *SPACE, "--seed", "-1"], "--seed -1: give at least 0"),
        (["experiments.digits_mlp", *SPACE, "--sampler", "tpee"], "did you mean tpe"),
        (["experiments.digits_mlp", *SPACE, "--prune", "asha(fctor=2)"], "fctor"),
        (["experiments.digits_mlp", *SPACE, "--value", "frist"], "unknown --value"),
        (["experiments.digits_mlp", *SPACE, "--run-dir", "x"], "--run-dir is set by cnnjax search"),
        (["experiments.digits_mlp", *SPACE, "--epoch", "3"], "--epoch"),
    ],
)
def test_what_is_refused_before_anything_runs(argv, message, capsys, tmp_path, monkeypatch):
    from cnnjax import commands

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        commands.main(["search", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("study.db"))


@pytest.mark.slow
def test_an_objective_that_is_never_reported_is_refused(tmp_path):
    found = cnnjax(
        *("search", "experiments.digits_mlp", *SPACE, "--objective", "acuracy"),
        *("--out", str(tmp_path / "s")),
    )
    assert found.returncode == 2
    assert "unknown --objective 'acuracy': did you mean accuracy" in found.stderr
    assert not (tmp_path / "s" / "search.json").exists()


@pytest.mark.slow
def test_cross_validation_compares_two_settings_on_the_same_folds(tmp_path):
    argv = ["cross-validate", "experiments.digits_mlp", "--folds", "2", "--epochs", "4"]
    found = cnnjax(*argv, "--against", "--learning-rate 1e-6", "--out", str(tmp_path / "folds"))
    assert found.returncode == 0, found.stderr
    assert "Second minus first, on the same folds: -" in found.stdout
    scores = json.loads((tmp_path / "folds" / "folds.json").read_text())["scores"]
    assert min(scores[""]) > 0.7 > 0.3 > max(scores["against"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiments.digits_mlp", "--folds", "1"], "--folds 1: give at least 2"),
        (["experiments.digits_mlp", "--fold", "1/5"], "--fold is set by cnnjax cross-validate"),
        (["experiments.dcgan_mnist"], "has no --fold"),
        (["experiments.digits_mlp", "--against", "--epoch 3"], "--epoch"),
    ],
)
def test_what_cannot_be_cross_validated(argv, message, capsys, tmp_path, monkeypatch):
    from cnnjax import commands

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        commands.main(["cross-validate", *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
