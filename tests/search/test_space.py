"""What a search chooses: how it is written, checked against settings, and applied to them."""

import dataclasses
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.search.plan import as_flags
from cnnjax.search.space import applied, draw_allowed, read_space, suggest
from cnnjax.search.study import grid_of


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of every type that experiments have."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    batch_size: int = 64
    accumulate: int = 1
    stratify: bool = True
    augment: str = ""
    precision: Literal["float32", "bfloat16"] = "float32"
    model_arguments: tuple[str, ...] = ()
    seed: int = 0


SETTINGS = dataclasses.asdict(Config())


def read(*texts, where=(), **settings):
    return read_space(texts, Config, {**SETTINGS, **settings}, where)


def test_a_condition_decides_what_is_asked():
    space = read("momentum[optimizer=sgd]=uniform(0.5, 0.9)", "optimizer=choice(adam, sgd)")
    # The condition first, whatever the order in which they were given.
    assert [each.name for each in space.dimensions] == ["optimizer", "momentum"]
    values = {"optimizer": "sgd", "momentum": 0.7}
    assert suggest(space, lambda each: values[each.name]) == values
    values["optimizer"] = "adam"
    assert suggest(space, lambda each: values[each.name]) == {"optimizer": "adam"}


def test_settings_are_filled_in_words_and_braces():
    space = read(
        "angle=uniform(0, 20)",
        "model_arguments.activation=choice(relu, tanh)",
        augment="rotate:{angle},flip",
        model_arguments=("activation=relu", "pool=max"),
    )
    assert len(space.dimensions) == 2
    settings = {**SETTINGS, "augment": "rotate:{angle},flip", "model_arguments": ("pool=max",)}
    changed = applied(settings, {"angle": 7.5, "model_arguments.activation": "tanh"})
    assert changed["augment"] == "rotate:7.5,flip"
    assert changed["model_arguments"] == ("pool=max", "activation=tanh")
    assert as_flags("model_arguments", changed["model_arguments"]) == [
        "--model-arguments",
        "pool=max",
        "activation=tanh",
    ]
    assert as_flags("stratify", False) == ["--no-stratify"]


@given(batch=st.integers(1, 512), parts=st.integers(1, 8))
def test_constraints_are_what_they_say(batch, parts):
    space = read(
        "batch_size=int(1, 512)",
        "accumulate=int(1, 8)",
        where=["batch_size * accumulate <= 512 and not batch_size % accumulate"],
    )
    allowed = space.allows({**SETTINGS, "batch_size": batch, "accumulate": parts})
    assert allowed == (batch * parts <= 512 and batch % parts == 0)


def test_a_constraint_on_what_is_not_chosen_holds():
    space = read("optimizer=choice(adam, sgd)", where=["learning_rate < 1"])
    assert space.allows({"optimizer": "sgd"})


