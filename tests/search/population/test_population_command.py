"""Whole populations by the command line: equal to solo runs, killed, copied, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cnnjax import checkpoint, commands
from cnnjax.trees import named_leaves

DIGITS = ["population", "experiments.digits_mlp"]
PBT = [*DIGITS, "--members", "4", "--pbt", "--epochs", "4", "--space"]
PBT += ["learning_rate=log(1e-4, 1e-1)", "weight_decay=log(1e-3, 1)"]


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        commands.main(argv)
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


def arrays_of(run):
    items = ("params", "ema", "opt_state")
    return named_leaves(checkpoint.restore_items(run / "checkpoints", items))


@pytest.mark.slow
def test_members_are_the_runs_that_they_would_be_alone(tmp_path, capsys):
    from experiments import digits_mlp

    out = tmp_path / "population"
    space = ["--space", "weight_decay=choice(0, 0.05)", "learning_rate=choice(1e-3, 1e-2)"]
    flags = [*DIGITS, "--seeds", "2", *space, "--epochs", "2", "--out", str(out)]
    code, printed, _ = call(capsys, *flags)
    assert code == 0 and "members in turn" in printed
    rows = json.loads((out / "members.json").read_text())["members"]
    assert [row["seed"] for row in rows] == [0, 1] * 4
    settings = [(row["settings"]["weight_decay"], row["settings"]["learning_rate"]) for row in rows]
    assert settings[::2] == [(0, 1e-3), (0, 1e-2), (0.05, 1e-3), (0.05, 1e-2)]
    number = 1
    decay, rate = settings[number]
    solo = tmp_path / f"solo{number}"
    config = digits_mlp.Config(
        seed=number % 2,
        weight_decay=decay,
        learning_rate=rate,
        epochs=2,
        devices=1,
        run_dir=str(solo),
    )
    assert digits_mlp.main(config) == 0
    run = out / "members" / f"{number:03}"
    found, own = arrays_of(run), arrays_of(solo)
    assert found.keys() == own.keys()
    for name, array in own.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    first, second = (json.loads((d / "summary.json").read_text()) for d in (run, solo))
    assert first["test_accuracy"] == pytest.approx(second["test_accuracy"], abs=0.006)
    assert first["parameters"] == second["parameters"] and first["step"] == second["step"]
    one, other = (json.loads((d / "config.json").read_text())["settings"] for d in (run, solo))
    differ = {name for name in one if one[name] != other[name]}
    assert differ == {"run_dir", "devices"}
    capsys.readouterr()
    # Ordinary runs: the experiment trains on with more epochs.
    config = [sys.executable, "-m", "experiments.digits_mlp", "--resume", str(run)]
    done = subprocess.run([*config, "--epochs", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "test         accuracy" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_killed_population_ends_as_one_that_was_not(tmp_path):
    def command(*flags):
        return [sys.executable, "-m", "cnnjax", *flags]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    running = subprocess.Popen(command(*PBT, "--out", str(killed)), stderr=subprocess.DEVNULL)
    for _ in range(900):
        time.sleep(0.1)
        if list(killed.glob("checkpoints/0*/manifest.json")):
            break
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (killed / "members.json").exists()
    for flags in (["population", "--resume", str(killed)], [*PBT, "--out", str(whole)]):
        done = subprocess.run(command(*flags), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((d / "members.json").read_text()) for d in (killed, whole))
    assert first["copies"] == second["copies"] and len(first["copies"]) == 3
    for one, other in zip(first["members"], second["members"], strict=True):
        run, same = (one.pop("run"), other.pop("run"))
        assert one == other
        logs = [(tmp_path / run / "metrics.jsonl"), (tmp_path / same / "metrics.jsonl")]
        assert logs[0].read_text() == logs[1].read_text()
        config = json.loads((tmp_path / run / "config.json").read_text())
        assert config["settings"]["learning_rate"] == one["settings"]["learning_rate"]
    assert (killed / "figures" / "copies.png").stat().st_size > 10_000
    again = subprocess.run(
        command("population", "--resume", str(killed)), capture_output=True, text=True, check=False
    )
    assert again.returncode == 2 and "is finished" in again.stderr


@pytest.mark.slow
def test_members_end_early_and_the_others_are_repacked(tmp_path, capsys):
    out = tmp_path / "population"
    flags = ["--seeds", "2", "--space", "learning_rate=choice(1e-5, 3e-3, 1e30)"]
    code, printed, errors = call(
        capsys,
        *(*DIGITS, *flags, "--epochs", "9", "--warmup-epochs", "0", "--schedule", "constant"),
        *("--prune", "halving(min_epochs=3, factor=2)", "--out", str(out), "--way", "vmap"),
    )
    assert code == 0, errors
    rows = json.loads((out / "members.json").read_text())["members"]
    ends = {(row["ended"], row["epochs"]) for row in rows[:2]}
    assert ends == {("pruned", 3)}
    assert {row["ended"] for row in rows[4:]} == {"diverged"}
    assert sorted((row["ended"], row["epochs"]) for row in rows[2:4]) == [
        ("finished", 9),
        ("pruned", 6),
    ]
    finished = next(row for row in rows if row["ended"] == "finished")
    assert finished["test_accuracy"] > 0.85 and "test_accuracy" not in rows[0]
    assert "| learning_rate=0.003 | 1 |" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name an experiment"),
        (["experiments.nope"], "no experiment 'experiments.nope'"),
        (["experiments.digits_mlp", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["experiments.digits_mlp", "--members", "0"], "--members 0: a population has at least 1"),
        (["experiments.digits_mlp", "--members", "3"], "nothing is drawn of a range"),
        (["experiments.digits_mlp", "--seed", "3"], "--seed is set by cnnjax population"),
        (["experiments.digits_mlp", "--nope", "3"], "nope"),
        (["experiments.digits_mlp", "--seeds", "2", "--devices", "3"], "--devices 3 for 2 members"),
        (["experiments.digits_mlp", "--way", "lop"], "unknown way to compute a population 'lop'"),
        (["experiments.digits_mlp", "--prune", "halvin"], "unknown pruner 'halvin'"),
        (
            ["experiments.digits_mlp", "--space", "learning_rat=choice(1, 2)"],
            "unknown setting 'learning_rat': did you mean learning_rate",
        ),
        (
            ["experiments.digits_mlp", "--space", "batch_size=choice(32, 64)"],
            "--space batch_size: it is a whole number",
        ),
        (
            ["experiments.digits_mlp", "--space", "learning_rate=log(1e-4, 1)"],
            "say by --members how many",
        ),
        (["experiments.digits_mlp", "--pbt", "--members", "4"], "--pbt explores settings"),
        (["experiments.digits_mlp", "--augment", "rotate:{angle}"], "--augment has {angle}"),
        (["experiments.digits_mlp", "--pbt", "pbt(fraction=2)"], "at most 0.5"),
        (["experiments.dcgan_mnist", "--seeds", "2"], "trains by a main of its own"),
        (["--resume", "nowhere"], "nowhere is not the directory of a population"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(flags, message, capsys, tmp_path):
    out = [] if "--resume" in flags else ["--out", str(tmp_path / "out")]
    code, _, errors = call(capsys, "population", *flags, *out)
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_one_line(capsys, tmp_path):
    saved = {name: 2 for name in ("seeds", "first_seed", "members", "draw_seed")}
    saved |= {"experiment": "experiments.digits_mlp", "prune": "none", "pbt": "", "way": "auto"}
    saved |= {"space": [], "where": [], "argv": []}
    for name, value in (("members", "two"), ("argv", "--epochs 3"), ("space", None)):
        (tmp_path / "population.json").write_text(json.dumps(saved | {name: value}))
        code, _, errors = call(capsys, "population", "--resume", str(tmp_path))
        assert code == 2 and f"is damaged: {name} is {value!r}" in errors
        assert errors.count("\n") == 1


def test_a_directory_of_others_is_not_trained_into(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    flags = ("experiments.digits_mlp", "--seeds", "2", "--out", str(tmp_path))
    code, _, errors = call(capsys, "population", *flags)
    assert code == 2 and "holds other files: name a new directory" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space", "validation=choice(0.1, 0.2)"], "does not depend on it"),
        (["--space", "momentum=choice(0.8, 0.9)"], "does not depend on it"),
        (["--space", "warmup_epochs=choice(0, 1)"], "depends on its value"),
        (["--space", "clip_norm=choice(0, 1)"], "0 leaves it out"),
        (["--space", "learning_rate=choice(-1, 1)"], "--learning-rate -1: give 0 or more"),
        (["--space", "fold=choice('1/4', '2/4', '3/4')", "--validation", "0"], "different shapes"),
        (["--seeds", "2", "--balance", "weights"], "--balance weights"),
        (["--seeds", "2", "--recalibrate", "4"], "--recalibrate: members of a population"),
        (["--seeds", "2", "--batch-size", "100000"], "batch_size=100000 is larger"),
    ],
)
def test_settings_that_cannot_vary_are_one_line(flags, message, capsys, tmp_path):
    code, _, errors = call(capsys, *DIGITS, *flags, "--out", str(tmp_path / "out"))
    assert code == 2 and message in errors and errors.count("\n") == 1, errors


@pytest.mark.slow
def test_the_python_of_its_page_runs_and_learns():
    page = Path(__file__).parents[3] / "docs" / "population.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(block.replace(":200]", ":50]").replace("int32(200)", "int32(50)"), names)
    found = np.asarray(names["loss"])[names["layout"].slots]
    assert found.shape == (4, 50) and (found[:, -10:].mean(1) < found[:, :10].mean(1)).all()
