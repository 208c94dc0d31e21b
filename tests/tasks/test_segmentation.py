"""The segmentation task on logits made by hand: losses, counts, scores, reports."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import losses, metrics
from cnnjax.data.fields import check_examples
from cnnjax.errors import UserError
from cnnjax.tasks.segmentation import pixel_confusion, segmentation
from cnnjax.tasks.task import Forward

IGNORE = 255
# Two images of 2x2 pixels and three classes.
CLASS_MAP = np.array([[[0, 1], [2, IGNORE]], [[1, 1], [0, 0]]], np.uint8)
LOGITS = np.log(
    np.array(
        [
            [[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [[0.5, 0.2, 0.3], [0.2, 0.2, 0.6]]],
            [[[0.25, 0.5, 0.25], [0.6, 0.3, 0.1]], [[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]]],
        ]
    )
).astype(np.float32)
BATCH = {"class_map": jnp.asarray(CLASS_MAP), "mask": jnp.array([True, True])}
# True class by row: pixels of the first image, then of the second.
CONFUSION = np.array([[1 + 1, 0, 1], [1, 1 + 1, 0], [1, 0, 0]])


@pytest.fixture
def task():
    return segmentation(3, class_names=("ground", "cat", "dog"))


def test_loss_is_the_cross_entropy_of_the_pixels_that_count(task):
    values, weights = task.loss(jnp.asarray(LOGITS), BATCH)
    expected = -np.log([[[0.7, 0.8], [0.3, 1.0]], [[0.5, 0.3], [0.9, 0.2]]])
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(weights, CLASS_MAP != IGNORE)


@pytest.mark.parametrize("dice_weight", [0.0, 0.5])
@pytest.mark.parametrize("value", [100.0, -100.0, np.inf, np.nan])
def test_ignored_pixels_change_nothing_whatever_their_logits(value, dice_weight):
    task = segmentation(3, dice_weight=dice_weight)

    def total(logits):
        values, weights = task.loss(logits, BATCH)
        return jnp.sum(values * weights) / jnp.sum(weights)

    changed = LOGITS.copy()
    changed[0, 1, 1] = [0.0, value, 0.0]
    for one, other in zip(
        jax.value_and_grad(total)(LOGITS), jax.value_and_grad(total)(changed), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    gradient = np.asarray(jax.grad(total)(changed))
    assert not gradient[0, 1, 1].any()
    assert np.abs(gradient).max(axis=-1)[CLASS_MAP != IGNORE].min() > 0


def test_padding_examples_have_no_weight(task):
    batch = BATCH | {"mask": jnp.array([True, False])}
    _, weights = task.loss(jnp.asarray(LOGITS), batch)
    assert np.asarray(weights).sum(axis=(1, 2)).tolist() == [3, 0]
    found = task.metrics(jnp.asarray(LOGITS), batch)
    assert (float(found["pixel_accuracy"][0]), int(found["pixel_accuracy"][1])) == (2, 3)
    assert found["confusion"].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_metrics_are_sums_over_pixels(task):
    found = task.metrics(jnp.asarray(LOGITS), BATCH)
    total, count = found["loss"]
    right = -np.log([0.7, 0.8, 0.3, 0.5, 0.3, 0.9, 0.2])
    assert (float(total), int(count)) == (pytest.approx(right.sum(), rel=1e-5), 7)
    assert [int(part) for part in found["pixel_accuracy"]] == [4, 7]
    np.testing.assert_array_equal(found["confusion"], CONFUSION)
    halves = [
        task.metrics(jnp.asarray(LOGITS[part]), {"class_map": jnp.asarray(CLASS_MAP[part])})
        for part in (slice(0, 1), slice(1, 2))
    ]
    merged = metrics.merge(*halves)
    np.testing.assert_array_equal(merged["confusion"], CONFUSION)
    assert metrics.finalize(merged)["loss"] == pytest.approx(right.mean(), rel=1e-5)


def test_scores_come_from_the_summed_confusion(task):
    found = task.scores({"confusion": CONFUSION, "loss": (1.0, 2)})
    # ground 2 / (3 + 4 - 2), cat 2 / (3 + 2 - 2), dog 0 / (1 + 1)
    assert found == {
        "mean_iou": pytest.approx((2 / 5 + 2 / 3 + 0) / 3),
        "mean_dice": pytest.approx((4 / 7 + 4 / 5 + 0) / 3),
    }
    assert task.monitor == ("mean_iou", "max")


def test_prediction_is_a_map_of_bytes(task):
    predicted = task.predict(jnp.asarray(LOGITS))
    assert predicted.dtype == jnp.uint8
    assert predicted.tolist() == [[[0, 1], [0, 2]], [[1, 0], [0, 2]]]


def test_apply_gives_the_model_the_images(task):
    """A fake model whose class is the pixel's first channel."""

    def fake(params, x, train):
        return jax.nn.one_hot(x[..., 0].astype(jnp.int32), 3) * params, {"mode": train}

    image = jnp.where(CLASS_MAP == IGNORE, 0, CLASS_MAP)[..., None]
    outputs, stats = task.apply(Forward(fake, 9.0), BATCH | {"image": image}, train=True)
    assert stats == {"mode": True}
    found = task.metrics(outputs, BATCH)
    assert task.scores(found) == {"mean_iou": 1.0, "mean_dice": 1.0}
    assert metrics.finalize(found)["pixel_accuracy"] == 1.0


