"""Resident batches and evaluation batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.data import ResidentPipeline, evaluation_batches, gather
from cnnjax.data.dataset import Arrays
from cnnjax.data.pipelines import epoch_indices
from cnnjax.errors import UserError


def numbered(count):
    """Images of one number each, which the label repeats."""
    number = np.arange(count, dtype=np.int32)
    image = np.broadcast_to(number.astype(np.uint8)[:, None, None, None], (count, 2, 3, 1))
    return Arrays(np.ascontiguousarray(image), number)


def shardings(num_devices=8):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def numbers(batch):
    """The labels, once the image, dtypes and mask are seen to agree with them."""
    label = np.asarray(batch["label"])
    assert batch["image"].dtype == jnp.uint8 and batch["label"].dtype == jnp.int32
    assert (np.asarray(batch["image"]) == label.astype(np.uint8)[:, None, None, None]).all()
    assert batch["mask"].dtype == bool and np.asarray(batch["mask"]).all()
    return label.tolist()


def take(pipeline, first_step, count):
    return [numbers(batch) for batch in itertools.islice(pipeline.batches(first_step), count)]


def test_an_epoch_holds_each_example_once():
    pipeline = ResidentPipeline(numbered(24), 8, seed=0)
    assert (pipeline.batch_size, pipeline.num_examples, pipeline.steps_per_epoch) == (8, 24, 3)
    epochs = [list(itertools.chain(*take(pipeline, 3 * epoch, 3))) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_remainder_differs_from_epoch_to_epoch():
    pipeline = ResidentPipeline(numbered(10), 4, seed=0)
    left_out = [
        frozenset(range(10)) - set(itertools.chain(*take(pipeline, 2 * epoch, 2)))
        for epoch in range(20)
    ]
    assert {len(each) for each in left_out} == {2}
    assert frozenset.union(*left_out) == set(range(10))


@settings(max_examples=15, deadline=None)
@given(first_step=st.integers(0, 30), num_steps=st.integers(1, 12), seed=st.integers(0, 5))
def test_a_step_does_not_depend_on_where_the_run_started(first_step, num_steps, seed):
    pipeline = ResidentPipeline(numbered(22), 5, seed=seed)
    whole = pipeline.indices(0, 50)
    assert whole.dtype == np.int32 and whole.shape == (50, 5)
    part = pipeline.indices(first_step, num_steps)
    assert (part == whole[first_step : first_step + num_steps]).all()
    again = ResidentPipeline(numbered(22), 5, seed=seed)
    assert take(again, first_step, 3) == whole[first_step : first_step + 3].tolist()


def test_seeds_differ():
    first, second = (ResidentPipeline(numbered(64), 64, seed=seed) for seed in (0, 1))
    assert first.indices(0, 1).tolist() != second.indices(0, 1).tolist()


def test_gather_within_a_scan():
    pipeline = ResidentPipeline(numbered(20), 4, seed=0)

    @jax.jit
    def epoch(arrays, indices):
        return jax.lax.scan(lambda _, each: (None, gather(arrays, each)), None, indices)[1]

    stacked = epoch(pipeline.arrays, pipeline.indices(3, 5))
    found = [numbers(jax.tree.map(lambda x, step=step: x[step], stacked)) for step in range(5)]
    assert found == take(pipeline, 3, 5)


def test_sharding_changes_the_place_and_not_the_batch():
    sharding, replicated = shardings()
    pipeline = ResidentPipeline(numbered(50), 16, seed=0, sharding=sharding, replicated=replicated)
    assert all(array.sharding == replicated for array in pipeline.arrays.values())
    assert take(pipeline, 0, 4) == take(ResidentPipeline(numbered(50), 16, seed=0), 0, 4)
    batch = next(pipeline.batches(5))
    assert all(array.sharding.is_equivalent_to(sharding, array.ndim) for array in batch.values())
    # Two processes of four devices each would hold these halves.
    parts = [np.asarray(shard.data) for shard in batch["label"].addressable_shards]
    halves = np.concatenate(parts[:4]), np.concatenate(parts[4:])
    assert not set(halves[0]) & set(halves[1])
    assert np.concatenate(halves).tolist() == numbers(batch)


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (11, "batch_size=11 is larger than the 10 training images"),
        (0, "batch_size=0: give a positive number"),
    ],
)
def test_impossible_batch_sizes(batch_size, message):
    with pytest.raises(UserError, match=message):
        ResidentPipeline(numbered(10), batch_size, seed=0)


def test_batches_that_do_not_divide():
    sharding, replicated = shardings()
    with pytest.raises(UserError, match="batch_size=12 does not divide evenly among 8 devices"):
        ResidentPipeline(numbered(50), 12, seed=0, sharding=sharding, replicated=replicated)
    with pytest.raises(UserError, match="give replicated too"):
        ResidentPipeline(numbered(50), 16, seed=0, sharding=sharding)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 40), spread=st.booleans())
def test_evaluation_sees_each_example_once_in_order(count, batch_size, spread):
    sharding = shardings()[0] if spread else None
    seen, shapes = [], set()
    for batch in evaluation_batches(numbered(count), batch_size, sharding=sharding):
        mask, label = np.asarray(batch["mask"]), np.asarray(batch["label"])
        shapes.add(batch["image"].shape)
        assert (np.asarray(batch["image"])[:, 0, 0, 0] == label).all()
        assert not label[~mask].any()
        seen += label[mask].tolist()
    assert seen == list(range(count))
    grown = -(-batch_size // 8) * 8 if spread else batch_size
    assert shapes == {(grown, 2, 3, 1)}


def test_evaluation_of_nothing():
    assert list(evaluation_batches(numbered(0), 4)) == []
    with pytest.raises(UserError, match="batch_size=0"):
        next(evaluation_batches(numbered(4), 0))


def test_devices_of_a_cpu_share_one_copy_of_the_data():
    """Each its own would take as many times the memory; what is changed later is not seen."""
    arrays = numbered(24)
    split, replicated = shardings()
    pipeline = ResidentPipeline(arrays, 8, seed=0, sharding=split, replicated=replicated)
    shards = pipeline.arrays["image"].addressable_shards
    assert len(shards) == 8
    assert len({shard.data.unsafe_buffer_pointer() for shard in shards}) == 1
    arrays.image[:] = 77
    assert (np.asarray(pipeline.arrays["image"]) == numbered(24).image).all()


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
    """Of a million images it takes as long as some steps, and each chunk of steps asks for it."""
    drawn = []

    def counted(*arguments):
        drawn.append(arguments[-1])
        return epoch_indices(*arguments)

    monkeypatch.setattr("cnnjax.data.pipelines.epoch_indices", counted)
    pipeline = ResidentPipeline(numbered(24), 4, seed=0)
    expected = np.concatenate([epoch_indices(24, 4, 0, epoch) for epoch in (0, 1)])
    parts = [pipeline.indices(step, 3) for step in range(0, 12, 3)]
    assert (np.concatenate(parts) == expected).all()
    assert (pipeline.indices(4, 4) == expected[4:8]).all()
    assert drawn == [0, 1]
