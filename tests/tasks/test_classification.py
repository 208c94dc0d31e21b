"""The first task: its numbers by hand, and a loss of one's own."""

import jax.numpy as jnp
import numpy as np
import pytest

import cnnjax
from cnnjax.tasks.classification import classification

LOGITS = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
BATCH = {"label": np.array([0, 2, 1]), "mask": np.array([True, True, False])}


def hinge(logits, label):
    """Multi-class hinge loss (Crammer and Singer 2001): nothing of the package knows it."""
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    others = jnp.where(jnp.arange(logits.shape[1]) == label[:, None], -jnp.inf, logits)
    return jnp.maximum(0.0, 1.0 + others.max(axis=1) - own[:, 0])


def test_loss_accuracy_and_confusion_by_hand():
    task = classification(3)
    values, weights = task.loss(LOGITS, BATCH)
    by_hand = np.log(np.exp(LOGITS).sum(axis=1)) - LOGITS[np.arange(3), BATCH["label"]]
    np.testing.assert_allclose(values, by_hand, rtol=1e-6)
    np.testing.assert_array_equal(weights, BATCH["mask"])
    found = task.metrics(LOGITS, BATCH)
    assert float(found["loss"][0]) == pytest.approx(by_hand[:2].sum(), rel=1e-6)
    assert (int(found["accuracy"][0]), int(found["accuracy"][1])) == (1, 2)
    np.testing.assert_array_equal(found["confusion"], [[1, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_training_may_weigh_what_evaluation_does_not():
    task = classification(3, training_loss=hinge)
    np.testing.assert_allclose(task.loss(LOGITS, BATCH)[0], [0.0, 4.0, 2.0])
    plain = classification(3)
    assert task.metrics(LOGITS, BATCH)["loss"] == plain.metrics(LOGITS, BATCH)["loss"]


@pytest.mark.slow
def test_a_loss_of_ones_own_trains_a_network(tmp_path):
    digits = cnnjax.data.load("digits")
    task = classification(10, loss=hinge, class_names=digits.class_names)
    trained = cnnjax.run.train(
        "mlp", task, digits, epochs=3, batch_size=32, devices=1, run_dir=str(tmp_path / "run")
    )
    assert trained.summary["test_accuracy"] > 0.85
    assert "class" in (trained.directory / "summary.md").read_text()


def test_of_very_many_classes_pairs_are_not_counted():
    """Their counts would take gigabytes; all else is as with few."""
    num_classes = 1001
    task = classification(num_classes)
    logits = jnp.asarray(np.eye(num_classes, dtype=np.float32)[[3, 1000]])
    found = task.metrics(logits, {"label": jnp.array([3, 7])})
    assert set(found) == {"loss", "accuracy"}
    assert [float(part) for part in found["accuracy"]] == [1, 2]
    report = task.report(np.asarray(task.predict(logits)), {"label": np.array([3, 7])})
    assert "confusion" not in report.scores and "confusion_matrix" not in report.figures
    assert report.scores["accuracy"] == 0.5
    assert report.scores["classes"][3]["recall"] == 1.0
