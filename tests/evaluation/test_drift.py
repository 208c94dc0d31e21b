"""Distances from a reference of clean images: by hand, and against what NumPy says."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import metrics
from cnnjax.errors import UserError
from cnnjax.evaluation import drift, references


def made_data(count, seed=0, shape=(6, 6, 1), shift=0):
    """Images of a class's brightness, logits that know it, embeddings around the class's."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 4, count)
    level = 40 + 40 * label[:, None, None, None] + generator.normal(0, 10, (count, *shape))
    images = np.clip(level + shift, 0, 255).astype(np.uint8)
    logits = 4.0 * np.eye(4)[label] + generator.normal(0, 1, (count, 4))
    embeddings = (
        np.eye(4)[label] @ np.ones((4, 5)) + generator.normal(0, 1, (count, 5)) + shift / 50
    )
    return images, logits, embeddings, label


@pytest.fixture(scope="module")
def reference():
    return references.make_reference(*made_data(4000), window=200)


def test_the_stability_index_is_that_of_the_definition():
    # Half an example in each bin: shares (40.5, 60.5) / 101 against (80.5, 20.5) / 101.
    p, q = np.array([40.5, 60.5]) / 101, np.array([80.5, 20.5]) / 101
    by_hand = sum((p - q) * np.log(p / q))
    found = drift.stability_index(np.array([0.4, 0.6]), np.array([0.8, 0.2]), 100)
    assert found == pytest.approx(by_hand)
    assert drift.stability_index(np.array([0.8, 0.2]), np.array([0.8, 0.2]), 100) == 0


def test_image_values_are_those_of_numpy():
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (5, 7, 4, 3), np.uint8)
    found = drift.image_values(images)
    np.testing.assert_allclose(found["mean"], images.mean(axis=(1, 2, 3)) / 255, rtol=1e-6)
    np.testing.assert_allclose(found["contrast"], images.std(axis=(1, 2, 3)) / 255, rtol=1e-5)
    for image, pixels in zip(images, found["pixels"], strict=True):
        counts = [np.histogram(image[..., c], 16, (0, 256))[0] for c in range(3)]
        np.testing.assert_allclose(pixels, np.concatenate(counts) / image.size, rtol=1e-6)
    same = drift.image_values(images / np.float32(255))
    np.testing.assert_allclose(same["pixels"], found["pixels"])


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=20))
def test_margins_are_the_log_odds_of_the_softmax(rows):
    logits = np.array(rows)
    odds, predicted = drift.margins(logits)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    largest = softmax.max(axis=1)
    others = np.sort(softmax, axis=1)[:, :-1].sum(axis=1)
    np.testing.assert_allclose(odds, np.log(largest / others), rtol=1e-5, atol=1e-9)
    assert (predicted == logits.argmax(axis=1)).all()


def test_one_logit_is_two_classes():
    odds, predicted = drift.margins(np.array([[2.0], [-3.0]]))
    np.testing.assert_allclose(odds, [2.0, 3.0])
    assert predicted.tolist() == [1, 0]


def test_the_calibration_error_is_that_of_the_metrics():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (500, 6))
    label = generator.integers(0, 6, 500)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    odds, predicted = drift.margins(logits)
    found = drift.calibration_error(odds, predicted == label)
    assert found == pytest.approx(
        float(metrics.expected_calibration_error(softmax, label)), abs=1e-5
    )


def test_white_embeddings_have_the_identity_as_covariance():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(0, 1, (3000, 5)) @ generator.normal(0, 3, (5, 7)) + 4
    center, directions = references.whitening(embeddings)
    assert directions.shape == (7, 5)  # In two directions nothing varies.
    white = (embeddings - center) @ directions
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(5), atol=1e-3)


def test_a_shift_of_the_mean_scores_its_squared_mahalanobis_distance(reference):
    white = reference.embedding_rows(made_data(4000)[2])[::2]
    assert reference.embedding_scores(white.mean(axis=0))["embedding_mean"] < 1e-6
    moved = white.mean(axis=0)
    moved[drift.QUANTILE_BINS :] += 0.5
    expected = 0.25 * reference.directions.shape[1]
    score = reference.embedding_scores(moved)["embedding_mean"]
    assert score == pytest.approx(expected, rel=1e-3)


def test_windows_of_clean_images_are_quiet_and_of_others_are_not(reference):
    def found(seed, shift):
        images, logits, embeddings, _ = made_data(reference.window, seed, shift=shift)
        scores = reference.scores(reference.rows(images, logits).mean(axis=0))
        rows = reference.embedding_rows(embeddings)
        scores |= reference.embedding_scores(rows.mean(axis=0))
        assert scores.keys() == reference.thresholds.keys()
        return drift.drifted(scores, reference.thresholds)

    assert not any(found(seed, 0) for seed in range(1, 40))
    assert {"image_mean", "pixel_values", "embedding_mean"} <= set(found(1, 30))


def test_a_reference_knows_the_accuracy_of_its_own_half(reference):
    _, logits, _, label = made_data(4000)
    right = logits[::2].argmax(axis=1) == label[::2]
    assert reference.accuracy == right.mean()
    without = references.make_reference(*made_data(1000)[:2])
    assert math.isnan(without.accuracy) and not without.embeds
    assert "embedding_mean" not in without.thresholds


def test_a_reference_is_read_as_it_was_written(reference, tmp_path):
    path = tmp_path / "reference.npz"
    references.save_reference(path, reference)
    found = references.read_reference(path)
    for field in dataclasses.fields(reference):
        mine, other = getattr(reference, field.name), getattr(found, field.name)
        if isinstance(mine, dict):
            assert mine.keys() == other.keys()
            assert all(np.array_equal(mine[name], other[name]) for name in mine)
        else:
            assert np.array_equal(mine, other)
    assert path.stat().st_size < 20_000


def test_files_that_are_no_reference_are_named(reference, tmp_path):
    path = tmp_path / "reference.npz"
    with pytest.raises(UserError, match="serve-reference"):
        references.read_reference(path)
    references.save_reference(path, reference)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], b"\x80\x04cos\nsystem\n."):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            references.read_reference(path)
    np.savez(path, numbers=np.array("{}"), center=0, directions=0)
    with pytest.raises(UserError, match="another version"):
        references.read_reference(path)


def test_too_few_images_and_windows_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"needs 1,000 images .* there are 999"):
        references.make_reference(*made_data(999)[:2])
    for window in (0, 49, 10_001):
        with pytest.raises(UserError, match="give 50 to 10,000"):
            references.make_reference(*made_data(1000)[:2], window=window)


def test_many_classes_share_bins():
    assert drift.class_bins_of(1000) == 20
    assert drift.class_bins(np.array([0, 49, 50, 999]), 1000).tolist() == [0, 0, 1, 19]
