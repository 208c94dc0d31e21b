"""Two runs on the same examples, and two settings over the same seeds."""

import json

import numpy as np
import pytest
from scipy import stats

from cnnjax import commands
from cnnjax.errors import UserError
from cnnjax.studies import compared, tables


def write_run(directory, *, seed=0, summary=None, **settings):
    """A finished run as far as its records go."""
    directory.mkdir()
    saved = {"dataset": "digits", "seed": seed, **settings}
    config = {"experiment": "experiments.digits_mlp", "settings": saved}
    (directory / "config.json").write_text(json.dumps(config))
    card = {"task": settings.get("task", "classification"), "image_shape": [8, 8, 1]}
    card |= {"class_names": list("0123456789"), "model": "mlp"}
    (directory / "model.json").write_text(json.dumps(card))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return str(directory)


def answers(label, chosen, probability):
    """A network of three classes that gives its choice this probability, the rest to the others."""
    log_probabilities = np.full((len(label), 3), np.log((1 - probability) / 2))
    log_probabilities[np.arange(len(label)), chosen] = np.log(probability)
    return compared.Answers(np.asarray(label), log_probabilities)


def test_a_comparison_is_that_of_the_same_examples():
    label = np.arange(30) % 3
    first, second = label.copy(), label.copy()
    first[:10] = (label[:10] + 1) % 3
    second[10:12] = (label[10:12] + 1) % 3
    found = compared.compare(answers(label, first, 0.8), answers(label, second, 0.8))
    assert found["accuracy"]["first"] == pytest.approx(20 / 30)
    assert found["accuracy"]["difference"] == pytest.approx(8 / 30)
    assert (found["only_first_right"], found["only_second_right"]) == (2, 10)
    assert found["p_value"] == pytest.approx(stats.binomtest(2, 12).pvalue)
    low, high = found["accuracy"]["interval"]
    assert low < 8 / 30 < high and low > 0
    # The loss of an example is -log 0.8 where it is right, and -log 0.1 elsewhere.
    expected = -(20 * np.log(0.8) + 10 * np.log(0.1)) / 30
    assert found["loss"]["first"] == pytest.approx(expected)


def test_pairs_are_runs_of_the_same_seed(tmp_path):
    first = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in (2, 0, 1)]
    second = [write_run(tmp_path / f"b{seed}", seed=seed) for seed in (1, 2, 0)]
    pairs = compared.pairs_by_seed(first, second)
    assert [(one[-2:], other[-2:]) for one, other in pairs] == [
        ("a0", "b0"),
        ("a1", "b1"),
        ("a2", "b2"),
    ]
    # Two networks are a pair whatever their seeds.
    assert compared.pairs_by_seed(first[:1], second[:1]) == [(first[0], second[0])]
    with pytest.raises(UserError, match=r"seed 1 .* has no partner among --against"):
        compared.pairs_by_seed(first, second[1:])
    with pytest.raises(UserError, match="both have seed 1: give one run for each seed"):
        compared.pairs_by_seed(first, [*second, write_run(tmp_path / "c", seed=1)])
    with pytest.raises(UserError, match="a2 stands on both sides"):
        compared.pairs_by_seed(first, first)


