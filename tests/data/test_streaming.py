"""Streamed batches: the same contract as resident ones, from memory and from tfds files."""

import itertools
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.data import ResidentPipeline, stream_arrays, stream_tfds, stream_tfds_evaluation
from cnnjax.data.batches import prefetch
from cnnjax.data.dataset import Arrays
from cnnjax.data.image_files import fit_image
from cnnjax.errors import UserError
from tests.data.conftest import TFDS_SIZES, made_images


def made_arrays(count=30):
    return Arrays(made_images(count), (np.arange(count) % 3).astype(np.int32))


def spread():
    return NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))


def take(pipeline, first_step, count):
    batches = pipeline.batches(first_step)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return [jax.device_get(batch) for batch in taken]


def numbers(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in ("image", "label", "mask"):
            assert one[name].dtype == other[name].dtype
            assert (one[name] == other[name]).all()


def test_arrays_stream_in_the_order_of_the_resident_pipeline():
    resident = ResidentPipeline(made_arrays(), 8, seed=3)
    for sharding in (None, spread()):
        streamed = stream_arrays(made_arrays(), 8, seed=3, sharding=sharding)
        assert streamed.steps_per_epoch == 3
        assert_same(take(streamed, 2, 5), take(resident, 2, 5))


def test_two_processes_share_a_batch():
    whole = take(stream_arrays(made_arrays(), 8, seed=3), 1, 4)
    parts = [
        take(stream_arrays(made_arrays(), 8, seed=3, rows=rows), 1, 4)
        for rows in (np.arange(4), np.arange(4, 8))
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert numbers(first) + numbers(second) == numbers(batch)


def shifted_brightness(image, seed):
    import tensorflow as tf

    return image + tf.cast(tf.random.stateless_uniform((), seed, 0, 256, tf.int32), tf.uint8)


def test_host_augmentation_is_resumable():
    pipeline = stream_arrays(made_arrays(), 8, seed=3, host_augment=shifted_brightness)
    whole = take(pipeline, 0, 6)
    assert_same(take(pipeline, 4, 2), whole[4:])
    plain = take(stream_arrays(made_arrays(), 8, seed=3), 0, 6)
    shifts = np.concatenate(
        [
            (one["image"] - other["image"]).reshape(8, -1)
            for one, other in zip(whole, plain, strict=True)
        ]
    )
    # One draw for the whole of each image, another for each image and each epoch.
    assert (shifts == shifts[:, :1]).all()
    assert len(set(shifts[:, 0].tolist())) > 30


def test_an_epoch_of_tfds_holds_each_example_once(tfds_dir):
    pipeline = stream_tfds("made_digits", "train", 10, seed=0, data_dir=tfds_dir)
    assert (pipeline.num_examples, pipeline.steps_per_epoch) == (50, 5)
    batches = take(pipeline, 0, 10)
    epochs = [list(itertools.chain(*map(numbers, batches[at : at + 5]))) for at in (0, 5)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    for batch in batches:
        order = numbers(batch)
        assert (batch["image"] == made_images(50)[order]).all()
        assert batch["label"].dtype == np.int32
        assert batch["label"].tolist() == [number % 3 for number in order]


def test_tfds_resumes_in_mid_epoch(tfds_dir):
    arguments = {"seed": 7, "data_dir": tfds_dir, "host_augment": shifted_brightness}
    arguments |= {"shuffle_buffer": 16, "sharding": spread()}
    pipeline = stream_tfds("made_digits", "train[:45]", 8, **arguments)
    whole = take(pipeline, 0, 9)
    again = stream_tfds("made_digits", "train[:45]", 8, **arguments)
    assert_same(take(again, 3, 6), whole[3:])
    other = stream_tfds("made_digits", "train[:45]", 8, **(arguments | {"seed": 8}))
    assert numbers(take(other, 0, 1)[0]) != numbers(whole[0])


@pytest.mark.slow
def test_processes_share_the_batches_of_one(tfds_dir):
    arguments = {"seed": 0, "data_dir": tfds_dir, "host_augment": shifted_brightness}
    whole = take(stream_tfds("made_digits", "train[:49]", 10, **arguments), 2, 6)
    for shares in ([range(5), range(5, 10)], [range(7), [], range(7, 10)], [[0, 3], [1, 2]]):
        for rows in map(np.asarray, filter(len, shares)):
            pipeline = stream_tfds("made_digits", "train[:49]", 10, rows=rows, **arguments)
            assert pipeline.steps_per_epoch == 4
            assert_same(
                take(pipeline, 2, 6),
                [{name: array[rows] for name, array in batch.items()} for batch in whole],
            )


def test_tfds_images_are_fitted(tfds_dir):
    pipeline = stream_tfds(
        "made_digits", "train", 50, seed=0, data_dir=tfds_dir, image_size=(9, 12)
    )
    (batch,) = take(pipeline, 0, 1)
    expected = {fit_image(image, (9, 12)).tobytes() for image in made_images(50)}
    assert {image.tobytes() for image in batch["image"]} == expected


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_evaluation_of_tfds_sees_each_example_once(tfds_dir, process_count):
    parts = [
        list(stream_tfds_evaluation("made_digits", "test", 6, data_dir=tfds_dir, rows=rows))
        for rows in np.split(np.arange(6), process_count)
    ]
    seen = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            assert batch["image"].shape == (6 // process_count, 6, 7, 1)
            images = np.asarray(batch["image"])[np.asarray(batch["mask"])]
            seen += images[:, 0, 0, 0].tolist()
    assert len(parts[0]) == 3
    assert seen == list(range(TFDS_SIZES["test"]))


def test_errors_come_before_reading(tfds_dir, tmp_path):
    source = {"seed": 0, "data_dir": tfds_dir}
    with pytest.raises(UserError, match="is not prepared"):
        stream_tfds("cifar10", "train", 8, seed=0, data_dir=tmp_path)
    with pytest.raises(UserError, match="no split 'extra'"):
        stream_tfds("made_digits", "extra", 8, **source)
    with pytest.raises(UserError, match="batch_size=51 is larger than the 50"):
        stream_tfds("made_digits", "train", 51, **source)
    with pytest.raises(UserError, match="batch_size=9 does not divide evenly among 8 devices"):
        stream_tfds("made_digits", "train", 9, sharding=spread(), **source)
    with pytest.raises(UserError, match="differ in size: give image_size"):
        stream_tfds("made_photos", "train", 2, **source)
    with pytest.raises(UserError, match="unknown fit 'cut'"):
        stream_tfds_evaluation("made_digits", "test", 2, data_dir=tfds_dir, fit="cut")


def test_prefetch_passes_items_and_errors_on():
    def items():
        yield from range(5)
        raise OSError("disk gone")

    taken = prefetch(items())
    assert [next(taken) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="disk gone"):
        next(taken)
    assert list(prefetch(iter("abc"))) == ["a", "b", "c"]


def test_prefetch_runs_ahead_and_stops_when_closed():
    made = []

    def items():
        for number in itertools.count():
            made.append(number)
            yield number

    taken = prefetch(items(), ahead=2)
    assert next(taken) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Two wait in the queue, a third may wait for a place in it.
    assert 3 <= len(made) <= 4
    taken.close()
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pipeline_left_open_ends_with_the_program():
    """Nothing may run in TensorFlow when Python takes itself apart: that aborts the process."""
    program = (
        "import atexit, itertools, threading\n"
        "from cnnjax.data.batches import prefetch\n"
        "left_open = prefetch(itertools.count())\n"
        "assert next(left_open) == 0\n"
        "assert threading.active_count() == 2\n"
        "atexit.register(lambda: print(threading.active_count()))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "1\n"
