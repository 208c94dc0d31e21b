"""The parts of a population that compute nothing: slots, rows, members, ends, copies."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax import rng
from cnnjax.data import ResidentPipeline
from cnnjax.data.dataset import Arrays
from cnnjax.errors import UserError
from cnnjax.run import classifier
from cnnjax.search.population import (
    examples,
    members,
    pbt,
    progress,
    report,
    stopping,
    varied,
)
from cnnjax.search.space import read_space


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_members_are_divided_evenly_and_fill_the_first_slots_of_each_device(count, devices, more):
    width = (-(-count // devices) + more) * devices
    found = members.layout(count, devices, width)
    assert len(set(found.slots.tolist())) == count and found.slots.max() < width
    assert found.counts.sum() == count and found.counts.max() - found.counts.min() <= 1
    each = width // devices
    for device in range(devices):
        own = sorted(slot % each for slot in found.slots if slot // each == device)
        assert own == list(range(found.counts[device]))
    np.testing.assert_array_equal(found.fill[found.slots], np.arange(count))


def test_slots_that_devices_do_not_divide_are_refused():
    with pytest.raises(UserError, match="6 members do not divide among 4 devices"):
        members.layout(5, 4, 6)
    with pytest.raises(UserError, match="5 members do not fit into 4 slots"):
        members.layout(5, 2, 4)


@pytest.mark.parametrize(
    ("devices", "count", "message"),
    [
        (0, 0, "a population of 0 members: give at least 1"),
        (3, 2, "3 devices for 2 members"),
        (-1, 2, "-1 devices: give a positive number"),
        (9, 20, "9 devices asked for, but JAX sees 8 cpu"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(devices, count, message):
    with pytest.raises(UserError, match=message):
        members.member_mesh(devices, count)


def test_what_is_stacked_and_moved_over_devices_is_what_is_taken():
    trees = [{"a": jnp.full((2,), i), "key": jax.random.key(i)} for i in range(5)]
    mesh = members.member_mesh(2, 5)
    layout = members.layout(5, 2)
    placed = members.place(members.stack(trees), layout, mesh)
    assert len(placed["a"].sharding.device_set) == 2
    for i in range(5):
        one = members.take(placed, layout.slots[i])
        assert one["a"].tolist() == [i, i]
        assert jax.random.key_data(one["key"]).tolist() == [0, i]


def test_members_of_other_shapes_are_refused():
    trees = [{"w": jnp.zeros(3)}, {"w": jnp.zeros(4)}]
    with pytest.raises(UserError, match=r"members 0 and 1 differ at w: float32 \[3\] and .* \[4\]"):
        members.stack(trees)
    with pytest.raises(UserError, match="members 0 and 1 differ at v: nothing and float32"):
        members.stack([{}, {"v": jnp.zeros(4)}])
    with pytest.raises(UserError, match="0 members"):
        members.stack([])


def arrays(count, seed=0):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 255, (count, 2, 2, 1), np.uint8)
    return Arrays(image, generator.integers(0, 9, count).astype(np.int32))


def test_shared_examples_are_those_of_each_member():
    every = arrays(40)
    collected, splits = examples.Collected(), []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        parts = {"train": order[:30], "validation": order[30:], "test": order[:0]}
        splits.append({name: Arrays(*(a[rows] for a in every)) for name, rows in parts.items()})
        collected.add(splits[-1])
    stored = collected.arrays()
    assert len(stored["image"]) == len(
        np.unique(np.concatenate([every.image.reshape(40, -1)]), axis=0)
    )
    for rows, own in zip(collected.rows, splits, strict=True):
        for name, split in own.items():
            np.testing.assert_array_equal(stored["image"][rows[name]], split.image)
            np.testing.assert_array_equal(stored["label"][rows[name]], split.label)


def test_a_member_trains_on_the_batches_of_its_own_run():
    own = arrays(25)
    rows = np.arange(100, 125, dtype=np.int32)
    found = examples.training_rows([rows, rows], [3, 7], batch_size=4, epoch=2)
    for member, seed in enumerate((3, 7)):
        pipeline = ResidentPipeline(own, 4, seed=seed)
        np.testing.assert_array_equal(found[member] - 100, pipeline.indices(12, 6))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9))
def test_every_row_is_evaluated_once(sizes, batch):
    rows = [np.arange(size, dtype=np.int32) + 5 for size in sizes]
    found, mask = examples.evaluation_rows(rows, batch)
    for own, places, counted in zip(rows, found, mask, strict=True):
        np.testing.assert_array_equal(places[counted], own)


CONFIG = classifier.Config(augment="rotate:{angle},flip")
SETTINGS = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}


def space(*texts):
    texts = (
        texts if any(text.startswith("angle") for text in texts) else (*texts, "angle=choice(0, 9)")
    )
    return read_space(texts, classifier.Config, SETTINGS)


def test_choices_are_crossed_with_seeds_and_ranges_are_drawn():
    found = varied.draw_members(
        space("learning_rate=log(1e-4, 1e-2)"), seeds=[5, 6], draws=3, seed=1
    )
    assert [each.number for each in found] == list(range(12))
    assert [each.seed for each in found] == [5, 6] * 6
    drawn = [each.chosen["learning_rate"] for each in found]
    assert len(set(drawn)) == 3 and all(1e-4 <= each <= 1e-2 for each in drawn)
    assert drawn[:6] == drawn[6:] and [each.chosen["angle"] for each in found] == [0] * 6 + [9] * 6
    again = varied.draw_members(
        space("learning_rate=log(1e-4, 1e-2)"), seeds=[5, 6], draws=3, seed=1
    )
    assert again == found
    own = varied.config_of(CONFIG, found[-1])
    assert own.seed == 6 and own.augment == "rotate:9,flip"
    assert own.learning_rate == found[-1].chosen["learning_rate"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch_size", "--space batch_size: it is a whole number"),
        ("model", "--space model: it is of type str"),
        ("depth", "only --augment may have {depth}"),
        ("smoke", "--space smoke: it is of type bool"),
    ],
)
def test_settings_on_which_the_program_depends_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        varied.leaves_of([name], CONFIG)


def test_floats_and_numbers_of_the_augmentation_are_leaves():
    names = ["learning_rate", "angle", "data_seed", "weight_decay"]
    assert varied.leaves_of(names, CONFIG) == ("learning_rate", "angle", "weight_decay")
    own = varied.with_values(CONFIG, {"learning_rate": 0.5, "angle": 7.0})
    assert own.learning_rate == 0.5 and len(own.augment.changes) == 2


def test_a_zero_that_leaves_a_term_out_cannot_vary():
    configs = [dataclasses.replace(CONFIG, clip_norm=value) for value in (0.0, 1.0)]
    with pytest.raises(UserError, match="--space clip_norm: 0 leaves it out"):
        varied.check_switches(configs)
    varied.check_switches(configs[:1])
    varied.check_switches(configs[1:])


def test_numbers_that_cannot_vary_or_do_nothing_are_found_by_tracing():
    varied.check_leaves(lambda values, x: values["a"] * x, {"a": 1.0}, 2.0)
    with pytest.raises(UserError, match="--space b: the program itself depends on its value"):
        varied.check_leaves(
            lambda values, x: values["a"] * x if values["b"] else x, {"a": 1.0, "b": 1.0}, 2.0
        )
    with pytest.raises(UserError, match="--space b: what members compute does not depend on it"):
        varied.check_leaves(lambda values, x: values["a"] * x, {"a": 1.0, "b": 1.0}, 2.0)


def test_halving_keeps_the_best_part_at_powers_of_the_factor():
    pruner = stopping.read_pruner("halving(min_epochs=2, factor=3)")
    assert [pruner.stay(epoch, 9) for epoch in range(1, 8)] == [9, 3, 9, 9, 9, 3, 9]
    scores = {1: 0.5, 4: 0.9, 6: math.nan, 7: 0.7}
    assert stopping.worst(scores, pruner, 2, lower_is_better=False) == [1, 6]
    assert stopping.worst(scores, pruner, 2, lower_is_better=True) == [4, 6]
    assert stopping.worst(scores, pruner, 3, lower_is_better=True) == []
    assert stopping.read_pruner("none") is None
    with pytest.raises(UserError, match="factor of 2 or more"):
        stopping.read_pruner("halving(factor=1)")


def test_members_that_are_not_finite_have_diverged():
    loss = np.array([[1.0, 2.0], [1.0, np.nan], [np.inf, 1.0]])
    metrics = {"loss": (loss, np.ones((3, 2))), "accuracy": (loss, np.ones((3, 2)))}
    assert stopping.diverged(metrics).tolist() == [False, True, True]


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=12),
    st.integers(0, 1000),
    st.floats(0.01, 0.5),
)
def test_the_worst_copy_the_best_and_explore_near_them(values, seed, fraction):
    scores = dict(enumerate(values))
    searched = space("learning_rate=log(1e-4, 1e-2)")
    chosen = {n: {"learning_rate": 1e-3 * (1 + n), "angle": 0} for n in scores}
    rule = pbt.pbt(fraction=fraction, resample=0.3)
    found = pbt.copies(
        scores, chosen, searched.dimensions, rule, seed=seed, epoch=3, lower_is_better=False
    )
    order = stopping.ranked(scores, lower_is_better=False)
    count = min(max(1, round(fraction * len(order))), len(order) // 2)
    assert sorted(each.member for each in found) == sorted(order[-count:])
    assert {each.source for each in found} <= set(order[:count])
    for each in found:
        assert 1e-4 <= each.chosen["learning_rate"] <= 1e-2 and each.chosen["angle"] in (0, 9)


def test_settings_are_multiplied_or_drawn_anew():
    searched = space("learning_rate=log(1e-6, 1)")
    generator = rng.numpy_generator(0, "test")
    chosen = {"learning_rate": 1e-3, "angle": 0}
    moved = [
        pbt.explored(chosen, searched.dimensions, 0.0, generator)["learning_rate"]
        for _ in range(20)
    ]
    assert {round(each, 7) for each in moved} == {8e-4, 1.2e-3}
    drawn = [
        pbt.explored(chosen, searched.dimensions, 1.0, generator)["learning_rate"]
        for _ in range(20)
    ]
    assert len(set(drawn)) == 20


def test_exploring_keeps_steps_and_constraints():
    searched = space("learning_rate=uniform(0, 1, step=0.25)", "weight_decay=int(0, 10)")
    chosen = {"learning_rate": 0.5, "weight_decay": 1, "angle": 0}
    generator = rng.numpy_generator(0, "test")
    for _ in range(20):
        moved = pbt.explored(chosen, searched.dimensions, 0.2, generator)
        assert moved["learning_rate"] in (0, 0.25, 0.5, 0.75, 1)
        assert moved["weight_decay"] in range(11)
    # By at least a step, where 0.8 and 1.2 are less.
    moved = [pbt.explored(chosen, searched.dimensions, 0.0, generator) for _ in range(20)]
    assert {each["learning_rate"] for each in moved} == {0.25, 0.75}
    assert {each["weight_decay"] for each in moved} == {0, 2}
    rule = pbt.pbt(fraction=0.5, resample=0.3)
    found = pbt.copies(
        {0: 0.9, 1: 0.1},
        {0: chosen, 1: chosen},
        searched.dimensions,
        rule,
        seed=0,
        epoch=1,
        lower_is_better=False,
        allows=lambda each: each["learning_rate"] <= 0.25,
    )
    assert found[0].chosen["learning_rate"] <= 0.25


def test_constraints_see_what_is_fixed_and_more_is_drawn_until_they_hold():
    where = ["learning_rate * batch_size < 1e-2", "angle == 0 or learning_rate < 1e-5"]
    searched = read_space(
        ["learning_rate=log(1e-6, 1)", "angle=choice(0, 9)"], classifier.Config, SETTINGS, where
    )
    found = varied.draw_members(searched, seeds=[0, 1], draws=5, settings=SETTINGS)
    rates = {each.chosen["learning_rate"] for each in found}
    assert len(rates) == 5 and max(rates) * CONFIG.batch_size < 1e-2
    assert all(m.chosen["angle"] == 0 or m.chosen["learning_rate"] < 1e-5 for m in found)
    with pytest.raises(UserError, match="nothing that --space draws keeps it"):
        nothing = read_space(
            ["angle=choice(0, 9)"], classifier.Config, SETTINGS, ["batch_size > 1000000"]
        )
        varied.draw_members(nothing, seeds=[0], settings=SETTINGS)
    with pytest.raises(UserError, match="one population has at most 10,000"):
        varied.draw_members(None, seeds=range(10_001))


def test_settings_are_compared_by_validation_with_the_test_beside():
    rows = [
        {"seed": n % 3, "settings": {}, "validation_loss": value, "test_loss": 9.0 - value}
        for n, value in enumerate((1.0, 2.0, 3.0, 1.5, 2.5, 3.5))
    ]
    groups = {"first": [0, 1, 2], "second": [3, 4, 5]}
    table = report._groups_table(rows, groups, "validation_loss", "test_loss").splitlines()
    assert table[0].startswith("| setting | members | validation loss, mean ±")
    assert table[0].endswith("| minus that of first | p | test loss |")
    assert "| 0.5000 ± 0.0000 |" in table[3] and table[3].endswith("| 6.5000 ± 2.4841 |")


def test_progress_is_the_same_when_json_has_held_it():
    import json

    begun = progress.start([varied.Member(0, 3, {"a": 0.5}), varied.Member(1, 4, {"a": 0.25})])
    copied = pbt.Copied(1, 0, {"a": 0.4})
    done = dataclasses.replace(
        begun,
        epoch=2,
        active=(0,),
        ended={1: ("pruned", 2)},
        scores={0: ((1, 0.5), (2, 0.75)), 1: ((1, 0.5),)},
        copies=((1, copied),),
        seconds=1.5,
    )
    assert progress.from_notes(json.loads(json.dumps(done.as_notes()))) == done


def test_members_that_differ_in_seeds_alone_are_one_setting():
    from types import SimpleNamespace

    drawn = varied.draw_members(
        space("data_seed=choice(0, 1)", "learning_rate=choice(0.1, 0.2)"), seeds=[3, 4]
    )
    chosen = [each for each in drawn if each.chosen["angle"] == 0]
    groups = report.groups_of(SimpleNamespace(members=chosen))
    assert list(groups) == ["learning_rate=0.1  angle=0", "learning_rate=0.2  angle=0"]
    assert [len(members) for members in groups.values()] == [4, 4]
    rows = [
        {"seed": each.seed, "settings": each.chosen, "test_loss": float(n)}
        for n, each in enumerate(chosen)
    ]
    places = {each.number: n for n, each in enumerate(chosen)}
    groups = {name: [places[n] for n in members] for name, members in groups.items()}
    text = report._groups_table(rows, groups, "test_loss")
    # 0, 1, 4, 5 and 2, 3, 6, 7: the pairs of the same seeds differ by 2 each.
    assert "| 4 | 2.5000 ± " in text and "| 4 | 4.5000 ± " in text and "| 2.0000 ± 0.0000 |" in text