def test_a_grid_has_every_allowed_combination_once():
    space = read(
        "optimizer=choice(adam, sgd)",
        "momentum[optimizer=sgd]=uniform(0.5, 0.9, step=0.2)",
        "learning_rate=log(1e-4, 1e-2)",
        "batch_size=logint(16, 64)",
        where=["batch_size < 64"],
    )
    found = grid_of(space, 3, 0, lambda chosen: space.allows({**SETTINGS, **chosen}))
    # (adam + sgd of 3 momenta) x 3 rates x 2 of the 3 batch sizes 16, 32, 64.
    assert len(found) == 4 * 3 * 2
    assert len({tuple(sorted(each.items())) for each in found}) == len(found)
    rates = sorted({each["learning_rate"] for each in found})
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2])
    assert {each["batch_size"] for each in found} == {16, 32}
    assert grid_of(space, 3, 1, lambda chosen: True) != grid_of(space, 3, 2, lambda chosen: True)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["learing_rate=log(1e-4, 1)"], "unknown setting 'learing_rate': did you mean learning_"),
        (["learning_rate=lag(1e-4, 1)"], "unknown space 'lag': did you mean log"),
        (["learning_rate"], "write it as SETTING=DOMAIN"),
        (["learning_rate=log(0, 1)"], "0 has no logarithm"),
        (["learning_rate=log(1, 0.1)"], "from 1 to 0.1 there is nothing"),
        (["batch_size=uniform(16, 64)"], "it is a whole number: use int or logint"),
        (["optimizer=uniform(0, 1)", "angle=int(1, 2)"], "unknown setting 'angle'"),
        (["learning_rate=choice(a, b)"], "'a' is no float"),
        (["stratify=choice(1, 0)"], "1 is no bool"),
        (["precision=choice(float32, int4)"], "unknown precision 'int4'"),
        (["optimizer=choice(adam)"], "give two different values"),
        (["learning_rate=log(1e-4, 1)"] * 2, "twice"),
        (["seed=int(0, 9)"], "the search itself sets it"),
        (["model_arguments=choice(a, b)"], "choose it by model_arguments.WORD"),
        (["optimizer.beta=uniform(0, 1)"], "only settings of words"),
        (["momentum[optimizer=sgd]=uniform(0, 1)"], "hangs on optimizer, which is not chosen"),
        (
            ["momentum[optimizer=lamb]=uniform(0, 1)", "optimizer=choice(adam, sgd)"],
            "optimizer=lamb, which is no choice",
        ),
        ([], "--space is empty"),
        (["batch_size=choice(32, 64.0)"], "64.0 is no int"),
        (["batch_size=choice(a, b)"], "'a' is no int"),
        (["learning_rate=choice(0.1, 1e999)"], "values=\\(0.1, inf\\)|inf is no float"),
        (["momentum[]=uniform(0, 1)"], r"write the condition as \[OTHER=VALUE\]"),
        (["momentum[optimizer=]=uniform(0, 1)", "optimizer=choice(adam, sgd)"], "write the cond"),
        (["momentum[optimizer=x=y]=uniform(0, 1)", "optimizer=choice(adam, sgd)"], "write the co"),
    ],
)
def test_bad_spaces(texts, message):
    with pytest.raises(UserError, match=message):
        read(*texts)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("batch_size <", "cannot be read"),
        ("batch_sise < 3", "unknown setting 'batch_sise': did you mean batch_size"),
        ("__import__('os').system('ls')", "only comparisons|unknown setting"),
        ("batch_size.real < 3", "only comparisons"),
        (" + ".join(["batch_size"] * 3000) + " > 0", "characters: give at most"),
        ("\0", "cannot be read"),
    ],
)
def test_bad_constraints(where, message):
    with pytest.raises(UserError, match=message):
        read("batch_size=int(16, 64)", where=[where])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("batch_size < 9**9**9", "cannot be computed"),
        ("batch_size < 'a' * 10**9", "'a' is no number"),
        ("'%y' % batch_size == 1", "'%y' is no number"),
        ("-optimizer < 1", "'adam' is no number"),
        ("batch_size < 'a'", "cannot be computed"),
        ("1 / (batch_size - batch_size) > 1", "division by zero"),
        ("batch_size > 64", "nothing that --space draws keeps it"),
        ("accumulate > 1", "nothing that --space draws keeps it"),
    ],
)
def test_constraints_that_leave_nothing_or_cannot_be_computed(where, message):
    space = read("batch_size=int(16, 64)", where=[where])
    with pytest.raises(UserError, match=message):
        draw_allowed(space, SETTINGS, np.random.default_rng(0))


@given(st.integers(0, 2**31), st.sampled_from([None, 0.05, 7.0]))
def test_draws_keep_ranges_steps_and_constraints(seed, step):
    least = f"learning_rate=uniform(0.1, 20{'' if step is None else f', step={step}'})"
    space = read(
        *(least, "batch_size=int(16, 64, step=16)", "momentum[optimizer=sgd]=log(0.1, 1)"),
        "optimizer=choice(adam, sgd)",
        where=["batch_size * accumulate < 128", "optimizer == 'sgd' or learning_rate > 1"],
    )
    settings = {**SETTINGS, "accumulate": 2}
    chosen = draw_allowed(space, settings, np.random.default_rng(seed))
    assert chosen["batch_size"] in (16, 32, 48)
    assert 0.1 <= chosen["learning_rate"] <= 20
    if step is not None:
        steps = (chosen["learning_rate"] - 0.1) / step
        assert steps == pytest.approx(round(steps), abs=1e-9)
    assert ("momentum" in chosen) == (chosen["optimizer"] == "sgd")
    assert chosen["optimizer"] == "sgd" or chosen["learning_rate"] > 1


def test_a_name_in_braces_must_be_chosen():
    with pytest.raises(UserError, match=r"\{angle\} stands in a setting"):
        read("batch_size=int(16, 64)", augment="rotate:{angle}")
