"""`cnnjax compress`: a run in, a smaller run out; training that goes on bit for bit; mistakes."""

import json

import numpy as np
import pytest

import cnnjax
from cnnjax import commands
from cnnjax.commands import compress as command
from cnnjax.errors import UserError
from cnnjax.run import classifier, load
from cnnjax.trees import named_leaves

TINY = {"model": "cnn_strided_16_32", "dataset": "mnist", "train_examples": 512, "devices": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "base"
    config = classifier.Config(**TINY, smoke=True, epochs=1, batch_size=64, run_dir=str(directory))
    assert classifier.main(config) == 0
    return directory


def compress(run, out, text, **options):
    return command.main(
        command.Config(**{"run": str(run), "quantize": text, "out": str(out), **options})
    )


def leaves_of(directory):
    variables, _ = load.load_variables(directory)
    return named_leaves(variables)


def equal(first, second):
    return first.keys() == second.keys() and all(
        np.array_equal(first[path], second[path]) for path in first
    )


@pytest.mark.slow
def test_a_quantized_run_is_a_run_like_any_other(run, tmp_path, capsys):
    assert compress(run, tmp_path / "int8", "int8(report=100)") == 0
    printed = capsys.readouterr().out
    assert "times less" in printed and "accuracy" in printed
    report = json.loads((tmp_path / "int8" / "quantization.json").read_text())
    size, accuracy = report["bytes"], report["test_accuracy"]
    assert size["after"] < 0.4 * size["before"]
    assert abs(accuracy["after"] - accuracy["before"]) < 0.03
    trained = load.load_trained(tmp_path / "int8")
    kernels = {
        path: leaf.dtype
        for path, leaf in named_leaves(trained.variables["params"]).items()
        if path.endswith("kernel")
    }
    assert set(kernels.values()) == {np.dtype("int8")}
    image = trained.normalize(np.zeros((1, 28, 28, 1), np.uint8))
    assert trained.model.apply(trained.variables, image, train=False).shape == (1, 10)
    assert trained.features(np.zeros((1, 28, 28, 1), np.uint8)).ndim == 2
    with pytest.raises(UserError, match="whose codes cannot be trained"):
        load.read_base(tmp_path / "int8")
    with pytest.raises(UserError, match="is quantized already"):
        compress(tmp_path / "int8", tmp_path / "again", "int8")
    with pytest.raises(UserError, match="nothing is written over"):
        compress(run, tmp_path / "int8", "int8")
    for argv in (
        ["evaluate", "--run", str(tmp_path / "int8"), "--smoke"],
        ["compress", "--resume", str(tmp_path / "int8")],
        ["explain", "--run", str(tmp_path / "int8"), "--methods", "gradient", "--check", "16"],
    ):
        with pytest.raises(SystemExit) as stop:
            commands.main(argv)
        assert not stop.value.code


@pytest.mark.slow
def test_training_that_was_stopped_ends_with_the_same_bits(run, tmp_path):
    text = "int4(activations=8, qat=true, epochs=2, report=0, samples=64)"
    assert compress(run, tmp_path / "whole", text) == 0
    assert compress(run, tmp_path / "parts", text, stop_after_epochs=1) == 0
    assert not (tmp_path / "parts" / "model.json").exists()
    again = {"resume": str(tmp_path / "parts")}
    with pytest.raises(UserError, match="differs from the resumed run's"):
        compress("", "", text.replace("64", "32"), **again)
    assert compress("", "", "", **again) == 0
    for part in ("", "qat"):
        assert equal(leaves_of(tmp_path / "whole" / part), leaves_of(tmp_path / "parts" / part))
    # What was trained is not what it started from.
    assert compress(run, tmp_path / "ptq", "int4(activations=8, report=0, samples=64)") == 0
    assert not equal(leaves_of(tmp_path / "whole"), leaves_of(tmp_path / "ptq"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("int8(calibration=entropi)", {}, "did you mean entropy"),
        ("int8(skip=hed)", {}, "did you mean head"),
        ("int8", {"dataset": "folder:nowhere"}, "nowhere"),
        ("int8", {"epochs": 3}, "qat=true, epochs=3"),
        ("float16(qat=true)", {}, "qat"),
        ("int8", {"stop_after_epochs": 1}, "add qat=true"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(run, tmp_path, text, options, words):
    with pytest.raises(UserError, match=words):
        compress(run, tmp_path / "out", text, **options)
    assert not (tmp_path / "out" / "model.json").exists()


def test_images_of_another_shape_are_told():
    from cnnjax.studies import quantized_runs

    mnist = cnnjax.data.load("mnist")
    with pytest.raises(UserError, match="has images of 28x28x1, but the network takes 32x32x3"):
        quantized_runs.check_shape(mnist, {"image_shape": [32, 32, 3]})


def test_calibration_images_are_a_function_of_the_seed():
    from cnnjax.compress import read_scheme
    from cnnjax.studies import quantized_runs

    mnist = cnnjax.data.load("mnist")
    scheme = read_scheme("int8(samples=300, report=10)")
    first, again, other = (
        quantized_runs.choose_images(mnist, scheme, seed, labeled=True) for seed in (0, 0, 1)
    )
    assert sum(map(len, first.calibration)) == 300 and sum(map(len, first.test[1])) == 10_000
    assert np.array_equal(first.calibration[0], again.calibration[0])
    assert not np.array_equal(first.calibration[0], other.calibration[0])
