"""What becomes of trials whose workers end, are killed, or are lost with their machines."""

import dataclasses
import json
from pathlib import Path
from queue import Empty

import pytest

from cnnjax.errors import UserError
from cnnjax.search import plan, trials
from cnnjax.search.costs import FILE
from cnnjax.search.space import read_space
from cnnjax.search.workers import LOST

optuna = pytest.importorskip("optuna")


@dataclasses.dataclass(frozen=True)
class Config:
    """One setting."""

    learning_rate: float = 1e-3


SETTINGS = dataclasses.asdict(Config())


class Worker:
    """Trains nothing: `endings` says how its trials end, the last of them for ever."""

    def __init__(self, number, endings, asked):
        self.number, self.endings, self.asked = number, endings, asked
        self.request = None

    def is_ready(self):
        return True

    def run(self, request):
        self.request = request
        self.asked.append(Path(request.directory).name)

    def answer(self):
        if self.request is None:
            raise Empty
        ending = self.endings.pop(0) if len(self.endings) > 1 else self.endings[0]
        directory = Path(self.request.directory)
        directory.mkdir(parents=True, exist_ok=True)
        if ending in (0, "lost when done"):
            records = [{"kind": "validation", "step": n, "accuracy": n / 10} for n in (1, 2, 3)]
            (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
            (directory / "summary.json").write_text(json.dumps({"parameters": 100}))
            if self.request.costs:
                (directory / FILE).write_text(json.dumps({"macs": 2000}))
        self.request = None
        return LOST if ending == "lost when done" else ending

    def stop_trial(self):
        pass

    def end(self):
        pass


ACCURACY = plan.Objective("accuracy", False)


def searched(tmp_path, endings, *, budget=3, objectives=(ACCURACY,)):
    """Runs a search of one worker with these endings; returns its study and what was asked."""
    space = read_space(["learning_rate=log(1e-4, 1)"], Config, SETTINGS, ())
    search = plan.Search(tmp_path, "experiments.none", (), SETTINGS, space, objectives)
    study = optuna.create_study(directions=[each.direction for each in objectives])
    asked = []
    ended = trials.run(
        search,
        study,
        budget=budget,
        workers=1,
        start=lambda number: Worker(number, endings, asked),
    )
    assert ended
    return study, asked


@pytest.fixture(autouse=True)
def poll_quickly(monkeypatch):
    monkeypatch.setattr(trials, "POLL_SECS", 0.0)


def states(study):
    return [each.state.name for each in study.trials]


def test_a_trial_of_a_lost_machine_goes_on(tmp_path):
    study, asked = searched(tmp_path, [0, LOST, LOST, 0])
    assert states(study) == ["COMPLETE"] * 3 and asked == ["0000", "0001", "0001", "0001", "0002"]
    assert study.trials[1].user_attrs["restarts"] == 2
    assert [each.value for each in study.trials] == [0.3] * 3
    assert study.trials[1].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}


def test_the_last_trial_goes_on_after_the_budget_is_spent(tmp_path):
    study, asked = searched(tmp_path, [0, 0, LOST, 0])
    assert states(study) == ["COMPLETE"] * 3 and asked[-2:] == ["0002", "0002"]


def test_what_was_done_when_the_machine_was_lost_counts(tmp_path):
    study, asked = searched(tmp_path, ["lost when done", 0])
    assert states(study) == ["COMPLETE"] * 3 and asked == ["0000", "0001", "0002"]


def test_a_trial_that_always_loses_its_machine_fails(tmp_path):
    study, asked = searched(tmp_path, [0, *[LOST] * trials.MOST_RESTARTS, 0])
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert asked.count("0001") == trials.MOST_RESTARTS
    assert study.trials[1].user_attrs["failed"] == "the machine that it ran on was lost 5 times"


def test_a_killed_process_fails_its_trial_only(tmp_path):
    study, _ = searched(tmp_path, [0, None, 0])
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[1].user_attrs["failed"] == "its process was killed"
    with pytest.raises(UserError, match="trial 0 failed, and none has worked: its process was"):
        searched(tmp_path / "other", [None])


def test_costs_are_objectives(tmp_path):
    objectives = tuple(plan.Objective(name, name != "accuracy") for name in ("accuracy", "macs"))
    study, _ = searched(tmp_path, [0], objectives=(*objectives, plan.Objective("parameters", True)))
    assert [each.values for each in study.trials] == [[0.3, 2000.0, 100.0]] * 3


def test_what_is_tested_is_the_first_score():
    from cnnjax.commands.finish_search import score_name

    objectives = [{"name": "macs"}, {"name": "loss"}, {"name": "accuracy"}]
    assert score_name({"objectives": objectives}) == "loss"
    with pytest.raises(UserError, match="no objective of this search is tested: macs are costs"):
        score_name({"objectives": objectives[:1]})
