"""Evaluation adds up exactly, whatever the batches, and its scores are those of scikit-learn."""

import json
import math
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from cnnjax import metrics
from cnnjax.errors import UserError
from cnnjax.tasks.class_scores import confusion, format_report, report
from cnnjax.train.evaluate import evaluate, predict_all, scores


def padded_batches(
    arrays: dict[str, np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Cuts arrays into batches; the padding holds values that would spoil any result."""
    count = len(arrays["label"])
    for start in range(0, count, batch_size):
        part = {name: array[start : start + batch_size] for name, array in arrays.items()}
        missing = batch_size - len(part["label"])
        mask = np.arange(batch_size) < batch_size - missing
        yield {
            "image": np.concatenate(
                [part["image"], np.full((missing, *part["image"].shape[1:]), np.nan, np.float32)]
            ),
            "label": np.concatenate([part["label"], np.full(missing, 1, np.int32)]),
            "mask": mask,
        }


@jax.jit
def constant_model_step(variables: jax.Array, batch: dict[str, jax.Array]) -> dict[str, Any]:
    """A model of constant logits `variables`; its loss is the label's negative logit."""
    label, mask = batch["label"], batch["mask"]
    logits = jnp.broadcast_to(variables, (label.shape[0], variables.shape[0]))
    return {
        "loss": metrics.mean(-variables[label], mask),
        "accuracy": metrics.accuracy(logits, label, mask),
        "confusion": metrics.confusion_counts(label, metrics.predicted_label(logits), mask, 3),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7])
def test_constant_model_by_hand(batch_size: int) -> None:
    data = {
        "image": np.zeros((5, 2, 2, 1), np.float32),
        "label": np.array([0, 1, 1, 2, 1], np.int32),
    }
    result = evaluate(
        constant_model_step, jnp.array([0.0, 2.0, 1.0]), padded_batches(data, batch_size)
    )
    assert result["loss"] == -(0 + 2 + 2 + 1 + 2) / 5
    assert result["accuracy"] == 3 / 5
    expected = np.array([[0, 1, 0], [0, 3, 0], [0, 1, 0]])
    np.testing.assert_array_equal(result["confusion"], expected)
    assert scores(result) == {"loss": -1.4, "accuracy": 0.6}


def test_counts_beyond_int32_and_sums_beyond_float32_stay_exact() -> None:
    def step(variables: float, batch: int) -> dict[str, Any]:
        big = np.int32(2**30)
        return {"loss": (np.float32(variables), big), "confusion": np.full((2, 2), big, np.int32)}

    result = evaluate(step, 2.0**24 + 2, range(9))
    assert result["confusion"].tolist() == [[9 * 2**30] * 2] * 2
    assert result["loss"] == (2**24 + 2) / 2**30
    drop = evaluate(lambda _, value: {"loss": (np.float32(value), 1)}, None, [2.0**24, 1.0, 1.0])
    assert drop["loss"] == (2**24 + 2) / 3


def test_bfloat16_sums_are_numbers() -> None:
    step = lambda variables, batch: {"loss": (jnp.bfloat16(1.5), 2)}  # noqa: E731
    assert evaluate(step, None, [0, 1]) == {"loss": 0.75}


def test_nothing_counted_is_nan_and_no_batches_an_error() -> None:
    batch = {
        "image": np.zeros((2, 1, 1, 1), np.float32),
        "label": np.zeros(2, np.int32),
        "mask": np.zeros(2, bool),
    }
    assert math.isnan(evaluate(constant_model_step, jnp.zeros(3), [batch])["accuracy"])
    with pytest.raises(UserError, match="no batches to evaluate"):
        evaluate(constant_model_step, jnp.zeros(3), [])
    with pytest.raises(UserError, match="no batches to evaluate"):
        predict_all(lambda variables, batch: batch["image"], None, [])


def test_batches_are_dispatched_ahead_but_not_all() -> None:
    """With a result that reports when it is read: some are pending, never more than a few."""
    sent, read = [], []

    class Pending:
        def __init__(self, number: int) -> None:
            self.number = number

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            read.append(self.number)
            return np.array(1)

    def step(variables: Any, batch: int) -> dict[str, Any]:
        sent.append((batch, len(set(read))))
        return {"count": Pending(batch)}

    evaluate(step, None, range(40))
    behind = [batch - done for batch, done in sent]
    assert max(behind) > 1
    assert max(behind) < 20


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(count=st.integers(1, 40), batch_size=st.sampled_from([1, 4, 7, 16, 64]))
def test_predict_all_keeps_order_and_drops_padding(count: int, batch_size: int) -> None:
    image = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1) / 64
    label = (np.arange(count) % 2).astype(np.int32)

    def predict(variables: float, batch: dict[str, np.ndarray]) -> jax.Array:
        probability = jnp.asarray(batch["image"])[:, 0, 0, 0] * variables
        return jnp.stack([1 - probability, probability], axis=1)

    batches = padded_batches({"image": image, "label": label}, batch_size)
    probabilities, kept = predict_all(predict, 0.5, batches)
    labels = kept["label"]
    assert probabilities.dtype == np.float32
    np.testing.assert_array_equal(probabilities[:, 1], np.arange(count) / 128)
    np.testing.assert_array_equal(labels, label)


