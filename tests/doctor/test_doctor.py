"""`cnnjax doctor` in environments that are broken on purpose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MISMATCH = "from cnnjax.run import exits\nwith exits.one_line_errors():\n    import jax\n"


def doctor(*flags, python=(), limit=None, **variables):
    """Returns the exit code and the report of the command, and what it printed besides."""
    names = ("XLA_FLAGS", "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in names}

    # Not by preexec_fn: it forks, which JAX's threads do not survive.
    limited = ("sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh") if limit else ()
    done = subprocess.run(
        [*limited, sys.executable, *python, "-m", "cnnjax", "doctor", "--json", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | variables,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def made_jaxlib(directory, version):
    """Another build of jaxlib, as far as JAX looks at it before it loads compiled code."""
    (directory / "jaxlib").mkdir(parents=True)
    (directory / "jaxlib" / "__init__.py").touch()
    (directory / "jaxlib" / "version.py").write_text(f'__version__ = "{version}"\n')
    metadata = directory / f"jaxlib-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: jaxlib\nVersion: {version}\n")
    return str(directory)


def test_another_jaxlib_on_the_path_is_found_twice_over(tmp_path):
    path = made_jaxlib(tmp_path / "other", "0.4.30")
    code, found, _ = doctor("--no-train", PYTHONPATH=path)
    assert code == 1 and found["probe"]["failed"] == "import jax"
    texts = [each["text"] for each in found["findings"]]
    assert any("jaxlib is installed 2 times: 0.4.30 in" in text for text in texts)
    assert any(text.startswith("jax cannot be imported: ") for text in texts)
    assert any("but jaxlib 0.4.30 is installed" in text for text in texts)
    done = subprocess.run(
        [sys.executable, "-c", MISMATCH],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot import jax") and "cnnjax doctor" in done.stderr


@pytest.mark.slow
def test_without_any_package_there_is_a_report(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text('raise ImportError("torn in two")\n')
    # -S: the program itself sees no installed package at all.
    code, found, _ = doctor(python=("-S",), PYTHONPATH=str(tmp_path))
    assert code == 1 and found["packages"] == {}
    (first, *_) = found["findings"]
    assert first["text"] == "jax cannot be imported: ImportError: torn in two"


@pytest.mark.slow
def test_an_unknown_flag_of_xla_is_named():
    code, found, _ = doctor("--no-train", XLA_FLAGS="--xla_no_such_flag=1")
    (finding,) = found["findings"]
    assert code == 1 and finding["text"] == "XLA knows no --xla_no_such_flag=1"


@pytest.mark.slow
def test_read_only_directories_and_few_descriptors_are_warnings():
    # Nobody may write there, not even root.
    code, found, _ = doctor(
        "--no-train", limit=200, XDG_CACHE_HOME="/proc/cache", TFDS_DATA_DIR="/proc/data"
    )
    texts = [each["text"] for each in found["findings"]]
    assert code == 0 and len(texts) == 3
    assert texts[0].startswith("the directory of compile cache, /proc/cache/cnnjax/xla/")
    assert texts[1] == "TFDS_DATA_DIR is /proc/data, which does not exist"
    assert texts[2].startswith("a process may open only 200 files")


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_named():
    code, found, _ = doctor("--no-train", JAX_PLATFORMS="nonsense")
    (finding,) = found["findings"]
    assert code == 1 and "JAX starts no device with JAX_PLATFORMS=nonsense: " in finding["text"]


@pytest.mark.slow
def test_a_check_that_never_ends_is_ended(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("import time\ntime.sleep(1000)\n")
    code, found, _ = doctor("--timeout", "2", PYTHONPATH=str(tmp_path))
    assert code == 1 and found["probe"]["exit_code"] is None
    assert found["findings"][0]["text"] == "JAX does not answer at the stage 'import jax'"


@pytest.mark.slow
def test_here_it_trains_for_a_second():
    code, found, _ = doctor(JAX_PLATFORMS="cpu")
    assert code == 0 and found["probe"]["failed"] is None
    ((check,),) = [stage["training"] for stage in found["probe"]["stages"] if "training" in stage]
    assert check["device"] == "cpu:0" and check["images_per_sec"] > 0
    assert check["last_loss"] < 0.5 * check["first_loss"]
