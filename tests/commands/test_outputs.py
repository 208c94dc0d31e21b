"""What commands write: each thing once, where it can be written, or one line that says why not."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnjax import commands, convert, models
from cnnjax.commands import convert as convert_command
from cnnjax.commands import predict
from cnnjax.run import exits

ROOT = Path(__file__).parents[2]
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LeNet-5 of random weights."""
    folder = tmp_path_factory.mktemp("run")
    lenet = models.create("lenet5", num_classes=10)
    table = convert.entries(lenet, (28, 28, 1), convert.find_names(lenet, "pytorch"))
    draw = np.random.default_rng(0).normal
    arrays = {entry.name: draw(size=entry.their_shape).astype("f") for entry in table}
    convert.write(folder / "weights.npz", arrays)
    config = convert_command.Config(
        source=folder / "weights.npz", out=folder / "lenet", model="lenet5"
    )
    assert convert_command.main(config) == 0
    return folder / "lenet"


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / folder / "x.png" for folder in "abc"]
    for shade, path in enumerate(paths):
        path.parent.mkdir()
        array = np.full((30, 30), 255, np.uint8)
        array[5:25, 10 + shade] = 0
        Image.fromarray(array).save(path)
    return paths


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        commands.main([str(each) for each in argv])
    return (stop.value.code or 0, *capsys.readouterr())


def test_pictures_of_files_with_one_name_are_as_many(run, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    code, printed, _ = call(capsys, "predict", "--run", run, "--out", out, *pictures)
    assert code == 0
    answers = [line for line in printed.splitlines() if "%" in line]
    names = [line.rpartition("(see ")[2].rstrip(")") for line in answers]
    assert len(set(names)) == 3 and all(Path(name).exists() for name in names)
    assert len({Path(name).read_bytes() for name in names}) == 3


def test_names_of_pictures():
    def names(*paths):
        return predict.picture_names([Path(path) for path in paths])

    assert names("a/x.png", "a/x.jpg") == ["x.png.png", "x.jpg.png"]
    assert names("a/x", "b/X", "c/x-2", "d/x") == ["x.png", "X-2.png", "x-2-2.png", "x-3.png"]
    assert names("x-2", "x", "a/x") == ["x-2.png", "x.png", "x-3.png"]


def test_a_picture_that_fails_costs_no_answer(run, pictures, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    code, printed, err = call(capsys, "predict", "--run", run, "--out", tmp_path / "o", *pictures)
    assert code == 0 and printed.count("%") >= 9 and "(see" not in printed
    assert err.count("\n") == 3 and err.count("RuntimeError: no fonts") == 3


def places(tmp_path):
    (tmp_path / "file").write_text("mine")
    return [tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere/x"), "x" * 300]


@pytest.mark.parametrize("command", ["predict", "evaluate", "inspect-labels", "show-batch"])
def test_a_place_that_cannot_be_written_is_one_line(run, pictures, tmp_path, capsys, command):
    flags = {
        "predict": ["--run", run, pictures[0], "--out"],
        "evaluate": ["--run", run, "--dataset", "mnist", "--smoke", "--out"],
        "inspect-labels": ["--run", run, "--out"],
        "show-batch": ["--smoke", "--run-dir"],
    }[command]
    for place in places(tmp_path):
        code, _, err = call(capsys, command, *flags, place)
        assert (code, err.count("\n")) == (2, 1), err
        assert "cannot write" in err and str(place) in err
        assert f"choose another {flags[-1]}." in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_of_weights_is_not_written_over(run, tmp_path, capsys):
    out = tmp_path / "mine.npz"
    assert call(capsys, "convert", run, "--out", out)[0] == 0
    before = out.read_bytes()
    code, _, err = call(capsys, "convert", run, "--out", out)
    assert code == 2 and f"{out} exists: choose another --out" in err
    assert out.read_bytes() == before
    code, _, err = call(capsys, "convert", run, "--out", out / "below.npz")
    assert (code, err.count("\n")) == (2, 1) and "below.npz" in err
    source = run.parent / "weights.npz"
    code, _, err = call(capsys, "convert", source, "--model", "lenet5", "--out", out / "run")
    assert (code, err.count("\n")) == (2, 1) and "choose another --out" in err


def test_scores_of_two_steps_have_a_place_each():
    from cnnjax.commands import evaluate

    def place(*runs, **settings):
        directories = [evaluate._at_step(each)[0] for each in runs]
        return str(evaluate._out(evaluate.Config(run=runs, **settings), directories))

    assert place("r") == "r/evaluation-test"
    assert place("r@5") == "r/evaluation-test-step-5"
    assert place("r@5", "s", split="train") == "r/ensemble-train-step-5"
    assert place("r@5", out="here") == "here"


LINES = ["cnnjax models lenet5", "cnnjax", "experiments.mnist_lenet --help", "cnnjax probe --help"]


def start(line, **options):
    program = [sys.executable, "-m", *line.split()]
    return subprocess.run(program, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_every_program_quietly(line, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = start(line, stdout=writer, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert (done.returncode, done.stderr) == (exits.BROKEN_PIPE_EXIT_CODE, "")


@FULL
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_one_line(line, unbuffered):
    with open("/dev/full", "w") as full:
        done = start(line, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and os.strerror(errno.ENOSPC) in done.stderr


def test_a_closed_output_is_no_mistake():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m cnnjax probe --help >&-"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("platform", ["cuda", "gpu", "nonsense", "cpu,", "cuda,nonsense"])
def test_a_platform_that_is_not_there_is_one_line(platform):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("there is such a platform")
    done = start("experiments.mnist_lenet --smoke", env={**os.environ, "JAX_PLATFORMS": platform})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: JAX cannot use JAX_PLATFORMS={platform} (")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "experiments.mnist_lenet --smoke",
        "experiments.dcgan_mnist --smoke",
        "experiments.finetune --smoke --base RUN",
        "cnnjax predict --run RUN PICTURE",
        "cnnjax evaluate --run RUN --smoke",
        "cnnjax inspect-labels --run RUN",
        "cnnjax probe --run RUN --smoke",
        "cnnjax show-batch --smoke",
        "cnnjax convert RUN --out OUT",
    ],
)
@pytest.mark.parametrize("option", ["-B", "-O"])
def test_no_program_has_a_traceback_for_a_platform(line, option, run, pictures, tmp_path):
    words = {"RUN": str(run), "PICTURE": str(pictures[0]), "OUT": str(tmp_path / "x.npz")}
    program = [words.get(word, word) for word in line.split()]
    done = subprocess.run(
        [sys.executable, option, "-m", *program],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    # What needs no device computes nothing.
    assert done.returncode == 0 or (done.returncode == 2 and done.stderr.count("\n") == 1)
