"""A search that is killed at 20 random moments loses no trial and counts none twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

optuna = pytest.importorskip("optuna")

from cnnjax.search.plan import validations  # noqa: E402

KILLS, EPOCHS = 20, 6
SPACE = ["--space", "learning_rate=log(1e-3, 1e-1)", "batch_size=choice(32, 64)"]
SETTINGS = ["--epochs", str(EPOCHS), "--prune", "median(startup=4)"]


def search(*argv):
    """Starts a search in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cnnjax", "search", *argv, "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def await_line(process, start):
    """Reads what the search prints until a line that starts so."""
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"the search ended before {start}")


def await_progress(process, out):
    """Waits until a trial has been validated, or the search has ended."""

    def progress():
        return [path.stat().st_size for path in sorted(out.glob("trials/*/metrics.jsonl"))]

    before = progress()
    while progress() == before and process.poll() is None:
        time.sleep(0.05)


def trials_of(out):
    """Returns number -> trial of those that count; also that the study opens."""
    study = optuna.load_study(study_name=out.name, storage=f"sqlite:///{out}/study.db")
    return {each.number: each for each in study.trials if "skipped" not in each.user_attrs}


@pytest.mark.exhaustive
def test_kills_at_random_moments(tmp_path):
    out, budget = tmp_path / "search", 8
    first = ["experiments.digits_mlp", *SPACE, *SETTINGS, "--trials", "8", "--out", str(out)]
    draws = random.Random(int(os.environ.get("CNNJAX_TEST_SEED", "0")))
    kills, ended, before, moments = 0, {}, {}, []
    while kills < KILLS:
        is_new = not (out / "search.json").exists()
        process = search(*(first if is_new else ["--resume", str(out), "--trials", str(budget)]))
        # Some are killed while the search starts, some while its workers do, some when a trial
        # has been validated anew.
        begin = "workers" if is_new else draws.choice(["", "workers", "progress", "progress"])
        if begin:
            await_line(process, "workers")
        if begin == "progress":
            await_progress(process, out)
        try:
            process.wait(timeout=draws.uniform(0.0, 5.0))
            assert process.returncode == 0, process.stdout.read()
            budget += 4  # It has come to its end before it could be killed.
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        now = trials_of(out)
        running = [each for each in now.values() if each.state.name == "RUNNING"]
        moments.append(f"{len(now)} trials begun, {len(running)} running")
        assert len(now) <= budget and len(running) <= 2
        # What was begun keeps its number and settings, what has ended its scores.
        assert before.items() <= {number: each.params for number, each in now.items()}.items()
        assert all(now[number].values == values for number, values in ended.items())
        before = {number: each.params for number, each in now.items() if each.params}
        ended = {number: each.values for number, each in now.items() if each.state.is_finished()}
        # Workers notice that the search has gone within a fraction of a second.
        time.sleep(0.5)
    print("\n".join(moments))
    last = search("--resume", str(out), "--trials", str(budget))
    printed, _ = last.communicate(timeout=900)
    assert last.returncode == 0, printed
    found = trials_of(out)
    assert len(found) == budget
    assert {each.state.name for each in found.values()} <= {"COMPLETE", "PRUNED"}
    assert before.items() <= {number: each.params for number, each in found.items()}.items()
    for number, each in found.items():
        directory = out / "trials" / f"{number:04}"
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = [each["step"] for each in records if each["kind"] == "validation"]
        # Every epoch was validated once, across all kills.
        assert steps == sorted(set(steps))
        scores = validations(directory, "accuracy")
        if each.state.name == "COMPLETE":
            assert len(steps) == EPOCHS and each.value == scores[-1]
        assert list(each.intermediate_values.values()) == scores[: len(each.intermediate_values)]
