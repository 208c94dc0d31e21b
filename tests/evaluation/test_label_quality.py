"""Ranking, balance and noise: by hand, and on data whose wrong labels are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.data.dataset import Arrays, make_dataset
from cnnjax.errors import UserError
from cnnjax.evaluation import label_quality

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])


def test_scores_by_hand():
    labels = [0, 1, 2]
    np.testing.assert_allclose(
        label_quality.loss_score(PROBABILITIES, labels), -np.log([0.7, 0.2, 0.5])
    )
    np.testing.assert_allclose(label_quality.margin_score(PROBABILITIES, labels), [-0.5, 0.5, 0])
    errors = [[-0.3, 0.2, 0.1], [0.7, -0.8, 0.1], [0, 0.5, -0.5]]
    np.testing.assert_allclose(
        label_quality.el2n_score(PROBABILITIES, labels), np.linalg.norm(errors, axis=1)
    )
    order, scores = label_quality.rank("margin", [PROBABILITIES, PROBABILITIES[::-1]], labels)
    np.testing.assert_allclose(
        scores, [(-0.5 + 0.5) / 2, (0.5 + 0.5) / 2, (0 + 0.6) / 2], atol=1e-12
    )
    assert order.tolist() == [1, 2, 0]


def test_a_label_without_probability_has_a_finite_loss():
    assert np.isfinite(label_quality.loss_score([[1.0, 0.0]], [1])).all()


def test_detection_by_hand():
    is_wrong = np.array([True, False, True, False, False, True, False, False])
    found = label_quality.detection([0, 2, 1, 5, 3, 4, 6, 7], is_wrong, precision=0.75)
    assert (found["count"], found["recall"], found["precision_at_count"]) == (4, 1.0, 0.75)
    assert found["average_precision"] == pytest.approx((1 + 1 + 0.75) / 3)
    assert found["share"] == 3 / 8
    nothing = label_quality.detection([1, 0], [True, False], precision=0.9)
    assert (nothing["count"], nothing["recall"]) == (0, 0.0)


@settings(max_examples=20)
@given(share=st.floats(0, 1), num_classes=st.integers(2, 12), seed=st.integers(0, 9))
def test_exactly_the_share_is_flipped_and_never_to_itself(share, num_classes, seed):
    labels = np.random.default_rng(seed).integers(0, num_classes, 301)
    noisy, is_flipped = label_quality.flip_labels(labels, share, num_classes, seed)
    assert is_flipped.sum() == round(share * 301)
    np.testing.assert_array_equal(noisy != labels, is_flipped)
    assert noisy.dtype == np.int32
    assert ((noisy >= 0) & (noisy < num_classes)).all()
    again, _ = label_quality.flip_labels(labels, share, num_classes, seed)
    np.testing.assert_array_equal(noisy, again)


def test_flipped_labels_are_uniform_over_the_other_classes():
    noisy, is_flipped = label_quality.flip_labels(np.zeros(9000, int), 1.0, 4, 0)
    assert is_flipped.all()
    np.testing.assert_allclose(np.bincount(noisy) / 9000, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.02)


def test_class_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 3], [50, 30, 5])
    weights = label_quality.class_weights(labels, 4)
    wanted = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(weights, [wanted[0], wanted[1], 0, wanted[2]], rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1, rel=1e-6)


def test_resampling_makes_classes_equal_and_leaves_nobody_out():
    labels = np.array([0] * 7 + [1] * 3 + [2])
    chosen = label_quality.balanced_indices(labels, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [7, 7, 7]
    times = np.bincount(chosen)
    assert times[:7].tolist() == [1] * 7
    assert sorted(times[7:10]) == [2, 2, 3]
    assert times[10] == 7


def made(examples=40):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (examples, 2, 2, 1)).astype(np.uint8)
    label = (np.arange(examples) % 4).astype(np.int32)
    splits = {"train": Arrays(image, label), "test": Arrays(image[:8], label[:8])}
    return make_dataset("made", list("abcd"), splits, validation=8)


def test_training_data_are_changed_in_order_and_nothing_else(tmp_path):
    dataset = made()
    assert label_quality.prepare(dataset) is dataset
    fewer = label_quality.prepare(dataset, train_examples=20, seed=1)
    noisy = label_quality.prepare(dataset, train_examples=20, label_noise=0.25, seed=1)
    np.testing.assert_array_equal(fewer.train.image, noisy.train.image)
    assert (fewer.train.label != noisy.train.label).sum() == 5
    # As some editors write it: a byte-order mark, lines ended by two characters.
    (tmp_path / "exclude.txt").write_bytes(b"\xef\xbb\xbf0\r\n3\r\n")
    clean = label_quality.prepare(
        dataset, train_examples=20, label_noise=0.25, exclude=tmp_path / "exclude.txt", seed=1
    )
    kept = np.delete(np.arange(20), [0, 3])
    np.testing.assert_array_equal(clean.train.image, noisy.train.image[kept])
    np.testing.assert_array_equal(clean.train.label, noisy.train.label[kept])
    for changed in (fewer, noisy, clean):
        assert changed.test is dataset.test and changed.validation is dataset.validation
        assert changed.checksum != dataset.checksum
    even = label_quality.prepare(clean, balance="resample")
    assert len(set(np.bincount(even.train.label))) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_examples": 99}, "train_examples 99: there are 32 training images"),
        ({"label_noise": 1.5}, "label noise 1.5 must be a share"),
        ({"balance": "weight"}, "unknown balance 'weight': did you mean weights"),
        ({"exclude": "/nowhere.txt"}, "cannot read the list of examples '/nowhere.txt'"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, words):
    with pytest.raises(UserError, match=words):
        label_quality.prepare(made(), **settings)


@pytest.mark.parametrize(
    ("text", "words"), [("1\ntwo", "one whole number per line"), ("40", "names example 40, but")]
)
def test_bad_index_files_are_one_clear_error(tmp_path, text, words):
    (tmp_path / "exclude.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        label_quality.prepare(made(), exclude=tmp_path / "exclude.txt")


def test_streamed_data_are_refused():
    with pytest.raises(UserError, match="is streamed from disk"):
        label_quality.prepare(type("Streamed", (), {"name": "x"})(), label_noise=0.1)
