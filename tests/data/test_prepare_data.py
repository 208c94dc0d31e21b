"""The script that prepares tfds datasets: what it makes of files, and what it says."""

import gzip
import importlib.util
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from cnnjax.data import load, mnist
from cnnjax.errors import UserError

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_published_files_are_made_again_from_plain_ones(script, tmp_path):
    for stem in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        name = f"{stem}.gz"
        published = (mnist.DIRECTORY / name).read_bytes()
        (tmp_path / stem).write_bytes(gzip.decompress(published))
        made = script.published_gzip("mnist", stem, tmp_path, mnist.SHA256[name])
        assert made == published
        # A .gz of the same content made by another program does as well.
        (tmp_path / stem).unlink()
        (tmp_path / name).write_bytes(gzip.compress(gzip.decompress(published), 1))
        assert script.published_gzip("mnist", stem, tmp_path, mnist.SHA256[name]) == published


def test_other_content_is_refused(script, tmp_path):
    stem = "t10k-labels-idx1-ubyte"
    digest = mnist.SHA256[f"{stem}.gz"]
    with pytest.raises(UserError, match=f"neither '{stem}' nor '{stem}.gz' is in"):
        script.published_gzip("mnist", stem, tmp_path, digest)
    (tmp_path / stem).write_bytes(b"something else")
    with pytest.raises(UserError, match=f"not the published file of mnist: .* not {digest}"):
        script.published_gzip("mnist", stem, tmp_path, digest)
    (tmp_path / f"{stem}.gz").write_bytes(b"not zipped")
    with pytest.raises(UserError, match="cannot unzip"):
        script.published_gzip("mnist", stem, tmp_path, digest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "where is 'cifar10' to come from"),
        (["cifar10", "--source", "."], "--source is for mnist and fashion_mnist"),
        (["fashion_mnist", "--source", "/nowhere"], "neither 'train-images-idx3-ubyte'"),
        (["cifar10", "--manual-dir", "/nowhere"], "no directory '/nowhere'"),
        (["cifar10", "--manual-dir", "/proc/self"], "expected cifar-10-binary.tar.gz"),
        (["imagenet2012", "--download"], "must be downloaded by hand"),
        (["imdb_reviews"], "not for image classification"),
        (["mnits"], "did you mean mnist"),
        (["tuxpaint", "--source", "/nowhere"], "there is no tuxpaint-stamps-default_2022"),
        (["tuxpaint", "--manual-dir", "."], "tuxpaint has no archives"),
        (["emoji", "--source", "/nowhere"], "there is no fonts-noto-color-emoji_2.042"),
        (["emoji", "--download"], "emoji has no archives"),
    ],
)
def test_errors(script, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        script.main([*arguments, "--data-dir", str(tmp_path)])


def test_unreachable_host_is_told_soon(script, tmp_path, monkeypatch):
    def refuse(request, timeout):
        assert timeout <= 10
        raise OSError("no route")

    monkeypatch.setattr(script.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=r"www.cs.toronto.edu does not answer \(no route\)"):
        script.main(["cifar10", "--download", "--data-dir", str(tmp_path)])


def test_help_is_quick_and_errors_are_one_line(tmp_path):
    start = time.monotonic()
    printed = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 5
    for flag in ("--data-dir", "--source", "--manual-dir", "--download"):
        assert flag in printed.stdout
    failed = subprocess.run(
        [sys.executable, SCRIPT, "cifar10", "--data-dir", tmp_path], capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith("error: where is 'cifar10'")


@pytest.mark.slow
def test_mnist_from_idx_files(script, tmp_path, capsys):
    source = tmp_path / "idx"
    source.mkdir()
    for name in mnist.SHA256:
        content = mnist.read_verified(mnist.DIRECTORY, name)
        (source / name.removesuffix(".gz")).write_bytes(content)
    arguments = ["mnist", "--data-dir", str(tmp_path)]
    script.main([*arguments, "--source", str(source)])
    assert "train: 60,000" in capsys.readouterr().out
    script.main(arguments)
    assert "is already prepared in" in capsys.readouterr().out
    dataset = load("tfds:mnist?train=train[:100]&test=test", data_dir=tmp_path, validation=10)
    shipped = mnist.read()["test"].image
    assert dataset.test.image.sum(dtype=np.int64) == shipped.sum(dtype=np.int64)
