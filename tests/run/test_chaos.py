"""The script that kills and spoils trainings notices what it should; slow: it does it for real."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from cnnjax import checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import chaos  # noqa: E402
import chaos_damage  # noqa: E402

sys.path.remove(str(SCRIPTS))


def state(step, value=1.0):
    return {"step": jnp.int32(step), "params": {"a": jnp.full(100, value), "b": jnp.ones((3, 3))}}


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "straight"
    for step in (4, 8, 12):
        checkpoint.save(run / "checkpoints", state(step), {"seconds": step})
    lines = [json.dumps({"step": step, "kind": "train"}) + "\n" for step in (4, 8, 12)]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


@pytest.fixture
def runs(straight_run, tmp_path):
    return straight_run, shutil.copytree(straight_run, tmp_path / "killed")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", chaos.DAMAGES)
def test_every_damage_is_noticed_and_the_step_before_is_good(runs, tmp_path, name, seed):
    straight, run = runs
    tally = chaos.Tally(tmp_path / "tally.json")
    generator = random.Random(seed)
    generator.choice = lambda options, choose=generator.choice: (  # type: ignore[method-assign]
        name if name in options else choose(options)
    )
    assert chaos.spoil(straight, run, generator, "lenet", tally) == []
    assert tally["lenet", f"spoiled: {name}"] == 1
    messages = []
    found, meta = checkpoint.restore(run / "checkpoints", state(0), warn=messages.append)
    assert (int(found["step"]), meta) == (8, {"seconds": 8})
    assert any("00000012" in message for message in messages)
    checkpoint.clean(run / "checkpoints", after=8)
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["00000004", "00000008"]


def test_what_a_kill_leaves_is_told_apart(runs):
    _, run = runs
    assert chaos.left_behind(run) == "before it wrote anything"
    (run / "config.json").touch()
    assert chaos.left_behind(run) == "between checkpoints"
    (run / "checkpoints" / ".tmp-00000016").mkdir()
    assert chaos.left_behind(run) == "writing a checkpoint"
    (run / "checkpoints" / ".tmp-00000016").rename(run / "checkpoints" / ".tmp-deleted-00000004")
    assert chaos.left_behind(run) == "deleting a checkpoint"


def test_losses_gaps_and_other_bits_are_reported(runs):
    straight, run = runs
    assert chaos.check(straight, run, confirmed=12) == []
    assert chaos.check(straight, run, confirmed=16) == ["the checkpoint of step 16 is lost"]
    checkpoint.save(run / "checkpoints", state(12, value=2.0), {})
    assert chaos.check(straight, run, 12) == ["arrays of params of step 12 differ, first params/a"]
    shutil.rmtree(run / "checkpoints" / "00000012.1")
    lines = (straight / "metrics.jsonl").read_text().splitlines(keepends=True)
    for text, wrong in [
        ("", False),
        (lines[0] + lines[1][:9], False),
        (lines[0] + lines[2], True),
        (lines[0] + lines[0], True),
    ]:
        (run / "metrics.jsonl").write_text(text)
        assert bool(chaos.check(straight, run, -1)) == wrong
    (run / "metrics.jsonl").write_text("")
    chaos_damage.truncate(run / "checkpoints" / "00000008", random.Random(0))
    (report,) = chaos.check(straight, run, 8)
    assert "00000008" in report


def test_the_tally_is_kept_and_added_to(tmp_path):
    for _ in range(2):
        tally = chaos.Tally(tmp_path / "tally.json")
        tally["resnet", "killed writing a checkpoint"] += 2
        tally["lenet", "debris left"] += 1
        tally.save()
    assert tally.table().splitlines() == [
        "                                lenet    resnet",
        "debris left                         2         0",
        "killed writing a checkpoint         0         4",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_nothing_is_lost_by_kills(tmp_path, kills):
    command = [sys.executable, str(SCRIPTS / "chaos.py"), "--kills", str(kills)]
    done = subprocess.run(
        [*command, "--experiments", "lenet", "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing that was saved was lost" in done.stdout
    tally = chaos.Tally(tmp_path / "tally.json")
    assert sum(n for (_, what), n in tally.items() if what.startswith("killed")) == kills
    assert tally["lenet", "trainings that reached their end"] >= 1
