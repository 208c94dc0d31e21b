"""Many small runs: what a program makes is what the steps make, one after another."""

import jax
import numpy as np
import pytest

from cnnjax import finetune
from cnnjax.data.batches import evaluation_batches
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.errors import UserError
from cnnjax.models.simple import MLP
from cnnjax.rng import stream_key
from cnnjax.studies import trials
from cnnjax.tasks.classification import classification
from cnnjax.train.predict import as_float, make_eval_step
from cnnjax.train.state import create_state
from tests.tiny import random_arrays

SHAPE = (28, 28, 1)
STEPS, BATCH = 4, 8


@pytest.fixture(scope="module")
def base():
    model = MLP(10, dense_widths=(6, 5))
    variables = jax.device_get(model.init(jax.random.key(7), np.zeros((1, *SHAPE)), train=False))
    return finetune.Base("made", variables, {}, finetune.variables_checksum(variables))


@pytest.fixture(scope="module")
def arrays():
    return random_arrays(20, num_classes=4, seed=0)


def prepared(base, name, **options):
    model = MLP(4, dense_widths=(6, 5))
    loaded = trials.loader(base, model, SHAPE)
    way = trials.find_way(name)
    return trials.prepare(way, model, SHAPE, loaded, num_steps=STEPS, normalize=as_float, **options)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("scratch", marks=pytest.mark.slow),
        pytest.param("l2-sp", marks=pytest.mark.slow),
        "lora:2",
    ],
)
def test_a_program_makes_the_steps_of_the_library(base, arrays, name):
    made = prepared(base, name)
    program = trials.Program(made, arrays, BATCH)
    for seed, rate in ((0, 0.01), (3, 0.1)):
        state, variables, step_secs = program(arrays, seed, rate)
        start = made.begin(seed)
        optimizer, step = made.step(np.float32(rate))
        expected = create_state(start, optimizer, stream_key(seed, "train", 0))
        data = ResidentPipeline(arrays, BATCH, seed=seed)
        step = jax.jit(step)
        for _, batch in zip(range(STEPS), data.batches(0), strict=False):
            expected, _ = step(expected, batch)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            state.params,
            expected.params,
        )
        jax.tree.map(np.testing.assert_array_equal, variables["frozen"], start["frozen"])
        assert int(state.step) == STEPS
        assert step_secs > 0
    assert program.peak_bytes > arrays.image.nbytes


def test_room_for_more_examples_changes_nothing(base, arrays):
    made = prepared(base, "head")
    roomy = trials.Program(made, random_arrays(30, num_classes=4, seed=1), BATCH, room=40)
    expected = trials.Program(made, arrays, BATCH)(arrays, 2, 0.1)[0]
    jax.tree.map(np.testing.assert_array_equal, roomy(arrays, 2, 0.1)[0].params, expected.params)


def test_scratch_takes_nothing_of_the_base_and_others_all_but_the_head(base):
    old = base.variables["params"]
    kept = prepared(base, "full").begin(0)["params"]
    np.testing.assert_array_equal(kept["dense1"]["kernel"], old["dense1"]["kernel"])
    assert kept["head"]["kernel"].shape == (5, 4)
    drawn = prepared(base, "scratch").begin(0)["params"]
    assert not np.array_equal(drawn["dense1"]["kernel"], old["dense1"]["kernel"])


def test_a_linear_probe_forgets_nothing(base, arrays):
    made = prepared(base, "head")
    _, variables, _ = trials.Program(made, arrays, BATCH)(arrays, 0, 0.1)
    old_model = MLP(10, dense_widths=(6, 5))
    old = finetune.FineTuned(old_model, made.tuned.method)
    batches = list(evaluation_batches(random_arrays(50, num_classes=10, seed=1), 16))
    scores = [
        trials.accuracy(
            jax.jit(make_eval_step(model, classification(10))),
            weights,
            batches,
        )
        for model, weights in (
            (old_model, base.variables),
            (old, trials.with_old_head(variables, base)),
        )
    ]
    assert scores[0] == scores[1]


def test_a_checkpoint_of_fewer_parameters_is_smaller(base, arrays):
    sizes = [
        trials.checkpoint_bytes(
            trials.Program(prepared(base, name), arrays, BATCH)(arrays, 0, 0.1)[0]
        )
        for name in ("full", "head")
    ]
    assert sizes[1] < sizes[0]


def test_what_the_model_does_not_have_cannot_be_trained(base):
    with pytest.raises(UserError, match="the method norm trains parameters like"):
        prepared(base, "norm")