def test_recorded_scores_of_any_task_are_paired(tmp_path, capsys):
    scores = {"a": (0.5, 0.6, 0.7), "b": (0.55, 0.66, 0.77)}
    runs = {
        name: [
            write_run(
                tmp_path / f"{name}{seed}",
                seed=seed,
                task="segmentation",
                summary={"monitor": "mean_iou", "best_validation_mean_iou": value},
            )
            for seed, value in enumerate(values)
        ]
        for name, values in scores.items()
    }
    with pytest.raises(SystemExit) as stop:
        commands.main(["compare", "--run", *runs["a"], "--against", *runs["b"]])
    assert not stop.value.code
    assert "paired over 3 seeds: +0.0600" in capsys.readouterr().out
    found = json.loads(
        (tmp_path / "a0" / "comparison-validation-b0" / "comparison.json").read_text()
    )
    expected = stats.ttest_rel(scores["b"], scores["a"]).pvalue
    assert found["settings"]["p_value"] == pytest.approx(expected)
    assert found["scores"] == [[0.5, 0.55], [0.6, 0.66], [0.7, 0.77]]
    text = tables.paired_text([0.5, 0.6], [0.51, 0.63], "B minus A", "accuracy")
    assert text.startswith("B minus A, paired over 2 seeds: +2.000 ± ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "0 runs to compare: give two, or two sets"),
        (("a",), "1 runs to compare"),
        (("a", "b", "c"), "3 runs to compare"),
        (("a", "nosuch"), "nosuch is not a run directory"),
        (("a", "a"), "a stands on both sides"),
        (("a", "c/../a"), "a stands on both sides"),
        (("a", "c"), "a has no checkpoints: train it again, or leave it out"),
        (("c", "damaged"), "damaged is damaged: train it again"),
        (("a", "b", "--split", "tset"), "unknown --split 'tset': did you mean test"),
        (("a", "cifar"), "have different classes: compare runs of the same data"),
        (("a", "task"), "different tasks: classification, segmentation"),
        (("--run", "a", "b", "--against", "c"), "seed 1 (b) has no partner among --against"),
        (("--run", "a", "b", "--against", "c", "b2", "--out", "a/config.json"), "--out"),
        (("task", "task2"), "is a run of the task segmentation, whose examples are not right"),
        (
            ("--run", "task", "task3", "--against", "task2", "task4"),
            "task is not finished: there is no task/summary.json",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_first(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, data_seed=0)
    write_run(tmp_path / "b2", seed=1, data_seed=0)
    write_run(tmp_path / "c")
    for name, seed in (("task", 0), ("task2", 0), ("task3", 1), ("task4", 1)):
        write_run(tmp_path / name, seed=seed, task="segmentation")
    write_run(tmp_path / "damaged")
    (tmp_path / "damaged" / "summary.json").write_text("{")
    (tmp_path / "c" / "checkpoints" / "00000001").mkdir(parents=True)
    (tmp_path / "c" / "checkpoints" / "00000001" / "manifest.json").write_text("{}")
    other = tmp_path / write_run(tmp_path / "cifar")
    card = json.loads((other / "model.json").read_text())
    (other / "model.json").write_text(json.dumps(card | {"class_names": ["cat", "dog"]}))
    with pytest.raises(SystemExit) as stop:
        commands.main(["compare", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_other_held_out_images_are_refused(tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    with pytest.raises(UserError, match="hold out different validation images"):
        compared.check_pair(*runs, compared.Place("validation"))
    # The test set of scikit-learn's digits is the same for all seeds.
    compared.check_pair(*runs, compared.Place("test"))
    alike = write_run(tmp_path / "c", seed=1, data_seed=0)
    compared.check_pair(runs[0], alike, compared.Place("validation"))
    whole = [write_run(tmp_path / name, validation=0, seed=s) for name, s in (("d", 0), ("e", 1))]
    with pytest.raises(UserError, match=r"d has no validation images: give --split test"):
        compared.check_pair(*whole, compared.Place("validation"))


@pytest.mark.slow
def test_two_trained_networks(tmp_path, capsys, monkeypatch):
    from cnnjax.run import settings
    from experiments import digits_mlp

    for name, rate in (("slow", "1e-5"), ("fast", "1e-2")):
        argv = ["--epochs", "2", "--learning-rate", rate, "--devices", "1"]
        with pytest.raises(SystemExit):
            settings.launch(
                digits_mlp.Config, digits_mlp.main, [*argv, "--run-dir", str(tmp_path / name)]
            )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        commands.main(["compare", str(tmp_path / "slow"), str(tmp_path / "fast")])
    out = tmp_path / "slow" / "comparison-validation-fast"
    found = json.loads((out / "comparison.json").read_text())["networks"]
    assert "the second network is better on such images" in capsys.readouterr().out
    assert found["examples"] == 162 and found["accuracy"]["difference"] > 0.2
    summary = json.loads((tmp_path / "fast" / "summary.json").read_text())
    assert found["accuracy"]["second"] == pytest.approx(summary["best_validation_accuracy"])
    assert (out / "only_second_right.png").stat().st_size > 5000