def random_predictions(
    seed: int, count: int, num_classes: int, sharpness: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    logits = generator.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += sharpness
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum(1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 5])
def test_report_agrees_with_scikit_learn(num_classes: int) -> None:
    probabilities, labels = random_predictions(0, 300, num_classes)
    predicted = probabilities.argmax(1)
    names = [f"class {number}" for number in range(num_classes)]
    result = report(probabilities, labels, names)
    assert result["accuracy"] == sklearn.metrics.accuracy_score(labels, predicted)
    assert result["confusion"] == sklearn.metrics.confusion_matrix(labels, predicted).tolist()
    expected = sklearn.metrics.classification_report(
        labels, predicted, target_names=names, output_dict=True
    )
    for row in result["classes"]:
        theirs = expected[row["name"]]
        assert row["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
        assert row["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
        assert row["f1"] == pytest.approx(theirs["f1-score"], abs=1e-6)
        assert row["examples"] == theirs["support"]
    assert result["macro"]["f1"] == pytest.approx(expected["macro avg"]["f1-score"], abs=1e-6)
    assert result["micro"]["f1"] == pytest.approx(result["accuracy"], abs=1e-6)
    areas = [
        sklearn.metrics.roc_auc_score(labels == number, probabilities[:, number])
        for number in range(num_classes)
    ]
    assert [row["roc_auc"] for row in result["classes"]] == pytest.approx(areas, abs=1e-6)
    assert result["macro"]["roc_auc"] == pytest.approx(np.mean(areas), abs=1e-6)


def test_report_by_hand() -> None:
    probabilities = np.array([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.1, 0.9, 0.0]], np.float32)
    result = report(probabilities, [0, 0, 1], ["cat", "dog", "eel"])
    assert result["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    cat, dog, eel = result["classes"]
    assert (cat["precision"], cat["recall"], cat["examples"]) == (1.0, 0.5, 2)
    assert (dog["precision"], dog["recall"], dog["roc_auc"]) == (0.5, 1.0, 1.0)
    assert (eel["examples"], eel["roc_auc"]) == (0, None)
    assert result["macro"]["roc_auc"] == 1.0
    # Each confidence is alone in its bin: 0.8 right, 0.6 wrong, 0.9 right.
    assert result["expected_calibration_error"] == pytest.approx((0.2 + 0.6 + 0.1) / 3, abs=1e-6)
    json.dumps(result, allow_nan=False)


def test_format_report() -> None:
    probabilities = np.array([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.1, 0.9, 0.0]], np.float32)
    text = format_report(report(probabilities, [0, 0, 1], ["cat", "dog", "eel"]))
    assert text.splitlines() == [
        "accuracy                    0.6667  (2 of 3 right)",
        "expected calibration error  0.3000",
        "",
        "class          precision     recall         F1    ROC AUC   examples",
        "cat               1.0000     0.5000     0.6667     1.0000          2",
        "dog               0.5000     1.0000     0.6667     1.0000          1",
        "eel               0.0000     0.0000     0.0000          -          0",
        "",
        "macro average     0.7500     0.7500     0.6667     1.0000          3",
        "micro average     0.6667     0.6667     0.6667          -          3",
    ]


def test_misfits_are_explained() -> None:
    probabilities = np.full((4, 3), 1 / 3, np.float32)
    with pytest.raises(UserError, match=r"probabilities \[4, 3\] and labels \[5\] do not fit"):
        confusion(probabilities, np.zeros(5, int))
    with pytest.raises(UserError, match="label 3 is not one of the 3 classes"):
        confusion(probabilities, np.array([0, 1, 2, 3]))
    with pytest.raises(UserError, match="2 class names for 3 columns"):
        report(probabilities, np.zeros(4, int), ["a", "b"])
