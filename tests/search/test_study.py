"""Trials that count, through storages that several searches share."""

import dataclasses

import pytest

from cnnjax.errors import UserError
from cnnjax.search.space import read_space
from cnnjax.search.study import (
    MOST_REJECTED,
    ask,
    check_storage,
    counted,
    grid_of,
    open_study,
    skip,
)

optuna = pytest.importorskip("optuna")


@dataclasses.dataclass(frozen=True)
class Config:
    """Two settings."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3


SPACE = read_space(
    ["optimizer=choice(adam, sgd)", "learning_rate=log(1e-4, 1)"],
    Config,
    dataclasses.asdict(Config()),
)


def opened(path, what=None, **options):
    arguments = {
        "directions": ["maximize"],
        "sampler": optuna.samplers.RandomSampler(seed=0),
        "pruner": optuna.pruners.NopPruner(),
        "what": what or {"space": "this"},
    }
    return open_study("s", f"sqlite:///{path}", **{**arguments, **options})


def test_two_searches_share_a_budget(tmp_path):
    studies = [opened(tmp_path / "study.db") for _ in range(2)]
    found = []
    for turn in range(9):
        trial = ask(studies[turn % 2], SPACE, 5, lambda chosen: True)
        found += [] if trial is None else [trial.number]
    assert sorted(found) == list(range(5))
    assert ask(studies[0], SPACE, 6, lambda chosen: True).number == 5


def test_what_breaks_a_constraint_does_not_count(tmp_path, monkeypatch):
    study = opened(tmp_path / "study.db")
    trials = [ask(study, SPACE, 4, lambda chosen: chosen["optimizer"] == "sgd") for _ in range(5)]
    assert trials[-1] is None and all(each.params["optimizer"] == "sgd" for each in trials[:4])
    assert len(counted(study)) == 4 < len(study.trials)
    skip(study, trials[0], "no reason")
    assert len(counted(study)) == 3
    monkeypatch.setattr("cnnjax.search.study.MOST_REJECTED", 10)
    with pytest.raises(UserError, match="break --where"):
        ask(study, SPACE, 9, lambda chosen: False)


def test_a_grid_is_tried_once_by_all_searches_together(tmp_path):
    studies = [opened(tmp_path / "study.db") for _ in range(2)]
    combinations = grid_of(SPACE, 3, 0, lambda chosen: True)
    tried = []
    for turn in range(8):
        trial = ask(studies[turn % 2], SPACE, 100, lambda chosen: True, combinations)
        tried += [] if trial is None else [tuple(trial.params.items())]
    assert len(tried) == len(set(tried)) == len(combinations) == 6


def test_storages_that_cannot_be_used(tmp_path):
    opened(tmp_path / "study.db")
    with pytest.raises(UserError, match=r"the study s is of another search \(space\)"):
        opened(tmp_path / "study.db", what={"space": "that"})
    with pytest.raises(UserError, match="unable to open database file"):
        opened(tmp_path / "nosuch" / "study.db")
    (tmp_path / "text.db").write_text("no database at all, but text of some length " * 30)
    with pytest.raises(UserError, match=r"text\.db cannot be used"):
        opened(tmp_path / "text.db")
    with pytest.raises(UserError, match="no URL of a database"):
        open_study("s", "nonsense", directions=["maximize"], sampler=None, pruner=None, what={})
    with pytest.raises(UserError, match="other objectives"):
        opened(tmp_path / "study.db", directions=["maximize", "minimize"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "what is in memory cannot be resumed"),
        ("sqlite:///:memory:", "what is in memory cannot be resumed"),
        ("sqlite:////nosuch/folder/study.db", "there is no directory /nosuch/folder"),
        ("postgresql://me@host:port/db", "no URL of a database"),
    ],
)
def test_storages_that_are_refused(url, message):
    with pytest.raises(UserError, match=message):
        check_storage(url)


def test_a_damaged_study_says_so(tmp_path):
    opened(tmp_path / "study.db")
    content = (tmp_path / "study.db").read_bytes()
    (tmp_path / "study.db").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"malformed.*put a copy back that is whole"):
        opened(tmp_path / "study.db")


def test_where_the_sampler_finds_nothing_settings_are_drawn_evenly(tmp_path):
    study = opened(tmp_path / "study.db")
    allowed = {"optimizer": "sgd", "learning_rate": 0.123}
    trial = ask(study, SPACE, 1, lambda chosen: chosen == allowed, draw=lambda: allowed)
    assert trial.params == allowed and trial.number == MOST_REJECTED


def test_a_password_is_not_shown():
    with pytest.raises(UserError) as error:
        open_study(
            "s",
            "postgresql+nosuch://me:secret@host/db",
            directions=["maximize"],
            sampler=None,
            pruner=None,
            what={},
        )
    assert "secret" not in str(error.value) and "me@host" in str(error.value)
