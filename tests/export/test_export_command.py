"""`cnnjax export` writes a run's network, proves that it answers the same, and says when not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cnnjax
from cnnjax import convert, export, models
from cnnjax.commands import convert as convert_command
from cnnjax.commands import export as export_command
from cnnjax.errors import UserError
from cnnjax.export import comparison, formats, packages, preprocessing
from cnnjax.run import classifier, cli, load, settings

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LeNet-5 of random weights, made of a file: a run without data."""
    folder = tmp_path_factory.mktemp("run")
    lenet = models.create("lenet5", num_classes=10)
    table = convert.entries(lenet, (28, 28, 1), convert.find_names(lenet, "pytorch"))
    draw = np.random.default_rng(0).normal
    arrays = {entry.name: 0.1 * draw(size=entry.their_shape).astype("f") for entry in table}
    convert.write(folder / "weights.npz", arrays)
    convert_command.main(
        convert_command.Config(folder / "weights.npz", folder / "lenet", model="lenet5")
    )
    return folder / "lenet"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two convolutions that have seen digits of 8x8 pixels on black of 16x16."""
    directory = tmp_path_factory.mktemp("trained") / "mlp"
    argv = ["--model", "cnn_32_64", "--dataset", "digits", "--epochs", "2", "--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        argv += ["--image-size", "16", "--run-dir", str(directory)]
        settings.launch(classifier.Config, classifier.main, argv)
    assert not stop.value.code
    return directory


def called(capsys, *argv):
    """Returns (exit code, output) of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(export_command.Config, export_command.main, [str(each) for each in argv])
    found = capsys.readouterr()
    return stop.value.code, found.out + found.err


