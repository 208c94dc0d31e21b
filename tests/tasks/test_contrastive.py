"""The contrastive task: what is forwarded, compared, measured and shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import metrics
from cnnjax.tasks import nt_xent
from cnnjax.tasks.contrastive import contrastive, neighbor_accuracy
from cnnjax.tasks.task import Forward

TASK = contrastive(temperature=0.2, class_names=("a", "b", "c"))
GENERATOR = np.random.default_rng(0)
WEIGHTS = jnp.asarray(GENERATOR.normal(size=(16, 6)), jnp.float32)
BATCH = {
    "image": jnp.asarray(GENERATOR.uniform(size=(16, 4, 4, 1)), jnp.float32),
    "label": jnp.arange(16, dtype=jnp.int32) % 3,
    "mask": jnp.arange(16) != 13,
}
BATCH["original"] = BATCH["image"][::-1]
BATCH["view"] = BATCH["image"] + 0.1 * jnp.asarray(GENERATOR.normal(size=(16, 4, 4, 1)))


def forward(axis_name=None):
    """A linear encoder whose projection is its tanh, and whose statistics are the rows it saw."""

    def apply(params, x, train):
        features = x.reshape(len(x), -1) @ params
        return {"features": features, "projection": jnp.tanh(features)}, {"seen": len(x) * train}

    return Forward(apply, WEIGHTS, axis_name=axis_name)


def embeddings(name="projection"):
    """Returns `[batch, 2, ...]`, one view at a time."""
    views = [forward()(BATCH[key], train=True)[0][name] for key in ("image", "view")]
    return jnp.stack(views, axis=1)


def test_both_views_are_one_batch_of_the_model():
    outputs, batch_stats = TASK.apply(forward(), BATCH, train=True)
    assert batch_stats == {"seen": 32}
    np.testing.assert_allclose(outputs["views"], embeddings(), rtol=1e-6)


def test_the_loss_is_nt_xent_and_padding_has_no_weight():
    outputs, _ = TASK.apply(forward(), BATCH, train=True)
    values, weights = TASK.loss(outputs, BATCH)
    expected = nt_xent.nt_xent(embeddings(), temperature=0.2, mask=BATCH["mask"])
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_array_equal(weights, np.stack([BATCH["mask"]] * 2, axis=1))


def test_contrastive_accuracy_is_how_often_the_nearest_other_is_the_other_view():
    outputs, _ = TASK.apply(forward(), BATCH, train=False)
    found = metrics.finalize(TASK.metrics(outputs, BATCH))
    rows = np.asarray(embeddings())[np.asarray(BATCH["mask"])].reshape(30, 6)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    right = cosines.argmax(1) == np.arange(30) ^ 1
    assert 0.2 < right.mean() < 1
    assert found["contrastive_accuracy"] == pytest.approx(right.mean())
    values, weights = TASK.loss(outputs, BATCH)
    assert found["loss"] == pytest.approx(float(values[weights].mean()), rel=1e-5)


def test_metrics_over_devices_are_those_of_the_whole_batch():
    def measured(batch):
        outputs, _ = TASK.apply(forward("data"), batch, train=False)
        return jax.lax.psum(TASK.metrics(outputs, batch), "data")

    outputs, _ = TASK.apply(forward(), BATCH, train=False)
    expected = TASK.metrics(outputs, BATCH)
    parts = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), BATCH)
    found = jax.tree.map(lambda x: x[0], jax.pmap(measured, axis_name="data")(parts))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)


def test_what_is_predicted_are_the_features_of_the_original():
    outputs, _ = TASK.apply(forward(), BATCH, train=False)
    expected = embeddings("features")[::-1, 0]
    np.testing.assert_allclose(TASK.predict(outputs), expected, rtol=1e-5)


def test_neighbor_accuracy_leaves_the_example_itself_out():
    # By angle: 0 and 1 are neighbors of one class; 2 and 3 neighbors of different classes.
    features = np.array([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0], [-0.1, 3.0]])
    assert neighbor_accuracy(features, [0, 0, 1, 2]) == 0.5
    assert np.isnan(neighbor_accuracy(features[:1], [0]))


def test_the_report_scores_the_neighbors_and_draws_the_classes(tmp_path):
    labels = np.arange(60, dtype=np.int32) % 3
    features = 3 * np.eye(3)[labels] + GENERATOR.normal(size=(60, 3)) * 0.1
    report = TASK.report(features, {"label": labels})
    assert report.scores == {"examples": 60, "neighbor_accuracy": 1.0}
    assert "1.0000" in report.text
    report.figures["embedding"](tmp_path / "embedding.png")
    assert (tmp_path / "embedding.png").stat().st_size > 5000


def test_the_task_says_that_it_needs_the_whole_batch():
    assert TASK.needs_whole_batch and TASK.monitor == ("loss", "min")
