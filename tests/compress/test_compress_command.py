"""`cnnjax compress`: a run in, a run out that every command takes; mistakes in one line."""

import json

import numpy as np
import pytest

from cnnjax import commands
from cnnjax.run import load
from cnnjax.trees import named_leaves
from tests.tiny import random_arrays

SLOW = pytest.mark.slow


def call(capsys, *argv):
    """Returns exit code, output and errors of the program, called in this process."""
    with pytest.raises(SystemExit) as stop:
        commands.main([str(word) for word in argv])
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images of three classes, which a run can name as its dataset."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    data = random_arrays(240, num_classes=3, shape=(20, 20, 1))
    for number, (image, label) in enumerate(zip(data.image, data.label, strict=True)):
        place = root / str(label)
        place.mkdir(exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    from cnnjax.run import classifier

    out = tmp_path_factory.mktemp("runs") / "small"
    config = classifier.Config(
        model="lenet5",
        dataset=f"folder:{folder}",
        epochs=2,
        batch_size=16,
        learning_rate=3e-3,
        ema_decay=0.5,
        devices=1,
        run_dir=str(out),
    )
    assert classifier.train(config) == 0
    return out


@SLOW
def test_sparse_weights_are_read_bit_for_bit_by_every_command(run, folder, tmp_path, capsys):
    out = tmp_path / "sparse"
    code, printed, error = call(
        capsys, "compress", "--run", run, "--prune", "magnitude(sparsity=0.8)", "--out", out
    )
    assert code == 0, error
    assert "test         accuracy" in printed and "times less)" in printed
    (step,) = (out / "checkpoints").iterdir()
    assert (step / "params" / "packed.npz").stat().st_size < 60_000
    source, sparse = load.load_classifier(run), load.load_classifier(out)
    whole = np.concatenate([k.ravel() for k in _kernels(source)])
    threshold = np.sort(np.abs(whole))[int(0.8 * whole.size) - 1]
    for before, after in zip(_kernels(source), _kernels(sparse), strict=True):
        np.testing.assert_array_equal(after, np.where(np.abs(before) > threshold, before, 0))
    record = json.loads((out / "model.json").read_text())["compression"]
    assert record[-1]["prune"] == "magnitude(sparsity=0.8)"
    assert record[-1]["bytes"][1] < 0.5 * record[-1]["bytes"][0]
    image = next(folder.rglob("*.png"))
    for argv in (("predict", "--run", out, image), ("evaluate", "--run", out)):
        assert call(capsys, *argv)[0] == 0
    code, _, error = call(
        capsys, *("explain", "--run", out, image, "--methods", "gradient", "--check", 0)
    )
    assert code == 0, error


def _kernels(trained):
    leaves = named_leaves(trained.variables["params"])
    return [np.asarray(leaf) for path, leaf in leaves.items() if path.endswith("kernel")]


@SLOW
def test_a_narrow_run_is_fine_tuned_and_compressed_again(run, folder, tmp_path, capsys):
    out = tmp_path / "narrow"
    code, _, error = call(
        capsys, *("compress", "--run", run, "--prune", "channels(macs=0.6)", "--out", out)
    )
    assert code == 0, error
    card = json.loads((out / "model.json").read_text())
    changes = card["arguments"]["layer_changes"]
    narrow = load.load_classifier(out)
    assert narrow.variables["params"]["conv2"]["kernel"].shape[-1] == changes["conv2"]["features"]
    assert card["compression"][-1]["macs"][1] <= 0.6 * card["compression"][-1]["macs"][0]
    again = tmp_path / "again"
    argv = ("--low-rank", "energy=0.7", "--prune", "channels(macs=0.7, norm=taylor)")
    code, printed, error = call(capsys, "compress", "--run", out, *argv, "--out", again)
    assert code == 0, error
    assert "ranks" in printed
    assert len(json.loads((again / "model.json").read_text())["compression"]) == 2
    from experiments import finetune

    config = finetune.Config(
        base=str(again),
        dataset=f"folder:{folder}",
        epochs=1,
        batch_size=16,
        devices=1,
        run_dir=str(tmp_path / "tuned"),
    )
    assert finetune.main(config) == 0
    tuned = load.load_classifier(tmp_path / "tuned")
    assert tuned.card["arguments"]["layer_changes"]


@SLOW
def test_gradual_pruning_is_resumed_bit_for_bit(run, tmp_path, capsys):
    argv = ("compress", "--run", run, "--prune", "magnitude(sparsity=0.8)", "--epochs", 2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert call(capsys, *argv, "--devices", 1, "--out", whole)[0] == 0
    code, printed, error = call(
        capsys, *argv, "--devices", 1, "--out", stopped, "--stop-after-epochs", 1
    )
    assert code == 0 and "stopped as asked" in printed, error
    assert call(capsys, "compress", "--resume", stopped)[0] == 0
    one, other = load.load_classifier(whole), load.load_classifier(stopped)
    leaves = named_leaves(other.variables)
    for path, leaf in named_leaves(one.variables).items():
        np.testing.assert_array_equal(leaf, leaves[path])
    kernels = np.concatenate([k.ravel() for k in _kernels(one)])
    np.testing.assert_allclose(np.mean(kernels == 0), 0.8, atol=1e-3)
    code, printed, _ = call(capsys, "compress", "--resume", stopped)
    assert code == 0 and "is finished" in printed


@SLOW
def test_a_lottery_ticket_starts_from_initial_values(run, tmp_path, capsys):
    out = tmp_path / "ticket"
    code, _, error = call(
        capsys,
        *("compress", "--run", run, "--prune", "magnitude(sparsity=0.75)", "--epochs", 1),
        *("--rounds", 2, "--rewind", "init", "--devices", 1, "--out", out),
    )
    assert code == 0, error
    first, last = load.load_classifier(out / "rounds" / "1"), load.load_classifier(out)
    for trained, sparsity in ((first, 0.5), (last, 0.75)):
        kernels = np.concatenate([kernel.ravel() for kernel in _kernels(trained)])
        np.testing.assert_allclose(np.mean(kernels == 0), sparsity, atol=2e-3)
    for one, other in zip(_kernels(first), _kernels(last), strict=True):
        assert not other[one == 0].any()


MISTAKES = [
    (("--prune", "magnitude(sparsity=1.5)"), "give 0 or more, and less than 1"),
    (("--prune", "magnitude(sparsity=0.5, layers=conv9/kernel)"), "did you mean conv"),
    (("--prune", "channels(macs=0.5, layers=conv_1)"), "did you mean conv"),
    (("--prune", "channels(macs=0.0001)"), "stay: give more"),
    (("--prune", "channels(macs=0.5, multiple=0)"), "give 1 or more, such as 8"),
    (("--prune", "channels(macs=0.5, norm=batchnorm)"), "give norm=l2"),
    (("--prune", "blocks(count=2)"), "blocks can be removed"),
    (("--prune", "movement(sparsity=0.5)"), "give --epochs"),
    (("--prune", "pune(sparsity=0.5)"), "unknown pruning 'pune'"),
    (("--low-rank", "energy=2"), "above 0 and at most 1"),
    (("--low-rank", "rank=2"), "unknown argument of --low-rank 'rank'"),
    (("--prune", "magnitude(sparsity=0.5)", "--rewind", "init"), "give --epochs"),
    ((), "nothing to do"),
]


@SLOW
@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=[str(flags) for flags, _ in MISTAKES])
def test_mistakes_end_in_one_line_and_leave_nothing(flags, words, run, tmp_path, capsys):
    out = tmp_path / "out"
    code, _, error = call(capsys, "compress", "--run", run, "--out", out, *flags)
    assert code == 2 and words in error and error.count("\n") == 1
    assert not out.exists()


def test_no_run_no_directory_and_one_that_is_there(tmp_path, capsys):
    (tmp_path / "file").touch()
    prune = ("--prune", "magnitude(sparsity=0.5)")
    for argv, words in (
        (prune, "name a trained classifier with --run"),
        (("--run", "x", *prune), "name it with --out"),
        (("--run", "x", *prune, "--out", tmp_path), "nothing is written over"),
        (("--run", tmp_path / "x", *prune, "--out", tmp_path / "new"), "is not a run directory"),
        (("--resume", tmp_path, *prune), "give it alone"),
    ):
        code, _, error = call(capsys, "compress", *argv)
        assert code == 2 and words in error, error
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_task_is_refused(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"experiment": "x", "settings": {}}))
    (run / "model.json").write_text(json.dumps({"task": "segmentation", "model": "unet"}))
    code, _, error = call(
        capsys,
        *("compress", "--run", run, "--prune", "magnitude(sparsity=0.5)"),
        *("--out", tmp_path / "out"),
    )
    assert code == 2 and "this is for classifiers" in error
