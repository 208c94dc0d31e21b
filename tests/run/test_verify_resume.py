"""Runs are compared bit by bit, and a real experiment survives real kills."""

import json
import shutil

import jax.numpy as jnp
import pytest

from cnnjax import checkpoint
from cnnjax.commands import verify_resume as command
from cnnjax.errors import UserError
from cnnjax.run import verify_resume
from cnnjax.run.verify_resume import compare_runs, compare_states, format_comparisons


def state(step, bias=0.0):
    return {
        "step": jnp.int32(step),
        "params": {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.array([0.0, bias])}},
        "ema": None,
    }


META = {"best": {"value": 0.5}, "seconds": 3.0, "settings": {"seed": 0, "run_dir": "a"}}
LINES = [{"step": 1, "kind": "train", "loss": 0.5}, {"step": 2, "kind": "test", "loss": 0.25}]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "first"
    for step in (1, 2):
        checkpoint.save(run / "checkpoints", state(step), META)
    write_log(run, LINES)
    (run / "summary.json").write_text(json.dumps({"test_accuracy": 0.5, "seconds": 3.0}))
    return run


def write_log(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def both(a_run, tmp_path):
    return a_run, shutil.copytree(a_run, tmp_path / "second")


def different(first, second):
    return {each.what: each.different for each in compare_runs(first, second) if each.different}


def test_times_and_places_are_not_compared(both):
    first, second = both
    settings = {"seed": 0, "run_dir": "b", "resume": "b"}
    checkpoint.save(second / "checkpoints", state(2), META | {"seconds": 4, "settings": settings})
    (second / "summary.json").write_text(json.dumps({"test_accuracy": 0.5, "seconds": 9.0}))
    found = compare_runs(first, second)
    assert {each.what: each.compared for each in found} == {
        "checkpoints kept": 2,
        "arrays of params": 2,
        "arrays of progress": 1,
        "entries of the meta": 2,
        "lines of metrics": 2,
        "entries of the summary": 1,
    }
    assert not any(each.different for each in found)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            # Equal as numbers, and not the same bits.
            lambda run: checkpoint.save(run / "checkpoints", state(2, bias=-0.0), META),
            {"arrays of params": ("params/head/bias",)},
        ),
        (
            lambda run: checkpoint.save(
                run / "checkpoints", state(2), META | {"best": {"value": 0.6}}
            ),
            {"entries of the meta": ("best",)},
        ),
        (
            lambda run: checkpoint.save(run / "checkpoints", state(3), META),
            {"checkpoints kept": ("3",), "arrays of progress": ("progress/step",)},
        ),
        (
            lambda run: write_log(run, [*LINES, LINES[1]]),
            {"lines of metrics": ("line 3: test at step 2",)},
        ),
        (
            lambda run: write_log(run, LINES[1:]),
            {
                "lines of metrics": (
                    "line 1: train at step 1",
                    "line 2: test at step 2",
                    "line 1: test at step 2",
                )
            },
        ),
        (
            lambda run: (run / "summary.json").unlink(),
            {"entries of the summary": ("test_accuracy",)},
        ),
    ],
)
def test_every_difference_is_found_and_named(both, change, expected):
    first, second = both
    change(second)
    assert different(first, second) == expected
    assert next(iter(expected.values()))[0] in format_comparisons(compare_runs(first, second))


def test_any_two_steps_compare(a_run):
    found = compare_states(a_run, 1, a_run, 2)
    assert {each.what: each.different for each in found if each.different} == {
        "arrays of progress": ("progress/step",)
    }


def test_what_is_no_run_is_said(a_run, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        compare_runs(a_run, tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiments.mnist_lenet", "--resume", "x"], "--resume is set by cnnjax verify-resume"),
        (["experiments.mnist_lenet", "--run-dir=x"], "--run-dir=x is set by cnnjax verify-resume"),
        (["experiments.mnist_lenet", "--kills", "0"], "--kills 0: use 1 or more"),
        (["experiments.mnist_lenet", "--directory", "/"], "--directory / is not empty"),
        (["experiments.nothing"], "experiments.nothing .* ended with exit status 1: .*No module"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        command.main(argv)


def test_a_killed_run_is_described(a_run, tmp_path):
    assert verify_resume.where(tmp_path) == "before it had written anything"
    (tmp_path / "config.json").touch()
    assert verify_resume.where(tmp_path) == "before its first checkpoint"
    shutil.copytree(a_run / "checkpoints", tmp_path / "checkpoints")
    assert verify_resume.where(tmp_path) == "checkpoint of step 2"
    (tmp_path / "checkpoints" / ".tmp-00000003").mkdir()
    assert verify_resume.where(tmp_path) == "checkpoint of step 2, in the middle of a save"


@pytest.mark.slow
def test_an_experiment_killed_twice_ends_with_the_same_bits(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    argv = ["experiments.mnist_lenet", "--smoke", "--devices", "1", "--save-every-steps", "2"]
    argv += ["--kills", "2", "--kill-seed", "1", "--directory", str(tmp_path / "runs")]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("killed ") == 3 and "SAME: " in printed
    # The control: one array changed, and the verdict is the other one.
    killed = tmp_path / "runs" / "killed"
    found = compare_runs(tmp_path / "runs" / "straight", killed)
    assert sum(each.compared for each in found) > 60
