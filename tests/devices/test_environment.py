"""What a run depends on is recorded, and each change of it is one line."""

import json
import subprocess
import sys

import jax
import pytest

from cnnjax.devices import environment


def test_it_is_json_and_names_what_matters(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    found = environment.describe()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["jax"] == jax.__version__
    assert found["flags"]["XLA_FLAGS"] == "--xla_some_flag=1"
    assert found["jax"]["jax_enable_x64"] is False
    assert f"{len(jax.devices())} x cpu" in found["devices"]
    assert environment.changes(found, found) == []


BEFORE = {
    "versions": {"python": "3.11.1", "jax": "0.10.2", "orbax-checkpoint": "1"},
    "devices": "1 x cpu (A, 2 cores)",
    "flags": {},
    "jax": {"jax_enable_x64": False},
    "code": {"cnnjax": {"commit": "a" * 40, "uncommitted": ""}, "the program": None},
}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"versions": {**BEFORE["versions"], "jax": "0.12.0"}},
            "jax 0.10.2 -> 0.12.0: compiled code may round differently: bits may differ",
        ),
        (
            {"versions": {**BEFORE["versions"], "orbax-checkpoint": "2"}},
            "orbax-checkpoint 1 -> 2: it stores arrays and computes nothing: bits stay",
        ),
        (
            {"devices": "8 x tpu (v4)"},
            "devices 1 x cpu (A, 2 cores) -> 8 x tpu (v4): sums are made in another order: bits "
            "may differ",
        ),
        (
            {"flags": {"XLA_FLAGS": "--x=1"}},
            "XLA_FLAGS None -> '--x=1': compiled code may round differently: bits may differ",
        ),
        (
            {"jax": {"jax_enable_x64": True}},
            "jax_enable_x64 False -> True: compiled code may round differently: bits may differ",
        ),
        (
            {"code": {**BEFORE["code"], "cnnjax": {"commit": "b" * 40, "uncommitted": "cafe1234"}}},
            "code of cnnjax aaaaaaaaaa -> bbbbbbbbbb with changes cafe12: it may compute something "
            "else",
        ),
    ],
)
def test_each_change_says_what_may_differ(change, line):
    assert environment.changes(BEFORE, BEFORE | change) == [line]


def test_a_commit_and_what_is_not_committed(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    assert environment._commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "step.py").write_text("1")
    (tmp_path / ".gitignore").write_text("venv\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = environment._commit(tmp_path)
    assert len(clean["commit"]) == 40 and clean["uncommitted"] == ""
    (tmp_path / "notes.txt").write_text("no code")
    assert environment._commit(tmp_path) == clean
    (tmp_path / "new.py").write_text("2")
    untracked = environment._commit(tmp_path)
    (tmp_path / "step.py").write_text("3")
    changed = environment._commit(tmp_path)
    assert len({clean["uncommitted"], untracked["uncommitted"], changed["uncommitted"]}) == 3
    (tmp_path / "venv").mkdir()
    assert environment._commit(tmp_path / "venv") is None


FORKED = """
import os, sys
import cnnjax, jax
from cnnjax.devices import backend
if sys.argv[1] == "started":
    jax.numpy.zeros(3).block_until_ready()
child = os.fork()
if not child:
    try:
        backend.start(1)
        print(float(jax.numpy.ones(3).sum()), flush=True)
    except cnnjax.errors.UserError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("jax_has", "said"), [("started", "was forked when JAX had started"), ("not started", "3.0")]
)
def test_a_forked_process_computes_or_says_why_not(jax_has, said):
    program = [sys.executable, "-W", "ignore", "-c", FORKED, jax_has]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert said in done.stdout and done.stdout.count("\n") == 1, done.stderr
