"""One device, eight under jit, eight under pmap, and whole chunks: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import evaluate, losses, models, parallel, steps
from cnnjax.data import mnist
from cnnjax.data.pipelines import ResidentPipeline, evaluation_batches
from cnnjax.errors import UserError
from tests.tiny import BatchNormNet, random_arrays, setup

ARRAYS = random_arrays(512)
MODELS = {"lenet5": lambda: models.create("lenet5", num_classes=10), "batch_norm": BatchNormNet}


def trained(model, method, num_devices, num_steps, *, dtype, chunks=None, **step_options):
    """Trains from the same start in one of the ways; returns the state and metrics of each step."""
    mesh = parallel.make_mesh(num_devices)
    data = ResidentPipeline(
        ARRAYS,
        32,
        seed=3,
        sharding=parallel.batch_sharding(mesh),
        replicated=parallel.replicated(mesh),
    )
    state, make_step = setup(model, dtype=dtype, **step_options)
    state = jax.device_put(state, parallel.replicated(mesh))
    train = parallel.compile_train(make_step, state, data, method=method, mesh=mesh)
    history = []
    for after, metrics in train(state, 0, chunks or [num_steps]):
        state = after
        history.append(metrics)
    stacked = jax.tree.map(lambda *parts: np.concatenate(parts), *history)
    return jax.device_get(state.replace(key=None)), stacked


def largest_difference(first, second):
    """The largest difference of any leaf, relative to the size of that leaf."""
    differences = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b)) / (1e-30 + np.max(np.abs(a)))), first, second
    )
    return max(jax.tree.leaves(differences))


WAYS = [("jit", 8), ("pmap", 8), ("scan", 1), ("scan", 8)]
# LeNet takes long to compile: the network with statistics tries the chunks of steps.
WAYS_OF = {"lenet5": WAYS[:2], "batch_norm": WAYS}


@pytest.mark.parametrize("name", MODELS)
def test_every_way_agrees_in_float64_over_50_steps(name):
    with jax.enable_x64(True):
        reference = trained(MODELS[name](), "jit", 1, 50, dtype=jnp.float64)
        assert reference[0].params["head"]["kernel"].dtype == np.float64
        for method, devices in WAYS_OF[name]:
            other = trained(MODELS[name](), method, devices, 50, dtype=jnp.float64)
            assert largest_difference(reference, other) < 1e-10, (method, devices)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_agrees_in_float32_over_5_steps(name):
    reference = trained(MODELS[name](), "jit", 1, 5, dtype=jnp.float32)
    for method, devices in WAYS_OF[name]:
        other = trained(MODELS[name](), method, devices, 5, dtype=jnp.float32)
        assert largest_difference(reference, other) < 1e-4, (method, devices)


def test_augmentation_does_not_depend_on_the_devices():
    def augment(key, image, first_index):
        indices = first_index + jnp.arange(image.shape[0])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        noise = jax.vmap(lambda k: jax.random.normal(k, image.shape[1:], image.dtype))(keys)
        return image + 0.1 * noise

    options = {"dtype": jnp.float32, "augment": augment}
    reference = trained(BatchNormNet(), "jit", 1, 3, **options)
    for method, devices in WAYS:
        other = trained(BatchNormNet(), method, devices, 3, **options)
        assert largest_difference(reference, other) < 1e-4, (method, devices)


@pytest.mark.parametrize("method", ["jit", "scan"])
def test_grouping_of_steps_changes_no_bit(method):
    whole = trained(BatchNormNet(), method, 2, 12, dtype=jnp.float32)
    pieces = trained(BatchNormNet(), method, 2, 12, dtype=jnp.float32, chunks=[5, 1, 6])
    jax.tree.map(np.testing.assert_array_equal, whole, pieces)


@pytest.mark.parametrize(("batch_size", "devices"), [(7, 1), (128, 1), (512, 1), (64, 8), (512, 8)])
def test_evaluation_counts_exactly_whatever_the_batch(batch_size, devices):
    model = models.create("lenet5", num_classes=10)
    state, _ = setup(model)
    arrays = mnist.read()["test"]
    mesh = parallel.make_mesh(devices)
    eval_step = parallel.compile_eval(
        lambda axis_name: steps.make_eval_step(
            model, losses.softmax_cross_entropy, num_classes=10, axis_name=axis_name
        ),
        mesh,
    )
    batches = evaluation_batches(arrays, batch_size, sharding=parallel.batch_sharding(mesh))
    result = evaluate.evaluate(eval_step, state.variables(), batches)
    images = np.split(arrays.image / np.float32(255), 10)
    logits = np.concatenate([model.apply(state.variables(), part) for part in images])
    predicted = np.argmax(logits, axis=-1)
    expected = np.zeros((10, 10), int)
    np.add.at(expected, (arrays.label, predicted), 1)
    np.testing.assert_array_equal(result["confusion"], expected)
    assert result["accuracy"] == np.sum(predicted == arrays.label) / 10_000


def test_batch_must_divide_over_the_devices():
    mesh = parallel.make_mesh(8)
    with pytest.raises(UserError, match=r"batch size 30 is not divisible by the 8 devices: use 32"):
        parallel.check_batch_size(30, mesh)


def test_too_many_devices_and_unknown_methods_are_refused():
    with pytest.raises(UserError, match="9 devices asked for, but JAX sees 8 cpu"):
        parallel.make_mesh(9)
    data = ResidentPipeline(ARRAYS, 8, seed=0)
    with pytest.raises(UserError, match="'pnap': did you mean pmap"):
        parallel.choose_method("pnap", data, parallel.make_mesh(1))
