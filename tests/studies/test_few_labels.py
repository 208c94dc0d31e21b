"""The studies with few labels from their command lines: what they refuse, leave and continue."""

import json

import numpy as np
import pytest

from cnnjax import data
from cnnjax.data.dataset import Dataset
from cnnjax.run import cli
from cnnjax.studies import few_labels
from experiments import fashion_finetune, mnist_finetune
from tests.tiny import random_arrays


def run(module, *argv):
    """Runs a study's command line in this process; returns its exit code."""
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit) as stop:
        cli.run(
            module.Config,
            lambda config: few_labels.main(config, module.TASKS, name),
            [str(argument) for argument in argv],
        )
    return stop.value.code


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "lorra:2"], "unknown fine-tuning method 'lorra:2': did you mean lora"),
        (["--methods", "last:9"], "'last:9': SimpleCNN has 4 stages"),
        (["--seeds", "0"], "--seeds 0: give at least 1"),
        (["--rates", "full=fast"], "--rates full=fast: write it as METHOD=RATE"),
        (["--task", "digits", "--labels", "500"], "500 labels per class asked for, but class"),
        (["--sweep-rates", "0"], "--sweep-rates 0: give rates above 0"),
        (["--methods", "lora(2, alpha=0)"], "'lora(2, alpha=0)': alpha=0: give a number above 0"),
        (["--task", "letters"], "letters"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(argv, words, tmp_path, capsys):
    assert run(mnist_finetune, *argv, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("task", ["there", "back"])
def test_without_fashion_mnist_it_says_how_to_get_it(task, tmp_path, capsys):
    flags = ["--task", task, "--data-dir", tmp_path, "--run-dir", tmp_path / "run"]
    assert run(fashion_finetune, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fashion_mnist" in error
    assert "is not prepared" in error
    assert not list(tmp_path.rglob("*.json"))


def test_a_smoke_run_takes_rates_of_methods_that_it_leaves_out():
    given = mnist_finetune.Config(smoke=True, rates=("full=0.001", "head=0.003"))
    config = few_labels._checked(given, mnist_finetune.TASKS)
    assert "full" in given.methods and "full" not in config.methods
    assert config.rates == given.rates


def test_half_of_a_small_target_is_for_testing():
    target = few_labels._target(mnist_finetune.Config(), mnist_finetune.TASKS["digits"], (28, 28))
    sizes = [len(split.label) for split in (target.train, target.validation, target.test)]
    assert (sum(sizes), sizes[2]) == (1797, 898)
    assert target.image_shape == (28, 28, 1)
    # 50 labels of each class are there.
    assert np.bincount(target.train.label).min() >= 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    # CI makes a smoke run of both.
    [mnist_finetune, pytest.param(fashion_finetune, marks=pytest.mark.exhaustive)],
)
def test_a_study_leaves_tables_and_a_figure_and_continues(module, tmp_path, monkeypatch, capsys):
    def made(name, **options):
        """Stands for both datasets: patterns to learn, others in each."""
        train, validation, test = (
            random_arrays(size, num_classes=5, seed=len(name)) for size in (256, 64, 64)
        )
        return Dataset(name, tuple("abcde"), train, validation, test, mean=(0.5,), std=(0.3,))

    if module is mnist_finetune:  # The other makes images by itself where it finds none.
        monkeypatch.setattr(data, "load", made, raising=False)
    flags = ["--smoke", "--run-dir", tmp_path, "--methods", "scratch", "head", "--labels", 1, 2]
    flags += ["--model-arguments", "widths=(4,)", "norm=batch"]
    assert run(module, *flags) == 0
    assert "see " in capsys.readouterr().out
    first = json.loads((tmp_path / "summary.json").read_text())
    assert len(first["trials"]) == 8
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    table = (tmp_path / "table.md").read_text()
    assert table.count("| `head` |") == 3
    head = [trial for trial in first["trials"] if trial["method"] == "head"]
    # Nothing below the head was trained, running statistics included.
    assert {trial["source_accuracy"] for trial in head} == {first["source_accuracy_before"]}

    # Half of it is lost: only that half is made again, and is what it was but for the clock, which
    # is in the metadata of checkpoints too.
    clock = {"step_secs": 0, "checkpoint_bytes": 0}
    half = first | {"trials": first["trials"][:4]}
    (tmp_path / "summary.json").write_text(json.dumps(half))
    assert run(module, *flags) == 0
    second = json.loads((tmp_path / "summary.json").read_text())
    assert second["trials"][:4] == first["trials"][:4]
    for one, other in zip(second["trials"], first["trials"], strict=True):
        assert one | clock == other | clock

    # Another call adds its rows; trials of another learning rate are no seeds of theirs.
    other = [*flags[:3], "--methods", "bitfit", "--labels", 2, *flags[-3:]]
    assert run(module, *other) == 0
    accuracy = (tmp_path / "table.md").read_text().partition("\n\n")[2].partition("\n\n")[0]
    assert [row.split("|")[1].strip() for row in accuracy.splitlines()[2:]] == [
        "`bitfit`",
        "`scratch`",
        "`head`",
    ]
    assert run(module, *other, "--rates", "bitfit=0.5") == 0
    table = (tmp_path / "table.md").read_text()
    assert "over 2 seeds" in table and "| `bitfit` | 0.5 |" in table

    assert run(module, *flags, "--batch-size", "3") == 2
    assert "holds results with batch_size 25, not 3" in capsys.readouterr().err
    assert run(module, *flags, "--sweep") == 0
    assert "best         --rates scratch=" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "sweep.json").read_text())["trials"]) == 2 * 7 * 2
