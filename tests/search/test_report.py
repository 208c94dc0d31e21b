"""The page of a search, of studies whose trials are known."""

import json

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from cnnjax.search import figures, forecasts, report  # noqa: E402
from cnnjax.search import study as studies  # noqa: E402
from cnnjax.search.plan import Objective, Search  # noqa: E402
from cnnjax.search.space import Choice, Dimension, Range, Space  # noqa: E402

SPACE = Space(
    (
        Dimension("learning_rate", Range(1e-4, 1e-1, is_log=True)),
        Dimension("optimizer", Choice(("adam", "sgd"))),
        Dimension("width", Range(8, 64, is_whole=True)),
    )
)


def searched(tmp_path, objectives=("accuracy",), trials=30, epochs=12, **settings):
    """A search of whose settings the learning rate matters most, and its study."""
    found = tuple(Objective(name, name != "accuracy") for name in objectives)
    search = Search(tmp_path, "experiments.made", (), {"epochs": epochs, **settings}, SPACE, found)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler, directions=[each.direction for each in found])
    generator = np.random.default_rng(0)
    for number in range(trials):
        trial = study.ask()
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        sgd = trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd"
        width = trial.suggest_int("width", 8, 64)
        end = 0.98 - 0.05 * (np.log10(rate) + 2.5) ** 2 - 0.01 * sgd
        curve = end - 0.3 * np.arange(1.0, epochs + 1) ** -1.2
        curve = curve + 0.002 * generator.standard_normal(epochs)
        is_pruned = len(found) == 1 and number > 5 and end < 0.95
        for epoch, value in enumerate(curve[: 6 if is_pruned else epochs], 1):
            if len(found) == 1:
                trial.report(value, epoch)
        if is_pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, [curve[-1], 0.1 + 0.01 * width][: len(found)])
    return search, study


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [("accuracy",), ("accuracy", "latency_ms")])
def test_the_page_has_all_figures(objectives, tmp_path):
    search, study = searched(tmp_path, objectives)
    page = report.write_report(search, study)
    names = {path.stem for path in page.parent.glob("*.png")}
    if len(objectives) == 1:
        assert names == {"history", "curves", "parallel", "slices", "importances"}
    else:
        kinds = ("parallel", "slices", "importances")
        assert names == {"pareto"} | {f"{kind}_{name}" for kind in kinds for name in objectives}
    text = page.read_text()
    assert text.count("<img ") == len(names) and text.count("<tr") == 31
    best = json.loads(report.write_best(search, study).read_text())
    values = [each.values for each in study.trials if each.values]
    if len(objectives) == 1:
        assert best[0]["values"]["accuracy"] == max(value[0] for value in values)
    else:
        # No trial is better in both than one of the front.
        for each in best:
            own = each["values"]
            assert not any(v[0] > own["accuracy"] and v[1] < own["latency_ms"] for v in values)


@pytest.mark.parametrize(("trials", "told"), [(9, False), (10, True)])
def test_of_few_trials_no_importance_is_told(trials, told, tmp_path):
    _, study = searched(tmp_path, ("accuracy", "latency_ms"), trials=trials)
    assert bool(figures.importances(study)) == told


def test_the_page_says_what_is_lost_and_what_broke_a_constraint(tmp_path):
    search, study = searched(tmp_path, trials=3, epochs=2)
    for number, files in enumerate((("summary.json", "metrics.jsonl"), ("metrics.jsonl",), ())):
        search.trial_directory(number).mkdir(parents=True)
        for name in files:
            path = search.trial_directory(number) / name
            path.write_text('{"kind": "validation", "step": 1}\n')
    assert report.lost(search, study) == [
        "Runs: those of trials 1, 2 are gone or damaged; their scores are in the study."
    ]
    studies.skip(study, study.ask(), studies.BROKEN)
    assert "3 complete (1 draws broke --where;" in report.summary_line(search, study)
    # Without reports on the way, the run says how many epochs it had.
    assert report._cells(search, study.trials[0], [])[3] == "2"
    silent = optuna.trial.create_trial(value=0.5)
    assert report._cells(search, silent, [])[3] == ""
    silent.number = 0
    assert report._cells(search, silent, [])[3] == "1"


def test_importance_is_of_the_setting_that_matters(tmp_path):
    _, study = searched(tmp_path, ("accuracy", "latency_ms"))
    first, second = figures.importances(study, 0), figures.importances(study, 1)
    assert max(first, key=first.get) == "learning_rate" and first["learning_rate"] > 0.6
    assert max(second, key=second.get) == "width" and second["width"] > 0.8
    assert not figures.importances(optuna.create_study())


def test_curves_say_whether_pruning_lost_anything(tmp_path):
    search, study = searched(tmp_path)
    said = forecasts.sentences(search, study)
    assert "from epoch 6, the 95% interval held the value of epoch 12 in" in said[0]
    assert "not to be trusted" not in said[0]
    pruned = [each for each in study.trials if each.state.name == "PRUNED"]
    assert said[1] == (
        f"Curves: none of {len(pruned)} trials that were pruned after 5 epochs or more had a "
        "chance of 5% to pass the best."
    )
    # One that was as good as the best when it was pruned.
    trial = study.ask()
    for each in SPACE.dimensions[:1]:
        trial.suggest_float(each.name, 1e-4, 1e-1, log=True)
    curve = sorted(study.best_trial.intermediate_values.items())
    for epoch, value in curve[:7]:
        trial.report(value + 0.01, epoch)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert f"trial {trial.number}, pruned after epoch 7" in forecasts.sentences(search, study)[1]


def test_longer_training_is_forecast_for_constant_learning_rates_only(tmp_path):
    search, study = searched(tmp_path, schedule="constant")
    last = forecasts.sentences(search, study)[-1]
    assert last.startswith(f"Curves: trial {study.best_trial.number} would be at ")
    assert "after 24 epochs; its curve" in last
    assert not forecasts.sentences(*searched(tmp_path, epochs=3))
