"""The compilation cache: where it is, and that nothing needs it; what is compiled quickly."""

import os
import pwd
import subprocess
import sys

import jax
import numpy as np
import pytest

from cnnjax.devices import backend


@pytest.fixture
def configured(monkeypatch):
    """What JAX is told."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


def test_the_cache_is_below_the_home_directory(monkeypatch, tmp_path, configured):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    backend.enable_compilation_cache()
    found = configured["jax_compilation_cache_dir"]
    assert found.startswith(f"{tmp_path}/.cache/cnnjax/xla/") and os.path.isdir(found)
    assert os.listdir(tmp_path) == [".cache"]


def test_without_a_place_there_is_no_cache(monkeypatch, tmp_path, configured):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    backend.enable_compilation_cache()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    backend.enable_compilation_cache()
    assert configured == {}


def test_what_runs_once_has_the_same_values(monkeypatch):
    def draw(key):
        kernel = jax.random.truncated_normal(key, -2, 2, (3, 3, 8, 16))
        return kernel, jax.random.uniform(key, (64, 10), minval=-1)

    key = jax.random.key(3)
    # A level that XLA_FLAGS names, as in these tests, is obeyed: no option of its own.
    jax.jit(backend.jit_once(draw))(key)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    quick = backend.jit_once(draw, keep_unused=True)
    with pytest.raises(ValueError, match=r"'xla_backend_optimization_level': 1"):
        jax.jit(quick)(key)
    usual = jax.jit(draw, compiler_options={"xla_backend_optimization_level": 3})
    for one, other in zip(quick(key), usual(key), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_run_without_home_leaves_nothing_beside_it(tmp_path):
    program = (
        "import pwd; pwd.getpwuid = lambda number: {}[number]\n"
        "from experiments import digits_mlp\n"
        "from cnnjax.run import settings\n"
        "settings.launch(digits_mlp.Config, digits_mlp.main)"
    )
    unset = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": os.getcwd(), "XDG_CONFIG_HOME": "", "TFDS_DATA_DIR": ""}
    line = [sys.executable, "-c", program, "--smoke", "--run-dir", "run"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["run"]
