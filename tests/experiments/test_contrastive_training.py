"""Contrastive training: the same on any devices, whole batches only, of use with few labels."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import models
from cnnjax.augment import two_views
from cnnjax.augment.change import apply_per_image, on_floats
from cnnjax.data.dataset import Dataset, columns
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated, state_shardings
from cnnjax.errors import UserError
from cnnjax.models.projection import Projected
from cnnjax.run import load
from cnnjax.studies import probing
from cnnjax.tasks.contrastive import contrastive, paired
from cnnjax.train import step as steps
from cnnjax.train.compile import compile_train
from cnnjax.train.state import create_state
from experiments import simclr_mnist
from tests.experiments.test_experiments import launch
from tests.tiny import random_arrays
from tests.train.test_compile import largest_difference

ARRAYS = random_arrays(64)
TASK = contrastive(temperature=0.3, class_names=tuple("0123456789"))


@on_floats
def noisy(key, image):
    return image + 0.3 * jax.random.normal(key, image.shape, image.dtype)


def noise(key, batch, first_index):
    return {**batch, "image": apply_per_image(key, batch["image"], noisy, first_index)}


def make(dtype=jnp.float32, **options):
    """Returns (state, make_step) of a small encoder with BatchNorm."""
    encoder = models.create(
        "cnn_32_64", num_classes=None, widths=(4, 8), norm="batch", activation="silu"
    )
    model = Projected(encoder, width=8, features=6)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    optimizer = optax.sgd(0.05, momentum=0.9)

    def make_step(axis_name=None):
        return steps.make_step(
            model,
            optimizer,
            TASK,
            schedule=optax.constant_schedule(0.05),
            normalize=lambda image: image.astype(dtype),
            augment=two_views(noise),
            axis_name=axis_name,
            **options,
        )

    return create_state(variables, optimizer, jax.random.key(1)), make_step


def trained(method, axes, num_steps=3):
    """Trains in float64 in one of the ways; returns the state and the metrics of each step."""
    mesh = make_mesh(axes)
    arrays = columns(ARRAYS) | {"view": ARRAYS.image, "original": ARRAYS.image}
    data = ResidentPipeline(
        arrays,
        16,
        seed=3,
        sharding=batch_sharding(mesh),
        replicated=replicated(mesh),
    )
    state, make_step = make(jnp.float64)
    state = jax.device_put(state, state_shardings(state, mesh))
    train = compile_train(make_step, state, data, method=method, mesh=mesh)
    ((state, metrics),) = train(state, 0, [num_steps])
    return jax.device_get(state.replace(key=None)), metrics


@pytest.fixture(scope="module")
def on_one_device():
    with jax.enable_x64(True):
        return trained("jit", "data=1")


@pytest.mark.parametrize(
    ("method", "axes"),
    [
        ("jit", "data=8"),
        pytest.param("pmap", "data=8", marks=pytest.mark.slow),
        pytest.param("scan", "data=4", marks=pytest.mark.slow),
        pytest.param("jit", "data=4,model=2", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_on_any_devices(on_one_device, method, axes):
    """Negatives, views, BatchNorm's statistics and metrics are those of the whole batch."""
    with jax.enable_x64(True):
        found = trained(method, axes)
    # Of equal cosines rounding decides which is the nearest.
    for _, metrics in (on_one_device, found):
        metrics.pop("contrastive_accuracy", None)
    assert largest_difference(on_one_device, found) < 1e-9


def test_microbatches_are_refused():
    _, make_step = make(accumulate=2)
    with pytest.raises(UserError, match="accumulate 2: the loss of this task needs all examples"):
        make_step()


def test_pairs_hold_two_fixed_views_of_each_evaluated_image():
    splits = [random_arrays(size, seed=size) for size in (12, 6, 5)]
    dataset = Dataset("made", tuple("0123456789"), *splits, mean=(0.5,), std=(0.3,))
    found = paired(dataset, noise, seed=0)
    assert found.train["view"] is found.train["image"] is found.train["original"]
    for split, arrays in ((found.validation, dataset.validation), (found.test, dataset.test)):
        assert split["original"] is arrays.image
        for one, other in itertools.combinations(("image", "view", "original"), 2):
            assert split[one].dtype == np.uint8
            assert (split[one] != split[other]).any(axis=(1, 2, 3)).all()
    assert found.checksum == paired(dataset, noise, seed=0).checksum
    assert found.checksum != paired(dataset, noise, seed=1).checksum


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "simclr"
    flags = ["--smoke", "--devices", "1", "--run-dir", directory, "--labels", "2"]
    assert launch(simclr_mnist, *flags) == 0
    return directory


@pytest.mark.slow
def test_a_run_leaves_its_encoder_scores_and_comparison(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {"test_loss", "test_contrastive_accuracy"} <= set(summary)
    assert (run / "figures" / "embedding.png").exists()
    found = json.loads((run / "probe-2.json").read_text())["accuracy"]
    assert set(found) == set(probing.WAYS)
    assert all(len(accuracies) == 2 for accuracies in found.values())
    table = (run / "probe-2.md").read_text()
    assert "| linear probe |" in table and "2 labels of each class" in table


@pytest.mark.slow
def test_a_run_is_read_back_as_its_encoder(run):
    trained_model = load.load_trained(run)
    variables, _ = load.load_variables(run)
    images = np.asarray(ARRAYS.image[:7])
    whole = Projected(trained_model.model).apply(variables, trained_model.normalize(images))
    found = probing.frozen_features(trained_model)(images)
    np.testing.assert_allclose(found, whole["features"], rtol=1e-4, atol=1e-5)
    names = set(load.read_base(run).variables["params"])
    assert names == set(variables["params"]["encoder"]) >= {"conv1", "norm1", "dense1"}


def test_the_table_has_means_and_intervals_by_hand():
    found = {"linear probe": [0.9, 0.92, 0.94], "from scratch": [0.5, 0.5, 0.5]}
    table = probing.markdown(found, labels=10, test_examples=1000)
    # Student's t for 2 degrees of freedom is 4.3027: 4.3027 * 0.02 / sqrt(3) = 0.0497.
    assert "| linear probe | 92.00 ± 4.97 | 90.00 | 94.00 |" in table
    assert "| from scratch | 50.00 ± 0.00 | 50.00 | 50.00 |" in table
