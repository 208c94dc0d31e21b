"""A served model answers as `predict` does, bit for bit, and compiles nothing once it is warm."""

import jax
import numpy as np
import pytest

import cnnjax
from cnnjax import export
from cnnjax.commands import export as export_command
from cnnjax.errors import UserError
from cnnjax.run import load
from cnnjax.serve.measures import watch_compilations
from cnnjax.serve.models import read_sources
from cnnjax.serve.runtime import Options, check_source, open_runtime
from cnnjax.train.evaluate import compile_predict
from cnnjax.train.predict import make_predict

OPTIONS = Options(largest_batch=4, explain=False)


def digits(count):
    return cnnjax.data.load("mnist").test.image[:count]


@pytest.fixture(scope="module")
def runtime(run):
    return open_runtime(run, OPTIONS)


def predicted(run, images):
    """What the function of `cnnjax predict` computes."""
    trained = load.load_classifier(run)
    task = cnnjax.tasks.classification.classification(10)
    predict = compile_predict(
        make_predict(trained.model, task, normalize=trained.normalize),
        cnnjax.devices.sharding.make_mesh(1),
    )
    return np.asarray(predict(trained.variables, {"image": jax.numpy.asarray(images)}))


@pytest.mark.slow
@pytest.mark.parametrize("bucket", [1, 4])
def test_answers_are_those_of_predict_bit_for_bit_at_the_same_bucket(runtime, run, bucket):
    images = digits(bucket)
    _, probabilities = runtime.run(images)
    np.testing.assert_array_equal(probabilities, predicted(run, images))


@pytest.mark.slow
def test_padding_changes_nothing_but_rounding(runtime):
    logits, probabilities = runtime.run(digits(3))
    whole, _ = runtime.run(digits(4))
    np.testing.assert_array_equal(logits, whole[:3])
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)


@pytest.mark.slow
def test_nothing_compiles_after_the_start(runtime):
    compiled = []
    watch_compilations(lambda: compiled.append(1))
    jax.jit(lambda x: x + 1)(np.zeros(3))
    assert compiled == [1]  # It counts.
    for count in range(1, 12):
        runtime.run(digits(count))
    runtime.prepare(np.full((40, 40, 3), 200, np.uint8))
    assert compiled == [1]


@pytest.mark.slow
def test_another_shape_is_no_program(runtime):
    with pytest.raises(KeyError):
        runtime.call(np.zeros((1, 27, 28, 1), np.uint8))


@pytest.mark.slow
def test_a_network_of_one_size_refuses_another(run):
    with pytest.raises(UserError, match=r"--sizes 32x32: lenet5 of .*, trained on images of 28x28"):
        open_runtime(run, Options(image_sizes=((32, 32),)))


@pytest.mark.parametrize("largest", [0, 5000])
def test_batches_out_of_range_are_one_line(largest):
    with pytest.raises(UserError, match=f"--max-batch {largest}: give 1 to 4096"):
        open_runtime("nowhere", Options(largest_batch=largest))


def test_sources_get_names_and_versions(tmp_path):
    run = tmp_path / "lenet.onnx"
    run.write_bytes(b"")
    found = read_sources([str(run), f"digits={run}", f"digits={run}", f"digits:new={run}"])
    assert [(each.name, each.version) for each in found] == [
        ("lenet", "1"),
        ("digits", "1"),
        ("digits", "2"),
        ("digits", "new"),
    ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no model given"),
        (["a={run}", "a:1={run}"], "a has a version 1: name another"),
        (["../x={run}"], "there is no such path, and .* is no name of a model"),
        (["a b={run}"], "'a b' is no name of a model"),
        (["a="], "give a run directory or a file"),
        (["a=/nowhere/model.onnx"], "there is no file /nowhere/model.onnx"),
        (["a=/nowhere/model.h5"], "is not there: name a run directory or a file that ends in"),
    ],
)
def test_sources_that_cannot_be_are_one_line(texts, message, tmp_path):
    run = tmp_path / "lenet.onnx"
    run.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        read_sources([text.format(run=run) for text in texts])


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    if export.packages.missing("onnx", running=True):
        pytest.skip("no onnxruntime")
    with pytest.raises(UserError, match=r"cannot open .*model\.onnx"):
        open_runtime(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="is not a run directory"):
        check_source(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("model.onnx", []),
        ("first.onnx", ["--channels-first"]),
        ("plain.onnx", ["--preprocess", "none"]),
        ("resized.onnx", ["--preprocess", "resize:40x30"]),
        ("model.stablehlo", []),
        ("model.tflite", []),
        ("four.tflite", ["--batch", "4"]),
    ],
)
def test_exported_files_answer_as_their_run(run, runtime, tmp_path, name, flags):
    kind = {"onnx": "onnx", "tflite": "tflite", "stablehlo": "stablehlo"}[name.partition(".")[2]]
    if export.packages.missing(kind, running=True):
        pytest.skip(f"no runtime of {kind}")
    config = cnnjax.run.cli.parse(
        export_command.Config,
        ["--run", str(run), "--out", str(tmp_path / name), "--check", "0", *flags],
    )
    assert export_command.main(config) == 0
    found = open_runtime(tmp_path / name, Options(largest_batch=4, prepare="image"))
    assert found.class_names == runtime.class_names
    assert found.buckets == {"model.tflite": (1,), "four.tflite": (4,)}.get(name, (1, 2, 4))
    if name == "resized.onnx":
        assert found.shapes == ((40, 30, 1),)
        image = found.prepare(digits(1)[0])
        assert image.shape == (40, 30, 1)
        return
    image = digits(1)[0]
    expected, _ = runtime.run(image[None])
    logits, probabilities = found.run(found.prepare(image)[None])
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-6)


@pytest.mark.slow
def test_a_map_is_between_0_and_1_and_of_the_images_size(run):
    found = open_runtime(run, Options(largest_batch=1))
    map_ = found.explain(digits(1)[0], 3)
    assert map_.shape == (28, 28) and map_.min() >= 0 and map_.max() <= 1
