"""Generation: noise that belongs to an image's place, distances of whole splits, what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.data.batches import evaluation_batches
from cnnjax.devices.sharding import batch_sharding, make_mesh
from cnnjax.errors import UserError
from cnnjax.models.dcgan import dcgan
from cnnjax.tasks import generation
from cnnjax.tasks.frechet import frechet_distance, moments
from cnnjax.train import evaluate, gan
from cnnjax.train.evaluate import compile_eval, compile_predict
from cnnjax.train.predict import make_eval_step, make_predict
from cnnjax.train.state import create_state
from tests.tiny import random_arrays

SHAPE, LATENT = (8, 8, 1), 6
KEY = jax.random.key(5)
MODEL = dcgan(SHAPE, width=4, latent_size=LATENT)


def features(image):
    """Means of the quarters of an image."""
    return image.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, 4)


TASK = generation.generation(latent_size=LATENT, features=features, key=KEY)


@pytest.fixture(scope="module")
def variables():
    found = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    # Samples of untrained networks of this size are all but equal.
    return jax.tree.map(lambda leaf: 5 * leaf, found)


@pytest.fixture(scope="module")
def split():
    image = random_arrays(45, SHAPE).image
    return {"image": image, "place": np.arange(45, dtype=np.int32)}


def evaluated(variables, split, batch_size, num_devices):
    mesh = make_mesh(num_devices)
    how = {"normalize": gan.as_symmetric}

    def batches():
        return evaluation_batches(split, batch_size, sharding=batch_sharding(mesh))

    def make(axis_name):
        return make_eval_step(MODEL, TASK, axis_name=axis_name, **how)

    predict = compile_predict(make_predict(MODEL, TASK, **how), mesh)
    predictions, _ = evaluate.predict_all(predict, variables, batches(), keep=["image"])
    measured = evaluate.evaluate(
        compile_eval(make, mesh), variables, batches(), scores_of=TASK.scores
    )
    return evaluate.scores(measured), predictions


@pytest.mark.slow
def test_evaluation_does_not_depend_on_batches_or_devices(variables, split):
    expected, predictions = evaluated(variables, split, 45, 1)
    assert len(np.unique(predictions["sample"], axis=0)) == 45
    for batch_size, num_devices in ((10, 1), (16, 8)):
        found, others = evaluated(variables, split, batch_size, num_devices)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        difference = others["sample"].astype(int) - predictions["sample"]
        assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_scores_are_the_distances_and_the_losses_by_hand(variables, split):
    found, predictions = evaluated(variables, split, 16, 1)
    images = jnp.asarray(split["image"], jnp.float32) / 255
    z, pixels = generation.evaluation_noise(
        KEY, jnp.arange(45), SHAPE, LATENT, generation.uniform_noise
    )
    outputs = MODEL.apply(variables, {"image": 2 * images - 1, "noise": z})
    real, sample = features(images), features((outputs["sample"] + 1) / 2)

    def distance(one, other):
        return frechet_distance(moments(one), moments(other))

    expected = {
        "frechet_distance": distance(sample, real),
        "frechet_distance_of_halves": distance(real[::2], real[1::2]),
        "frechet_distance_of_noise": distance(features(pixels), real),
        "real_accuracy": jnp.mean(outputs["real"] > 0),
        "fake_accuracy": jnp.mean(outputs["fake"] < 0),
        "discriminator_loss": -jnp.mean(
            jax.nn.log_sigmoid(outputs["real"]) + jax.nn.log_sigmoid(-outputs["fake"])
        ),
        "generator_loss": -jnp.mean(jax.nn.log_sigmoid(outputs["fake"])),
    }
    expected["loss"] = expected["discriminator_loss"] + expected["generator_loss"]
    assert found == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-3, abs=1e-5)

    report = TASK.report(predictions, {"image": split["image"]})
    assert report.scores == pytest.approx({k: found[k] for k in report.scores}, rel=1e-3, abs=1e-5)
    assert "45 samples" in report.text and f"{report.scores['frechet_distance']:.3f}" in report.text


def test_samples_are_those_of_evaluation(variables, split, tmp_path, monkeypatch):
    _, predictions = evaluated(variables, split, 45, 1)
    shown = {}
    monkeypatch.setattr(
        generation, "save_sheet", lambda images, path, heading="": shown.update({path: images})
    )
    state = create_state(variables, gan.both_optimizers(optax.sgd(0.1), optax.sgd(0.1)), KEY)
    generation.make_draw(MODEL.generator, key=KEY)(tmp_path, state)
    ((path, images),) = shown.items()
    assert path == tmp_path / "samples" / "step-000000.png"
    difference = np.asarray(images)[:45].astype(int) - predictions["sample"]
    assert np.abs(difference).max() <= 1


def test_figures_are_drawn(split, tmp_path):
    part = np.asarray(split["image"], np.float32) / 255
    found = {name: features(part + n) for n, name in enumerate(("real", "sample", "noise"))}
    report = TASK.report({"sample": split["image"], "features": found}, {"image": split["image"]})
    for name, draw in report.figures.items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert set(report.figures) == {"samples", "images"}


def test_places_are_counted_in_each_split():
    from cnnjax.data.dataset import make_dataset

    dataset = make_dataset(
        "made", [str(n) for n in range(10)], {"train": random_arrays(50), "test": random_arrays(7)}
    )
    placed = generation.with_places(dataset)
    assert placed.test["place"].tolist() == list(range(7))
    np.testing.assert_array_equal(placed.train["image"], dataset.train.image)
    assert len(placed.train["place"]) == 45 and len(placed.validation["place"]) == 5
    with pytest.raises(UserError, match="int32"):
        generation.Place().check("place", np.zeros(3))
