"""A figure that fails, for whatever reason, costs no score, no summary and no exit code."""

import json
import warnings

import numpy as np
import pytest

from cnnjax.data.dataset import Arrays, Dataset
from experiments import classify
from tests.tiny import random_arrays

NAMES = tuple(f"${number}_{{" for number in range(10))


def separable(size):
    """Images that a network tells apart without a mistake: each class is one shade."""
    label = np.arange(size, dtype=np.int32) % 2
    return Arrays((label[:, None, None, None] * np.full((1, 28, 28, 1), 255)).astype("u1"), label)


def train(monkeypatch, run, dataset):
    monkeypatch.setattr("cnnjax.data.load", lambda *a, **k: dataset, raising=False)
    settings = {"model": "lenet5", "epochs": 2, "batch_size": 32, "devices": 1}
    return classify.main(classify.Config(run_dir=str(run), **settings))


@pytest.mark.slow
def test_a_run_without_figures_is_finished(tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RecursionError("no\nend")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    train_, validation, test = (random_arrays(size) for size in (128, 32, 32))
    dataset = Dataset("made", NAMES, train_, validation, test, mean=(0.5,), std=(0.3,))
    assert train(monkeypatch, tmp_path / "run", dataset) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 7 and all("(RecursionError: no end)" in line for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["test_accuracy"] <= 1
    assert (tmp_path / "run" / "summary.md").exists()
    assert not list((tmp_path / "run" / "figures").glob("*"))


@pytest.mark.slow
def test_a_perfect_run_draws_its_figures_without_a_warning(tmp_path, monkeypatch, capsys):
    parts = [separable(size) for size in (256, 32, 32)]
    dataset = Dataset("shades", ("$x^$", "_b"), *parts, mean=(0.5,), std=(0.3,))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        assert train(monkeypatch, tmp_path / "run", dataset) == 0
    assert "warning" not in capsys.readouterr().err.lower()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] == 1.0
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 7


@pytest.mark.parametrize("place", ["a file", "no metrics"])
def test_a_folder_of_figures_that_cannot_be(tmp_path, capsys, place):
    from cnnjax.run import report

    if place == "a file":
        (tmp_path / "figures").write_text("")
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    drawn = report.write_figures(
        tmp_path, {"kernel": np.ones((3, 3, 1, 4))}, {}, score="accuracy", steps_per_epoch=1
    )
    failed = 2 if place == "a file" else 1
    assert len(drawn) == 2 - failed
    assert capsys.readouterr().err.count("\n") == failed