def test_a_run_without_data_is_checked_on_noise(run, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    code, text = called(capsys, "--run", run, "--out", out, "--check", "40")
    assert not code, text
    assert "checked on noise, without labels" in text and "accuracy" not in text
    assert f"written   {out}" in text
    about = export.runtimes.about(out, "onnx")
    assert about["input_dtype"] == "uint8" and about["preprocess"] == "normalize"
    assert json.loads(about["input_shape"]) == ["batch", 28, 28, 1]
    assert len(json.loads(about["class_names"])) == 10
    image = np.random.default_rng(3).integers(0, 256, (5, 28, 28, 1), np.uint8)
    network = load.load_trained(run)
    expected = network.model.apply(network.variables, network.normalize(image), train=False)
    np.testing.assert_allclose(export.opened(out, "onnx")(image), expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_answers_otherwise_is_rejected(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an older file")
    written = formats.write

    def other_weights(path, kind, forward, variables, *args, **kwargs):
        variables = {**variables, "params": {**variables["params"]}}
        head = variables["params"]["head"]
        variables["params"]["head"] = {**head, "bias": head["bias"] + np.eye(10)[3]}
        written(path, kind, forward, variables, *args, **kwargs)

    monkeypatch.setattr(formats, "write", other_weights)
    code, text = called(capsys, "--run", run, "--out", out, "--check", "16")
    assert code == 1
    assert f"REJECTED  it does not answer as the network does: kept as {tmp_path}" in text
    assert (tmp_path / "model.rejected.onnx").exists()
    # What was there before is not lost to a file that is not good.
    assert out.read_bytes() == b"an older file"
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.rejected.onnx"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "model.onx"], "model.onx has no suffix that tells the format"),
        (["--out", "model.onnx", "--format", "tflite"], "not a name for tflite: end it with"),
        (["--out", "m.onnx", "--format", "saved_model"], "is a name for onnx, and saved_model"),
        (["--out", "m.onnx", "--precision", "int8"], "onnx is written in float32, not in int8"),
        (["--out", "m.onnx", "--preprocess", "resize:0x4"], "preprocessing 'resize:0x4': choose"),
        (["--out", "m.onnx", "--tolerance", "2"], "--tolerance 2.0: give a number from 0 to 1"),
        (["--out", "m.onnx", "--batch", "-1"], "--batch -1: give 0 or more"),
        (["--out", "m.stablehlo", "--platforms", "gpu"], "unknown platform 'gpu'"),
        (["--out", "m.stablehlo", "--platforms", "tpu"], "could not be run here, on cpu: add cpu"),
        (["--out", "m.tflite", "--channels-first"], "tflite takes images with the channels last"),
        (["--out", "m.tflite", "--precision", "int8"], "say what it was trained on"),
        (["--out", "."], "is a folder: name a file in it"),
        (["--out", "m.onnx", "--run", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    given = [] if "--run" in flags else ["--run", run]
    code, text = called(capsys, *given, *flags)
    assert code == 2 and message in text
    assert text.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["saved_model", "web"])
def test_a_folder_of_others_is_not_written_over(run, tmp_path, capsys, monkeypatch, kind):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "precious.txt").write_text("x")
    (tmp_path / "note.txt").write_text("x")
    monkeypatch.chdir(thesis)
    before = sorted(path.name for path in run.iterdir())
    for out, words in (
        (thesis, "holds other files"),
        (run, "holds other files"),
        (tmp_path / "note", "holds other files"),
        (".", "give the new folder's name"),
        ("..", "give the new folder's name"),
    ):
        # What fails its check would be put there.
        (tmp_path / "note.rejected").mkdir(exist_ok=True)
        (tmp_path / "note.rejected" / "mine").touch()
        code, text = called(capsys, "--run", run, "--format", kind, "--check", 0, "--out", out)
        assert code == 2 and words in text, (out, text)
    assert sorted(path.name for path in run.iterdir()) == before
    assert (thesis / "precious.txt").read_text() == "x"


def test_missing_packages_are_named_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    code, text = called(capsys, "--run", run, "--out", tmp_path / "model.onnx")
    assert code == 2
    assert "to run onnx the package onnxruntime is needed (--check 0 does without)" in text
    code, text = called(capsys, "--run", run, "--out", tmp_path / "model.onnx", "--check", "0")
    assert code == 2
    assert "to write onnx the package onnx is needed: pip install 'cnnjax[export]'" in text


def test_resizing_in_the_file_is_pillows():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    made = preprocessing.make("resize:50x70", lambda x: x.astype("float32"), (24, 90, 3))
    assert made.signature.shape == (50, 70, 3) and made.signature.dtype == "uint8"
    said = preprocessing.metadata({"model": "m", "class_names": ["a"]}, made)
    assert said["input_shape"] == ["batch", 50, 70, 3] and said["input_dtype"] == "uint8"
    said = preprocessing.with_channels_first(said)
    assert said["input_shape"] == ["batch", 3, 50, 70]
    assert said["input"].startswith("uint8 [batch, channels, height, width], RGB")
    found = np.asarray(made.change(image[None]))[0]
    pillow = np.asarray(Image.fromarray(image).resize((90, 24), Image.Resampling.BILINEAR))
    assert np.abs(found - pillow.astype(float)).max() <= 1


def test_a_comparison_knows_bad_files():
    logits = np.eye(4, dtype=np.float32)
    answer = lambda change: lambda images: logits[: len(images)] + change  # noqa: E731
    common = {"path": Path(__file__), "batches": (), "labels": np.arange(4)}
    same = comparison.compare(
        answer(0), logits, logits, limits=comparison.limits_for("float32"), **common
    )
    assert same.good and same.accuracy == (1.0, 1.0) and same.absolute == 0
    shifted = 3 * np.roll(np.eye(4, dtype=np.float32), 1, axis=1)[:1] * np.eye(4)[:, :1]
    for change in (1e-3, np.nan):
        limits = comparison.limits_for("float32")
        assert not comparison.compare(answer(change), logits, logits, limits=limits, **common).good
    # A quantized file may have other logits, but one answer in four is too many.
    int8 = comparison.limits_for("int8")
    assert comparison.compare(answer(0.1), logits, logits, limits=int8, **common).good
    found = comparison.compare(answer(shifted), logits, logits, limits=int8, **common)
    assert found.agreement == 0.75 and not found.good and found.accuracy == (1.0, 0.75)


@pytest.mark.slow
def test_a_trained_run_in_every_format(trained, tmp_path, capsys):
    pytest.importorskip("flatbuffers")
    pytest.importorskip("ai_edge_litert")
    for name, *flags in (
        ("model.onnx", "--channels-first"),
        ("model.onnx", "--preprocess", "none", "--batch", "4", "--check", "9"),
        ("model.onnx", "--preprocess", "resize:20x16"),
        ("model.stablehlo", "--platforms", "cpu"),
        ("saved", "--format", "saved_model"),
        ("model.tflite", "--precision", "float16", "--batch", "0"),
        # So little trained that many answers are close.
        ("model.tflite", "--precision", "int8", "--agreement", "0.9"),
    ):
        out = tmp_path / name
        code, text = called(capsys, "--run", trained, "--out", out, *flags)
        assert not code, (name, flags, text)
        assert f"written   {out}" in text and "accuracy" in text
        if "resize" not in str(flags):
            ours, theirs = (
                float(part.split("%")[0].split()[-1])
                for part in text.split("accuracy")[1].split(",")[:2]
            )
            assert ours > 50 and abs(ours - theirs) <= 2, text
    assert not [path for path in tmp_path.iterdir() if "unchecked" in path.name]


@pytest.mark.slow
def test_the_file_for_a_small_computer_needs_nothing_else(trained, tmp_path, capsys):
    pytest.importorskip("ai_edge_litert")
    out = tmp_path / "model.tflite"
    assert not called(capsys, "--run", trained, "--out", out, "--check", "0")[0]
    digits = cnnjax.data.load("digits").test
    for number in range(3):
        Image.fromarray(digits.image[number, :, :, 0]).save(tmp_path / f"{number}.png")
    script = ROOT / "scripts" / "classify_lite.py"
    alone = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(sorted(sys.modules.keys() & {'jax', 'tensorflow', 'cnnjax', 'flax'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", alone, str(script), str(out)]
        + [str(tmp_path / f"{number}.png") for number in range(3)]
        + ["--time", "5"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    *answers, timed, loaded = done.stdout.splitlines()
    assert loaded == "[]" and "ms a call of one image with 1 threads" in timed
    network = load.load_trained(trained)
    stored = np.stack([network.prepare(image) for image in digits.image[:3]])
    logits = network.model.apply(network.variables, network.normalize(stored), train=False)
    likeliest = [line.partition(": ")[2].split()[0] for line in answers]
    assert likeliest == [str(label) for label in np.asarray(logits).argmax(-1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("lora:2", "LoRA      merged"),
        pytest.param("adapter:4", "adapters  stay", marks=pytest.mark.exhaustive),
    ],
)
def test_lora_is_merged_and_adapters_stay(trained, tmp_path, capsys, method, said):
    from experiments import finetune

    directory = tmp_path / method.partition(":")[0]
    argv = ["--base", str(trained), "--dataset", "digits", "--image-size", "16"]
    argv += ["--method", method, "--epochs", "1", "--devices", "1", "--run-dir", str(directory)]
    with pytest.raises(SystemExit) as stop:
        settings.launch(finetune.Config, finetune.main, argv)
    assert not stop.value.code
    code, text = called(capsys, "--run", directory, "--out", tmp_path / "tuned.onnx")
    assert not code and said in text, text


def test_calibration_of_another_shape_is_refused(tmp_path):
    from cnnjax.export import lite

    model = models.create("lenet5", num_classes=10)
    arguments = (export.forward_of(model), {}, export.Signature((28, 28, 1)))
    for images, message in (
        (None, "int8 needs images to calibrate with"),
        (np.zeros((3, 32, 32, 3), np.float32), "the calibration images are 32x32x3, and the netw"),
        (np.zeros((3, 28, 28, 1), np.uint8), "the calibration images are uint8, and the file"),
    ):
        with pytest.raises(UserError, match=message):
            lite.write(tmp_path / "m.tflite", *arguments, precision="int8", calibration=images)


@pytest.fixture(scope="module")
def table():
    """scripts/export_table.py."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "scripts" / "export_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Depthwise and gated, shuffled, joined, normalized by layer, with transposed convolutions.
QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "convnext_v2_atto", "unet")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.exhaustive)
        for name in models.list_models()
    ],
)
def test_every_network_answers_alike_in_every_format(table, name, tmp_path, request):
    is_quick = request.node.get_closest_marker("slow") is not None
    found = table.errors_of(name, ("onnx",) if is_quick else table.FORMATS, tmp_path)
    assert all(error <= table.TOLERANCE for error in found.values()), found


@pytest.mark.slow
def test_the_table_of_all_networks(table, tmp_path):
    out = tmp_path / "table.md"
    names = ["lenet5", "cifar_resnet20"]
    assert table.main(["--networks", *names, "--formats", "onnx", "--out", str(out)]) == 0
    assert [line.split("`")[1] for line in out.read_text().splitlines()[2:]] == names
    with pytest.raises(UserError, match="no network is called resmet"):
        table.main(["--networks", "resmet"])