def test_fields_say_what_is_a_class_map(task):
    image = np.zeros((2, 2, 2, 1), np.uint8)
    check_examples({"image": image, "class_map": CLASS_MAP}, task.inputs, "train")
    with pytest.raises(UserError, match=r"must lie in 0\.\.2"):
        check_examples({"image": image, "class_map": CLASS_MAP + 2}, task.inputs, "train")


def test_report_has_a_line_for_each_class_and_the_figures(task, tmp_path):
    predicted = np.asarray(task.predict(jnp.asarray(LOGITS)))
    images = np.zeros((1, 2, 2, 1), np.uint8)
    found = task.report(predicted, {"class_map": CLASS_MAP, "image": images})
    assert found.scores["confusion"] == CONFUSION.tolist()
    assert found.scores["classes"]["cat"] == {
        "iou": pytest.approx(2 / 3),
        "dice": pytest.approx(0.8),
        "pixels": 3,
    }
    assert found.scores["pixel_accuracy"] == pytest.approx(4 / 7)
    assert found.text.splitlines() == [
        "class         IoU     Dice        pixels",
        "ground     40.00%   57.14%             3",
        "cat        66.67%   80.00%             3",
        "dog         0.00%    0.00%             1",
        "mean       35.56%   45.71%             7",
        "pixel accuracy 57.14%",
    ]
    json.dumps(found.scores, allow_nan=False)
    assert sorted(found.figures) == ["confusion_matrix", "overlays"]
    for name, draw in found.figures.items():
        draw(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_report_leaves_out_classes_that_are_nowhere():
    truth = np.zeros((1, 2, 2), np.uint8)
    found = segmentation(2).report(truth, {"class_map": truth})
    assert found.scores["classes"]["1"]["iou"] is None
    assert found.scores["mean_iou"] == 1.0
    assert "1               -        -             0" in found.text
    assert sorted(found.figures) == ["confusion_matrix"]


def test_confusion_on_the_host_is_that_of_the_device():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 5, (6, 8, 8)).astype(np.uint8)
    truth[generator.uniform(size=truth.shape) < 0.2] = IGNORE
    predicted = generator.integers(0, 5, truth.shape).astype(np.uint8)
    counted = truth != IGNORE
    expected = metrics.confusion_counts(truth.astype(np.int32), predicted, counted, 5)
    np.testing.assert_array_equal(pixel_confusion(truth, predicted, 5), expected)


def test_dice_loss_by_hand():
    """1 - 2 sum p t / (sum p^2 + sum t^2), mean over the classes that an image has."""
    found = losses.dice_loss(LOGITS[1:], CLASS_MAP[1:])
    ground = 1 - 2 * (0.9 + 0.2) / (0.25**2 + 0.6**2 + 0.9**2 + 0.2**2 + 2)
    cat = 1 - 2 * (0.5 + 0.3) / (0.5**2 + 0.3**2 + 0.05**2 + 0.2**2 + 2)
    np.testing.assert_allclose(found, [(ground + cat) / 2], rtol=1e-5)
    with_dice, _ = segmentation(3, dice_weight=2.0).loss(LOGITS[1:], {"class_map": CLASS_MAP[1:]})
    plain, _ = segmentation(3).loss(LOGITS[1:], {"class_map": CLASS_MAP[1:]})
    np.testing.assert_allclose(with_dice - plain, np.full((1, 2, 2), ground + cat), rtol=1e-5)


def test_dice_loss_of_an_image_without_classes_is_zero():
    nothing = np.full((1, 2, 2), IGNORE, np.uint8)
    value, gradient = jax.value_and_grad(lambda x: losses.dice_loss(x, nothing)[0])(LOGITS[:1])
    assert value == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1: a class map holds from 2 to 255"),
        ({"num_classes": 256}, "num_classes is 256"),
        ({"num_classes": 3, "ignore": 2}, "ignore=2 is one of the 3 classes"),
    ],
)
def test_impossible_maps_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        segmentation(**options)


def test_losses_of_other_shapes_are_refused():
    with pytest.raises(UserError, match="labels must be class numbers"):
        losses.pixel_cross_entropy(LOGITS, CLASS_MAP[:1])
    with pytest.raises(UserError, match="the Dice loss was given logits"):
        losses.dice_loss(LOGITS, CLASS_MAP[:1])
