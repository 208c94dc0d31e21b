"""The loop's arithmetic of time, with a trainer whose losses are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax.train import loop
from cnnjax.train.state import TrainState


def state_at(step):
    return TrainState(jnp.int32(step), {"w": jnp.zeros(2)}, {}, (), None, jax.random.key(0))


def fake_train(loss_at=lambda step: 1.0 / step, chunk_log=None):
    """A trainer that only counts: the loss of step s (from 1) is `loss_at(s)`."""

    def train(state, first_step, chunks):
        step = first_step
        for length in chunks:
            if chunk_log is not None:
                chunk_log.append(length)
            losses = np.array([loss_at(step + i + 1) for i in range(length)])
            step += length
            ones = np.ones(length, np.int32)
            metrics = {
                "loss": (losses * 4, 4 * ones),
                "learning_rate": (np.full(length, 0.5), ones),
                "gradient_norm": (losses, ones),
                "update_norm": (losses, ones),
            }
            yield state_at(step), metrics

    return train


def run(first=0, last=20, per_epoch=10, **options):
    records, saves = [], []
    options = {
        "train": fake_train(),
        "log_every_steps": 4,
        "record": lambda step, kind, values: records.append((step, kind, values)),
        "save": lambda state, best: saves.append((int(state.step), best)),
        **options,
    }
    outcome = loop.fit(
        state_at(first), first_step=first, last_step=last, steps_per_epoch=per_epoch, **options
    )
    return outcome, records, saves


@given(per_epoch=st.integers(1, 20), every=st.integers(0, 50), first=st.integers(0, 3))
def test_validations_are_at_the_first_epoch_ends_past_multiples(per_epoch, every, first):
    """The same ones wherever the run was resumed, and always the last."""
    last = 12 * per_epoch
    _, records, saves = run(
        first * per_epoch,
        last,
        per_epoch,
        evaluate=lambda state: {"accuracy": 0.5},
        evaluate_every_steps=every,
    )
    found = [step for step, kind, _ in records if kind == "validation"]
    expected, passed = [], 0
    for end in range(per_epoch, last + 1, per_epoch):
        if every == 0 or end >= (passed + 1) * every or end == last:
            expected.append(end)
        passed = end // every if every else 0
    assert found == [step for step in expected if step > first * per_epoch]
    assert [step for step, _ in saves] == found


@given(
    first=st.integers(0, 60),
    extra=st.integers(0, 60),
    per_epoch=st.integers(1, 20),
    intervals=st.lists(st.integers(1, 9), min_size=1, max_size=2),
)
def test_chunks_cover_every_step_and_end_at_multiples(first, extra, per_epoch, intervals):
    lengths = list(loop.chunk_lengths(first, first + extra, per_epoch, intervals))
    assert sum(lengths) == extra
    assert all(length > 0 for length in lengths)
    ends = np.cumsum(lengths) + first
    for end in ends[:-1]:
        position = end % per_epoch
        assert position == 0 or any(position % every == 0 for every in intervals)


@given(per_epoch=st.integers(1, 20), every=st.integers(1, 9), stop=st.integers(0, 20))
def test_a_resumed_run_has_the_chunk_ends_of_the_whole_one(per_epoch, every, stop):
    whole = np.cumsum(list(loop.chunk_lengths(0, 40, per_epoch, [every])))
    resumed_at = int(whole[min(stop, len(whole) - 1)])
    rest = resumed_at + np.cumsum(list(loop.chunk_lengths(resumed_at, 40, per_epoch, [every])))
    np.testing.assert_array_equal(rest, whole[whole > resumed_at])


def test_metrics_are_means_over_the_steps_since_the_last_record():
    _, records, _ = run(last=10)
    steps = [step for step, kind, _ in records if kind == "train"]
    assert steps == [4, 8, 10]
    assert records[0][2]["loss"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_evaluates_and_saves_at_epoch_ends_and_at_the_end():
    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.step))
        return {"accuracy": 0.5}

    outcome, _, saves = run(last=25, evaluate=evaluate)
    assert evaluated == [10, 20, 25]
    assert [step for step, _ in saves] == [10, 20, 25]
    assert (outcome.reason, int(outcome.state.step)) == ("finished", 25)


def test_saves_within_an_epoch_when_asked():
    _, _, saves = run(last=20, save_every_steps=3)
    assert [step for step, _ in saves] == [3, 6, 9, 10, 13, 16, 19, 20]


def test_stops_after_patience_and_remembers_the_best():
    accuracy = {10: 0.7, 20: 0.9, 30: 0.8, 40: 0.9, 50: 0.95}
    outcome, _, saves = run(
        last=50, evaluate=lambda state: {"accuracy": accuracy[int(state.step)]}, patience=2
    )
    assert outcome.reason == "early stopping"
    assert outcome.best == loop.Best(0.9, 20, 2)
    assert saves[-1] == (40, outcome.best)


def test_lower_is_better_for_the_loss():
    losses = {10: 0.7, 20: 0.9}
    outcome, _, _ = run(
        evaluate=lambda state: {"loss": losses[int(state.step)]},
        monitor="loss",
        lower_is_better=True,
    )
    assert outcome.best == loop.Best(0.7, 10, 1)


def test_a_resumed_run_goes_on_counting():
    accuracy = {30: 0.8, 40: 0.9}
    outcome, _, _ = run(
        first=20,
        last=50,
        evaluate=lambda state: {"accuracy": accuracy[int(state.step)]},
        patience=2,
        best=loop.Best(0.9, 10, 1),
    )
    assert (outcome.reason, int(outcome.state.step)) == ("early stopping", 30)


def test_an_interruption_saves_at_the_next_chunk_end():
    outcome, _, saves = run(should_stop=lambda: True)
    assert outcome.reason == "interrupted"
    assert [step for step, _ in saves] == [4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_names_step_and_learning_rate_and_saves_nothing_after_it(bad):
    saves = []
    with pytest.raises(loop.Diverged, match=r"at step 17 \(learning rate 0.5\): loss"):
        run(
            train=fake_train(lambda step: bad if step >= 17 else 1.0),
            save=lambda state, best: saves.append(int(state.step)),
        )
    assert saves == [10]


def test_a_run_resumed_where_it_had_stopped_early_stops_at_once():
    exhausted = loop.Best(value=0.5, step=4, evaluations_since=2)
    outcome = loop.fit(
        state_at(8),
        fake_train(),
        first_step=8,
        last_step=40,
        steps_per_epoch=4,
        log_every_steps=2,
        record=lambda *_: pytest.fail("it trained on"),
        patience=2,
        best=exhausted,
    )
    assert (int(outcome.state.step), outcome.best, outcome.reason) == (
        8,
        exhausted,
        "early stopping",
    )


def test_what_is_better():
    best = loop.Best().after(1, float("nan"), lower_is_better=True)
    assert (best.value, best.evaluations_since) == (None, 1)
    best = best.after(2, 0.5, lower_is_better=True)
    assert best == loop.Best(0.5, 2, 0)
    assert best.after(3, float("nan"), lower_is_better=True) == loop.Best(0.5, 2, 1)
    assert best.after(3, 0.4, lower_is_better=True) == loop.Best(0.4, 3, 0)
    assert best.after(3, 0.4, lower_is_better=False) == loop.Best(0.5, 2, 1)
    assert best.after(3, 0.5, lower_is_better=False) == loop.Best(0.5, 2, 1)
