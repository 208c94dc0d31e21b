"""Quantized networks keep their integers in the files that other runtimes compute with."""

import functools
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import compress, export, ops
from cnnjax.commands import compress as compress_command
from cnnjax.commands import export as export_command
from cnnjax.export import lite, lite_codes, onnx_model
from cnnjax.run import classifier, cli, settings

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
SHAPE = (8, 8, 3)


class Residual(nn.Module):
    """A strided, a depthwise and a plain convolution, a sum, a pool, and a flattening."""

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.relu(ops.Conv(8, (3, 3), strides=2, name="conv1")(x))
        y = nn.relu(ops.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(x + ops.Conv(8, (1, 1), name="conv2")(y))
        x = ops.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return ops.Dense(10, name="head")(x)


@functools.cache
def made(text):
    """Returns (quantized model, variables, images)."""
    model, generator = Residual(), np.random.default_rng(0)
    images = generator.uniform(-1, 1, size=(96, *SHAPE)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    scheme = compress.read_scheme(text)
    found = compress.quantize(model, variables, SHAPE, scheme, images=[images])
    return found.model, found.variables, images


def own_logits(model, variables, images):
    call = jax.jit(export.forward_of(model, integers=True))
    return np.asarray(call(variables, jnp.asarray(images)))


def assert_alike(logits, own):
    """The same but where a sum's rounding moves a code by one."""
    spread = own.max() - own.min()
    assert np.median(np.abs(logits - own)) < 1e-5 * spread
    assert np.abs(logits - own).max() < 0.03 * spread


def rows(array):
    """Its shape and its rows, in any order: that of a flattened image's differs."""
    array = np.atleast_2d(array)
    return array.shape, tuple(sorted(each.tobytes() for each in array))


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        pytest.param("integer(4, 4)", marks=pytest.mark.slow),
        pytest.param("int8(symmetric=true, skip=conv2)", marks=pytest.mark.slow),
    ],
)
def test_onnx_files_hold_the_codes_and_answer_alike(tmp_path, text):
    model, variables, images = made(text)
    file = onnx_model.make(export.forward_of(model), variables, export.Signature(SHAPE))
    arrays = {each.name: each for each in file.graph.initializer}
    from onnx import numpy_helper

    codes = [numpy_helper.to_array(each) for each in arrays.values() if each.data_type == 3]
    known = {rows(each) for each in codes}
    parameters = compress.quantization_parameters(model, variables)
    assert len(parameters) == (3 if "skip" in text else 4)
    for path, entry in parameters.items():
        kernel = entry["kernel"]
        kernel = kernel if path == "head" else kernel.transpose(3, 2, 0, 1)
        assert rows(kernel) in known, path
        assert entry["bias_codes"].tobytes() in {each.raw_data for each in arrays.values()}
    path = tmp_path / "m.onnx"
    path.write_bytes(file.SerializeToString())
    assert_alike(export.opened(path, "onnx")(images), own_logits(model, variables, images))


def test_flattening_costs_no_transpose_between_codes():
    model, variables, _ = made("int8")
    file = onnx_model.make(export.forward_of(model), variables, export.Signature(SHAPE))
    operators = [node.op_type for node in file.graph.node]
    assert operators.count("Transpose") == 1
    # Each input and kernel, and each bias beside a rounded input.
    assert operators.count("QuantizeLinear") == 4
    assert operators.count("DequantizeLinear") == 12


def test_stablehlo_answers_alike_at_any_batch(tmp_path):
    model, variables, images = made("int8")
    path = tmp_path / "m.stablehlo"
    export.write(path, "stablehlo", export.forward_of(model), variables, export.Signature(SHAPE))
    own = own_logits(model, variables, images)
    for count in (1, len(images)):
        assert_alike(export.opened(path, "stablehlo")(images[:count]), own[:count])


@pytest.mark.slow
def test_lite_files_hold_the_codes_and_answer_alike(tmp_path):
    pytest.importorskip("ai_edge_litert")
    model, variables, images = made("int8")
    plain, floats = compress.dequantized(model, variables)
    path, parameters = tmp_path / "m.tflite", compress.quantization_parameters(model, variables)
    signature = export.Signature(SHAPE, batch=1)
    written = lite.write(
        path,
        export.forward_of(plain),
        floats,
        signature,
        precision="int8",
        calibration=images,
        codes=parameters,
    )
    assert set(written.layers) == set(parameters) and not written.missing
    # The image's own scale is the file's, the others are the run's.
    assert set(written.inputs) >= {"depthwise", "conv2", "head"}
    run = export.opened(path, "tflite")
    logits = np.concatenate([run(image[None]) for image in images])
    own = own_logits(model, variables, images)
    # The logits have 8 bits in the file.
    assert np.abs(logits - own).max() < 0.04 * (own.max() - own.min())
    content, again = lite_codes.with_codes(path.read_bytes(), parameters)
    assert again.layers == written.layers and content == path.read_bytes()


def called(capsys, config, main, *argv):
    """Returns (exit code, output) of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(config, main, [str(each) for each in argv])
    found = capsys.readouterr()
    return stop.value.code, found.out + found.err


@pytest.mark.slow
def test_a_quantized_run_is_exported_as_it_is(tmp_path, capsys):
    pytest.importorskip("ai_edge_litert")
    argv = ["--model", "lenet5", "--dataset", "digits", "--epochs", "8", "--devices", "1"]
    argv += ["--image-size", "28", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        settings.launch(classifier.Config, classifier.main, argv)
    assert not stop.value.code
    command = (compress_command.Config, compress_command.main)
    exporting = (export_command.Config, export_command.main)
    flags = ("--quantize", "int8(report=0)", "--out", tmp_path / "codes")
    assert not called(capsys, *command, "--run", tmp_path / "run", *flags)[0]
    flags = ("--run", tmp_path / "codes", "--check", 180, "--agreement", "0.98")
    sizes = {}
    for name in ("model.onnx", "model.stablehlo", "model.tflite"):
        code, text = called(capsys, *exporting, *flags, "--out", tmp_path / name)
        assert not code, text
        sizes[name] = os.path.getsize(tmp_path / name)
    # 44,426 weights, a byte each, and what each format says beside them.
    assert all(45_000 < size < 80_000 for size in sizes.values()), sizes
    code, text = called(
        capsys, *exporting, *flags, "--precision", "int8", "--out", Path(tmp_path / "m.tflite")
    )
    assert code == 2 and "is quantized, and its file is as it is" in text
    flags = ("--quantize", "integer(4, 4, report=0)", "--out", tmp_path / "four")
    assert not called(capsys, *command, "--run", tmp_path / "run", *flags)[0]
    code, text = called(
        capsys, *exporting, "--run", tmp_path / "four", "--out", tmp_path / "m.tflite"
    )
    assert code == 2 and "take 8 bits for activations" in text
