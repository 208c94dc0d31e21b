"""`python -O` leaves out assertions, and nothing else: a run is the same with it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cnnjax.run.verify_resume import compare_runs

ROOT = Path(__file__).parents[2]
NESTED = """
import flax.linen as nn, jax.numpy as jnp
from cnnjax.models.interceptors import intercept_methods
seen = []
def note(name):
    return lambda call, args, kwargs, context: seen.append(name) or call(*args, **kwargs)
layer = nn.Dense(2)
variables = layer.init(__import__("jax").random.key(0), jnp.ones((1, 3)))
def call():
    seen.clear()
    layer.apply(variables, jnp.ones((1, 3)))
    return "".join(seen)
with intercept_methods(note("a")):
    with intercept_methods(note("b")):
        both = call()
    one = call()
    try:
        with intercept_methods(note("c")):
            raise KeyError
    except KeyError:
        pass
    after_error = call()
print(both, one, after_error, call() or "none")
"""


def python(*arguments, **options):
    options = {"capture_output": True, "text": True, "cwd": ROOT, **options}
    return subprocess.run([sys.executable, *arguments], **options)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["-B", "-O"])
def test_interceptors_end_with_their_context(option):
    done = python(option, "-c", NESTED)
    assert done.stdout.split() == ["ab", "a", "a", "none"], done.stderr


def test_interceptors_are_made_in_one_place():
    users = [
        path.name
        for path in (ROOT / "cnnjax").rglob("*.py")
        if "nn.intercept_methods(" in path.read_text()
    ]
    assert users == ["interceptors.py"]


@pytest.mark.parametrize("folder", ["cnnjax", "experiments", "scripts", "benchmarks"])
def test_assertions_change_nothing(folder):
    # What they call is left out with them.
    pure = {"isinstance", "len", "all", "any"}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                calls = [each for each in ast.walk(node.test) if isinstance(each, ast.Call)]
                assert all(getattr(call.func, "id", "") in pure for call in calls), (
                    f"{path.name}, line {node.lineno}: {ast.unparse(node)}"
                )
                assert not any(isinstance(each, ast.NamedExpr) for each in ast.walk(node.test))


@pytest.mark.slow
def test_a_run_without_assertions_ends_with_the_same_bits(tmp_path):
    # It has dropout, whose draws belong to examples, and its steps are one loop.
    for option in ("-B", "-O"):
        run = tmp_path / option.strip("-")
        flags = ["--smoke", "--devices", "1", "--run-dir", str(run)]
        done = python(option, "-m", "experiments.classify", *flags)
        assert done.returncode == 0, done.stderr
    comparisons = compare_runs(tmp_path / "B", tmp_path / "O")
    assert not [each for each in comparisons if each.different]
