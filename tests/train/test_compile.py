"""One device, eight under jit, eight under pmap, divided parameters, whole chunks: same numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from cnnjax import models
from cnnjax.data import mnist
from cnnjax.data.batches import evaluation_batches
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.data.streaming import stream_arrays
from cnnjax.devices import sharding
from cnnjax.devices.sharding import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    replicated,
    state_shardings,
)
from cnnjax.devices.sums import MAX_PACKED_BYTES, sum_over_devices
from cnnjax.errors import UserError
from cnnjax.models.resnet import ResNet
from cnnjax.tasks.classification import classification
from cnnjax.train import evaluate, step
from cnnjax.train.compile import (
    MOST_DIVIDED_MACS,
    choose_mesh,
    choose_method,
    compile_train,
    lower_train,
)
from cnnjax.train.evaluate import compile_eval, compile_predict
from cnnjax.train.predict import make_eval_step, make_predict
from tests.tiny import BatchNormNet, random_arrays, setup

ARRAYS = random_arrays(512)
MODELS = {
    "lenet5": lambda: models.create("lenet5", num_classes=10),
    # Smooth: in float32 a kink turns rounding into a difference of 0.002 within five steps.
    "resnet": lambda: ResNet(
        (1, 1),
        block="basic",
        stem="cifar",
        stem_features=8,
        features=8,
        layers=models.Layers(activation="silu"),
        num_classes=10,
    ),
    "batch_norm": BatchNormNet,
}


def placed(state, mesh):
    """Puts a state on the mesh; as rules of ours the default ones divide small leaves too."""
    places = state_shardings(state, mesh, sharding.DEFAULT_RULES)
    return jax.device_put(state, places)


def resident(mesh):
    return ResidentPipeline(
        ARRAYS,
        32,
        seed=3,
        sharding=batch_sharding(mesh),
        replicated=replicated(mesh),
    )


def trained(model, method, axes, num_steps, *, dtype, chunks=None, **step_options):
    """Trains from the same start in one of the ways; returns the state and metrics of each step."""
    mesh = make_mesh(axes)
    data = resident(mesh)
    state, make_step = setup(model, dtype=dtype, **step_options)
    state = placed(state, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    train = compile_train(make_step, state, data, method=method, mesh=mesh)
    history = []
    for after, metrics in train(state, 0, chunks or [num_steps]):
        state = after
        history.append(metrics)
    stays = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places)
    assert all(jax.tree.leaves(stays))
    stacked = jax.tree.map(lambda *parts: np.concatenate(parts), *history)
    return jax.device_get(state.replace(key=None)), stacked


def largest_difference(first, second):
    """The largest difference of any leaf, relative to the size of that leaf."""
    differences = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b)) / (1e-30 + np.max(np.abs(a)))), first, second
    )
    return max(jax.tree.leaves(differences))


ONE_STEP_WAYS = [
    ("jit", "data=8"),
    ("pmap", "data=8"),
    ("jit", "data=4,model=2"),
    ("jit", "fsdp=8"),
]
CHUNK_WAYS = [("scan", "data=1"), ("scan", "data=8"), ("scan", "fsdp=4,model=2")]
# Networks take long to compile: the smallest tries the chunks of steps.
WAYS_OF = {"lenet5": ONE_STEP_WAYS, "resnet": ONE_STEP_WAYS, "batch_norm": CHUNK_WAYS}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_way_agrees_in_float64_over_30_steps(name):
    with jax.enable_x64(True):
        reference = trained(MODELS[name](), "jit", 1, 30, dtype=jnp.float64)
        assert reference[0].params["head"]["kernel"].dtype == np.float64
        for method, axes in WAYS_OF[name]:
            other = trained(MODELS[name](), method, axes, 30, dtype=jnp.float64)
            assert largest_difference(reference, other) < 1e-10, (method, axes)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_way_agrees_in_float32_over_5_steps(name):
    reference = trained(MODELS[name](), "jit", 1, 5, dtype=jnp.float32)
    for method, axes in WAYS_OF[name]:
        other = trained(MODELS[name](), method, axes, 5, dtype=jnp.float32)
        assert largest_difference(reference, other) < 1e-4, (method, axes)


@pytest.mark.parametrize(
    ("method", "axes"),
    [("jit", "data=8"), ("jit", "fsdp=4,model=2"), ("pmap", "data=8"), ("scan", "data=8")],
)
def test_bound_numbers_are_arguments_of_the_program_not_constants_in_it(method, axes):
    model, mesh = models.create("mlp", num_classes=10, dense_widths=(8,)), make_mesh(axes)

    def steps(axis_name, *, learning_rate, mean):
        optimizer = optax.sgd(learning_rate, momentum=0.9)
        return step.make_step(
            model,
            optimizer,
            classification(10),
            schedule=optax.constant_schedule(learning_rate),
            normalize=lambda images: images / 255.0 - mean,
            axis_name=axis_name,
        )

    def of(learning_rate, mean, bind):
        make_step = bind(steps, learning_rate=learning_rate, mean=np.float32([mean]))
        state = placed(setup(model)[0], mesh)
        lowered = lower_train(make_step, state, resident(mesh), method=method, mesh=mesh)
        train = compile_train(make_step, state, resident(mesh), method=method, mesh=mesh)
        ((after, metrics),) = train(state, 0, [3])
        return lowered.as_text(), jax.device_get(after.params), metrics["learning_rate"][0]

    first, params, rates = of(0.05, 0.5, Partial)
    second, others, _ = of(0.2, 0.4, Partial)
    assert first == second
    np.testing.assert_array_equal(rates, np.float32([0.05] * 3))
    constants, expected, _ = of(0.05, 0.5, functools.partial)
    assert constants != first
    assert largest_difference(expected, params) < 1e-5 < 1e-2 < largest_difference(params, others)


@pytest.mark.parametrize("method", ["jit", "pmap", "scan"])
def test_a_step_is_traced_once(method):
    """Tracing is Python, and takes as long as compiling does for small networks."""
    state, make_step = setup(models.create("mlp", num_classes=10, dense_widths=(8,)))
    mesh, calls = make_mesh(1), []

    def counted(axis_name):
        whole = make_step(axis_name)

        def step(state, batch):
            calls.append(axis_name)
            return whole(state, batch)

        return step

    lower_train(counted, placed(state, mesh), resident(mesh), method=method, mesh=mesh)
    assert len(calls) == 1


def test_the_devices_of_a_small_network_wait_for_each_other_once_a_step():
    mesh = make_mesh("data=8")
    state, make_step = setup(models.create("lenet5", num_classes=10))
    lowered = lower_train(make_step, placed(state, mesh), resident(mesh), method="scan", mesh=mesh)
    program = lowered.compile().as_text()
    assert re.findall(r" (all-\w+|collective-\w+|reduce-scatter)", program) == ["all-reduce"]


def test_large_networks_have_one_device_of_a_cpu_unless_more_are_asked_for():
    size = MOST_DIVIDED_MACS
    assert choose_mesh(0, size).size == choose_mesh("", 0).size == 8
    assert choose_mesh(0, size + 1).size == 1
    assert choose_mesh(4, size + 1).size == 4
    assert choose_mesh("data=2,fsdp=4", size + 1).size == 8


def test_sums_over_devices_are_those_of_each_leaf():
    key = jax.random.key(0)
    tree = {
        "large": jax.random.normal(key, (4, MAX_PACKED_BYTES // 4 + 1)),
        "small": [jax.random.normal(key, (4, 3, 2)), jax.random.normal(key, (4,))],
        "count": jnp.array([2**30, 1, 5, 2**29 + 4095]),
        "none": None,
        "half": jnp.ones((4, 2), jnp.bfloat16),
    }
    sums = jax.vmap(lambda tree: sum_over_devices(tree, "i"), axis_name="i")(tree)
    for own, expected in zip(jax.tree.leaves(sums), jax.tree.leaves(tree), strict=True):
        assert own.dtype == expected.dtype
        np.testing.assert_allclose(own[0], expected.sum(0), rtol=1e-6)
    assert sums["count"][0] == 2**30 + 2**29 + 4095 + 6
    assert sum_over_devices(tree, None) is tree


def test_max_pools_between_divided_channels_have_their_gradient():
    """The compiler computes the pooled values again there, and not always to the last bit."""
    model = models.create("cnn_32_64", num_classes=10, widths=(4, 6), norm="batch")
    with jax.enable_x64(True):
        reference = trained(model, "jit", 1, 1, dtype=jnp.float64)
        other = trained(model, "jit", "data=4,model=2", 1, dtype=jnp.float64)
    assert largest_difference(reference, other) < 1e-10


@pytest.mark.slow
def test_statistics_of_groups_do_not_depend_on_the_devices():
    # Groups of 8 extend over two of eight devices with 4 examples each.
    model = BatchNormNet(norm_group_size=8)
    reference = trained(model, "jit", 1, 5, dtype=jnp.float32)
    for method, axes in [("jit", "data=8"), ("pmap", "data=8"), ("scan", "data=8")]:
        other = trained(model, method, axes, 5, dtype=jnp.float32)
        assert largest_difference(reference, other) < 1e-4, (method, axes)


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_devices():
    def augment(key, batch, first_index):
        image = batch["image"]
        indices = first_index + jnp.arange(image.shape[0])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        noise = jax.vmap(lambda k: jax.random.normal(k, image.shape[1:], image.dtype))(keys)
        return {**batch, "image": image + 0.1 * noise}

    options = {"dtype": jnp.float32, "augment": augment}
    reference = trained(BatchNormNet(), "jit", 1, 3, **options)
    for method, axes in [("pmap", "data=8"), ("jit", "fsdp=4,model=2"), ("scan", "data=8")]:
        other = trained(BatchNormNet(), method, axes, 3, **options)
        assert largest_difference(reference, other) < 1e-4, (method, axes)


@pytest.mark.parametrize("method", ["jit", "scan"])
def test_grouping_of_steps_changes_no_bit(method):
    whole = trained(BatchNormNet(), method, 2, 12, dtype=jnp.float32)
    pieces = trained(BatchNormNet(), method, 2, 12, dtype=jnp.float32, chunks=[5, 1, 6])
    jax.tree.map(np.testing.assert_array_equal, whole, pieces)


@pytest.mark.parametrize(
    ("batch_size", "axes"),
    [
        pytest.param(7, 1, marks=pytest.mark.slow),
        (128, 1),
        pytest.param(512, 1, marks=pytest.mark.slow),
        pytest.param(64, 8, marks=pytest.mark.slow),
        (512, 8),
        pytest.param(512, "data=2,fsdp=2,model=2", marks=pytest.mark.slow),
    ],
)
def test_evaluation_counts_exactly_whatever_the_batch(batch_size, axes):
    model = models.create("lenet5", num_classes=10)
    state, _ = setup(model)
    arrays = mnist.read()["test"]
    mesh = make_mesh(axes)
    variables = placed(state, mesh).variables()
    eval_step = compile_eval(
        lambda axis_name: make_eval_step(model, classification(10), axis_name=axis_name),
        mesh,
    )
    batches = evaluation_batches(arrays, batch_size, sharding=batch_sharding(mesh))
    result = evaluate.evaluate(eval_step, variables, batches)
    images = np.split(arrays.image / np.float32(255), 10)
    logits = np.concatenate([model.apply(state.variables(), part) for part in images])
    predicted = np.argmax(logits, axis=-1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (arrays.label, predicted), 1)
    np.testing.assert_array_equal(result["confusion"], expected)
    assert result["accuracy"] == np.sum(predicted == arrays.label) / 10_000


def test_predictions_of_divided_parameters_are_those_of_one_device():
    model = models.create("lenet5", num_classes=10)
    state, _ = setup(model)
    arrays = random_arrays(20)
    results = []
    for axes in ("data=1", "data=2,fsdp=2,model=2"):
        mesh = make_mesh(axes)
        predict = compile_predict(make_predict(model, classification(10)), mesh)
        batches = evaluation_batches(arrays, 16, sharding=batch_sharding(mesh))
        variables = placed(state, mesh).variables()
        results.append(evaluate.predict_all(predict, variables, batches))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    np.testing.assert_array_equal(results[0][1]["label"], results[1][1]["label"])


@pytest.mark.parametrize("stream", [False, True])
def test_compiling_reads_no_data(stream):
    mesh = make_mesh(2)
    place = batch_sharding(mesh)
    data = stream_arrays(ARRAYS, 32, seed=3, sharding=place) if stream else resident(mesh)
    batch = next(data.batches(0))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in data.batch_shapes.items()
    }

    def read(first_step):
        raise AssertionError("a batch was read")

    data.batches = read
    state, make_step = setup(BatchNormNet())
    shapes = jax.eval_shape(lambda: state)
    compile_train(make_step, shapes, data, method="jit", mesh=mesh)


def test_batch_must_divide_over_the_devices():
    mesh = make_mesh(8)
    with pytest.raises(UserError, match=r"batch size 30 is not divisible by the 8 devices: use 32"):
        check_batch_size(30, mesh)


def test_too_many_devices_and_unknown_methods_are_refused():
    with pytest.raises(UserError, match="9 devices asked for by data=9, but JAX sees 8 cpu"):
        make_mesh(9)
    data = ResidentPipeline(ARRAYS, 8, seed=0)
    with pytest.raises(UserError, match="'pnap': did you mean pmap"):
        choose_method("pnap", data, make_mesh(1))
    with pytest.raises(UserError, match="'pmap' divides the batch alone, but the mesh is fsdp=8"):
        choose_method("pmap", data, make_mesh("fsdp=8"))


def test_chunks_are_chosen_for_resident_data_and_whole_parameters():
    data, stream = resident(make_mesh(1)), stream_arrays(ARRAYS, 32, seed=3)
    assert choose_method("auto", data, make_mesh("data=8")) == "scan"
    assert choose_method("auto", data, make_mesh("fsdp=8")) == "jit"
    assert choose_method("auto", stream, make_mesh("data=8")) == "jit"
