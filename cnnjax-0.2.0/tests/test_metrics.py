"""Metrics against scikit-learn, hand computation, and themselves cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import metrics
from cnnjax.errors import UserError
from tests.transforms import Case, assert_covered, check_transforms

RANDOM = np.random.default_rng(0)
# Rounded, so that there are ties.
LOGITS = np.round(RANDOM.normal(size=(40, 5)).astype(np.float32) * 4) / 4
LABELS = RANDOM.integers(0, 5, 40).astype(np.int32)
MASK = RANDOM.random(40) < 0.8
PROBABILITIES = np.asarray(jax.nn.softmax(LOGITS))
CONFUSION = RANDOM.integers(0, 9, (5, 5)).astype(np.int32)
PAIRS = {"loss": (np.float32(6.0), np.int32(4)), "accuracy": (np.int32(3), np.int32(4))}

CASES = [
    Case("mean", metrics.mean, (LOGITS[:, 0], MASK), (0,)),
    Case("accuracy", metrics.accuracy, (LOGITS, LABELS, MASK)),
    Case(
        "top_k_accuracy",
        lambda *arrays: metrics.top_k_accuracy(*arrays, k=2),
        (LOGITS, LABELS, MASK),
    ),
    Case("predicted_label", metrics.predicted_label, (LOGITS,)),
    Case("probabilities", metrics.probabilities, (LOGITS[:4],), (0,)),
    Case("probabilities one-logit", metrics.probabilities, (LOGITS[:4, :1],), (0,)),
    Case(
        "confusion_counts",
        lambda labels, predictions, mask: metrics.confusion_counts(labels, predictions, mask, 5),
        (LABELS, LABELS[::-1], MASK),
    ),
    Case("merge", metrics.merge, (PAIRS, PAIRS)),
    Case("pairs", metrics.pairs, (PAIRS,)),
    Case("finalize", metrics.finalize, (PAIRS,)),
    Case("precision_recall_f1", metrics.precision_recall_f1, (CONFUSION,)),
    Case("macro_average", metrics.macro_average, (CONFUSION,)),
    Case("micro_average", metrics.micro_average, (CONFUSION,)),
    Case("roc_auc", metrics.roc_auc, (LOGITS[:, 0], LABELS == 0, MASK)),
    Case("roc_auc_one_vs_rest", metrics.roc_auc_one_vs_rest, (PROBABILITIES, LABELS, MASK)),
    Case(
        "expected_calibration_error",
        metrics.expected_calibration_error,
        (RANDOM.dirichlet(np.ones(5), 40).astype(np.float32), LABELS, MASK),
        (0,),
    ),
]


def test_every_public_function_has_a_case():
    # Those of float64 counts on the host are computed by hand below.
    assert_covered(metrics, CASES, exempt=("iou", "dice", "class_mean"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms(case):
    check_transforms(case)


def test_mean_and_counts_by_hand_and_padding_counts_nowhere():
    values = np.array([1.0, 2.0, np.nan, 4.0], np.float32)
    total, count = metrics.mean(values, np.array([True, True, False, True]))
    assert (total, count) == (7.0, 3)
    assert count.dtype == jnp.int32
    assert metrics.mean(jnp.ones(3000, jnp.bfloat16))[0] == 3000.0
    logits = np.array([[2.0, 1.0], [1.0, 2.0], [np.nan, np.nan], [5.0, 0.0]], np.float32)
    right, count = metrics.accuracy(logits, np.array([0, 0, 1, 0]), np.array([1, 1, 0, 1], bool))
    assert (right, count) == (2, 3)
    assert right.dtype == count.dtype == jnp.int32


def test_accuracy_and_top_k_are_scikit_learns():
    # Without ties, which scikit-learn breaks the other way.
    logits = RANDOM.normal(size=(40, 5)).astype(np.float32)
    right, count = metrics.accuracy(logits, LABELS, MASK)
    expected = sklearn.metrics.accuracy_score(LABELS[MASK], logits[MASK].argmax(1), normalize=False)
    assert (right, count) == (expected, MASK.sum())
    for k in range(1, 5):
        right, count = metrics.top_k_accuracy(logits, LABELS, MASK, k=k)
        expected = sklearn.metrics.top_k_accuracy_score(
            LABELS[MASK], logits[MASK], k=k, normalize=False
        )
        assert (right, count) == (expected, MASK.sum())


def test_top_k_breaks_ties_as_the_prediction_does():
    assert metrics.top_k_accuracy(LOGITS, LABELS, MASK, k=1) == metrics.accuracy(
        LOGITS, LABELS, MASK
    )
    equal = np.zeros((5, 5), np.float32)
    assert metrics.top_k_accuracy(equal, np.arange(5), k=3)[0] == 3
    assert metrics.top_k_accuracy(LOGITS, LABELS, k=5)[0] == 40


def test_a_row_with_a_nan_is_never_right():
    logits = np.array([[np.nan, 1.0], [np.nan, np.nan], [1.0, 0.0]], np.float32)
    labels = np.array([0, 0, 0])
    assert metrics.accuracy(logits, labels)[0] == 1
    assert metrics.top_k_accuracy(logits, labels, k=2)[0] == 1
    assert metrics.accuracy(np.array([[np.nan]]), np.array([0]))[0] == 0


def test_one_logit_is_class_one_where_positive():
    logits = np.array([[-2.0], [0.5], [0.0], [40.0]], np.float32)
    np.testing.assert_array_equal(metrics.predicted_label(logits), [0, 1, 0, 1])
    assert metrics.accuracy(logits, np.array([0, 1, 1, 1]))[0] == 3
    assert metrics.accuracy(logits, np.array([[0], [1], [1], [1]]))[0] == 3
    both = np.asarray(metrics.probabilities(logits), np.float64)
    np.testing.assert_allclose(both[:, 1], 1 / (1 + np.exp(-logits[:, 0])), rtol=1e-6)
    np.testing.assert_allclose(both[3, 0], np.exp(-40.0), rtol=1e-5)


def test_probabilities_of_low_precision_logits_are_float32():
    rows = metrics.probabilities(jnp.asarray(LOGITS, jnp.bfloat16))
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows.sum(1), 1.0, rtol=1e-6)


def test_soft_labels_count_by_their_heaviest_class():
    soft = 0.7 * np.eye(5)[LABELS] + 0.06
    assert metrics.accuracy(LOGITS, soft, MASK) == metrics.accuracy(LOGITS, LABELS, MASK)
    assert metrics.accuracy(np.array([[1.0], [-1.0]]), np.array([0.8, 0.3]))[0] == 2


def test_confusion_counts_are_scikit_learns_and_ignore_what_is_no_class():
    predicted = np.asarray(metrics.predicted_label(LOGITS))
    counts = metrics.confusion_counts(LABELS, predicted, MASK, 5)
    assert counts.dtype == jnp.int32
    expected = sklearn.metrics.confusion_matrix(LABELS[MASK], predicted[MASK], labels=range(5))
    np.testing.assert_array_equal(counts, expected)
    strange = metrics.confusion_counts(np.array([0, -1, 2, 1]), np.array([1, 0, 0, -1]), None, 2)
    np.testing.assert_array_equal(strange, [[0, 1], [0, 0]])
    # 16 * 16 does not fit into the labels' own dtype.
    small = np.full(3, 15, np.uint8)
    assert metrics.confusion_counts(small, small, None, 16)[15, 15] == 3


@pytest.mark.parametrize("cut", [7, 20])
def test_merged_batches_are_the_whole(cut):
    def of(part):
        arrays = LOGITS[part], LABELS[part], MASK[part]
        predicted = metrics.predicted_label(arrays[0])
        return {
            "accuracy": metrics.accuracy(*arrays),
            "confusion": metrics.confusion_counts(arrays[1], predicted, arrays[2], 5),
        }

    merged = metrics.merge(of(slice(0, cut)), of(slice(cut, None)))
    whole = of(slice(None))
    jax.tree.map(np.testing.assert_array_equal, merged, whole)


def test_finalize_divides_exactly_and_says_nan_of_nothing():
    result = metrics.finalize(
        {
            "accuracy": (np.int32(9912), np.int32(10000)),
            "loss": (jnp.float32(0.0), jnp.int32(0)),
            "confusion": np.zeros((2, 2), np.int32),
        }
    )
    assert result.keys() == {"accuracy", "loss"}
    assert result["accuracy"] == 0.9912 and type(result["accuracy"]) is float
    assert np.isnan(result["loss"])


@pytest.mark.parametrize("absent", ["nothing", "examples", "predictions", "class"])
def test_scores_by_class_are_scikit_learns(absent):
    labels, predicted = LABELS.copy(), np.asarray(metrics.predicted_label(LOGITS)).copy()
    if absent in ("examples", "class"):
        labels[labels == 2] = 1
    if absent in ("predictions", "class"):
        predicted[predicted == 2] = 3
    counts = metrics.confusion_counts(labels, predicted, None, 5)
    expected = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(5), zero_division=0
    )
    result = metrics.precision_recall_f1(counts)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose(result[name], column, rtol=1e-6)
    for average, function in (("macro", metrics.macro_average), ("micro", metrics.micro_average)):
        expected = sklearn.metrics.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        result = function(counts)
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            np.testing.assert_allclose(result[name], value, rtol=1e-6)


def test_averages_of_nothing_are_nan():
    empty = np.zeros((3, 3), np.int32)
    assert np.isnan(metrics.macro_average(empty)["f1"])
    assert np.isnan(metrics.micro_average(empty)["f1"])
    np.testing.assert_array_equal(metrics.precision_recall_f1(empty)["f1"], 0.0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), levels=st.integers(1, 30))
def test_roc_auc_is_scikit_learns_ties_and_padding_included(seed, levels):
    random = np.random.default_rng(seed)
    scores = random.integers(0, levels, 60).astype(np.float32)
    scores[random.random(60) < 0.1] = np.inf
    positives = random.random(60) < 0.4
    mask = random.random(60) < 0.8
    positives[:2], mask[:2] = (True, False), True
    finite = np.where(np.isinf(scores), 1e6, scores)
    expected = sklearn.metrics.roc_auc_score(positives[mask], finite[mask])
    np.testing.assert_allclose(metrics.roc_auc(scores, positives, mask), expected, rtol=1e-6)


def test_roc_auc_by_hand_and_where_it_is_not_defined():
    # Of the pairs (0.8, 0.5), (0.8, 0.2), (0.5, 0.5), (0.5, 0.2) three are right, one is a tie.
    scores, positives = np.array([0.8, 0.5, 0.5, 0.2]), np.array([1, 1, 0, 0])
    assert metrics.roc_auc(scores, positives) == 0.875
    assert np.isnan(metrics.roc_auc(scores, np.ones(4)))
    assert np.isnan(metrics.roc_auc(scores, np.zeros(4)))
    assert np.isnan(metrics.roc_auc(np.array([0.8, np.nan, 0.5, 0.2]), positives))
    padded = np.array([0.8, 0.5, 0.5, 0.2, np.nan])
    mask = np.array([True, True, True, True, False])
    assert metrics.roc_auc(padded, np.array([1, 1, 0, 0, 1]), mask) == 0.875


def test_roc_auc_one_vs_rest_is_scikit_learns_and_nan_for_an_absent_class():
    areas = metrics.roc_auc_one_vs_rest(PROBABILITIES, LABELS, MASK)
    expected = sklearn.metrics.roc_auc_score(
        LABELS[MASK], PROBABILITIES[MASK], multi_class="ovr", average=None
    )
    np.testing.assert_allclose(areas, expected, rtol=1e-6)
    areas = metrics.roc_auc_one_vs_rest(PROBABILITIES, np.where(LABELS == 2, 1, LABELS))
    np.testing.assert_array_equal(np.isnan(areas), [False, False, True, False, False])


def test_roc_auc_keeps_its_precision_on_many_examples():
    random = np.random.default_rng(1)
    positives = random.random(100_000) < 0.5
    scores = (random.normal(size=100_000) + positives).astype(np.float32)
    expected = sklearn.metrics.roc_auc_score(positives, scores)
    np.testing.assert_allclose(jax.jit(metrics.roc_auc)(scores, positives), expected, rtol=1e-6)


def test_expected_calibration_error_by_hand():
    # Two bins. (0, 0.5]: confidence 0.5, wrong. (0.5, 1]: confidences 0.9 and 0.7, one right.
    rows = np.array([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]], np.float32)
    labels = np.array([1, 0, 0])
    by_hand = 1 / 3 * abs(0 - 0.5) + 2 / 3 * abs(0.5 - 0.8)
    error = metrics.expected_calibration_error(rows, labels, num_bins=2)
    np.testing.assert_allclose(error, by_hand, rtol=1e-6)
    padded = np.concatenate([rows, np.full((1, 2), np.nan, np.float32)])
    mask = np.array([True, True, True, False])
    error = metrics.expected_calibration_error(padded, np.append(labels, 0), mask, num_bins=2)
    np.testing.assert_allclose(error, by_hand, rtol=1e-6)
    assert np.isnan(metrics.expected_calibration_error(rows, labels, np.zeros(3, bool)))


def test_expected_calibration_error_is_its_definition():
    random = np.random.default_rng(3)
    rows = random.dirichlet(np.full(5, 0.3), 500).astype(np.float32)
    labels = random.integers(0, 5, 500)
    confidence, right = rows.max(1), rows.argmax(1) == labels
    expected = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean(dtype=np.float64))
            expected += inside.mean() * gap
    np.testing.assert_allclose(
        metrics.expected_calibration_error(rows, labels), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: metrics.accuracy(LOGITS, LABELS[:1]), r"labels \[1\] for predictions \[40\]"),
        (lambda: metrics.mean(LOGITS[:, 0], MASK[:1]), r"mask has shape \[1\].*\[40\]"),
        (lambda: metrics.top_k_accuracy(LOGITS, LABELS, k=6), "number of classes 5, not 6"),
        (lambda: metrics.confusion_counts(LABELS, LABELS), "num_classes"),
        (
            lambda: metrics.expected_calibration_error(PROBABILITIES, LABELS, num_bins=0),
            "num_bins must be 1 or more",
        ),
        (
            lambda: metrics.merge({"loss": (1, 1)}, {"accuracy": (1, 1)}),
            r"\['loss'\] and \['accuracy'\]",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(call, text):
    with pytest.raises(UserError, match=text) as error:
        call()
    assert "\n" not in str(error.value)


def test_iou_and_dice_by_hand():
    """Two classes of which one is over-predicted, and one that is nowhere."""
    confusion = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    np.testing.assert_allclose(metrics.iou(confusion), [6 / 9, 3 / 6, np.nan])
    np.testing.assert_allclose(metrics.dice(confusion), [12 / 15, 6 / 9, np.nan])
    assert metrics.class_mean(metrics.iou(confusion)) == pytest.approx((6 / 9 + 3 / 6) / 2)
    f1 = metrics.precision_recall_f1(confusion)["f1"]
    np.testing.assert_allclose(metrics.dice(confusion)[:2], f1[:2], rtol=1e-6)


def test_iou_of_a_class_that_is_only_predicted_is_zero():
    np.testing.assert_array_equal(metrics.iou([[2, 1], [0, 0]]), [2 / 3, 0.0])


def test_iou_of_nothing_has_no_mean():
    assert np.isnan(metrics.class_mean(metrics.iou(np.zeros((2, 2), int))))


def test_iou_is_exact_for_more_pixels_than_int32_holds():
    many = np.array([[2**40, 2**40], [0, 2**41]], np.int64)
    np.testing.assert_array_equal(metrics.iou(many), [1 / 2, 2 / 3])
