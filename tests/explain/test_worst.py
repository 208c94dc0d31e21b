"""The worst classified images, explained beside their scores."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cnnjax import explain
from cnnjax.explain import worst
from cnnjax.tasks import classification
from tests.explain.test_explain_methods import IMAGE, LINEAR, LINEAR_VARIABLES, MODEL, VARIABLES

STORED = np.asarray(jnp.clip(128 + 60 * jnp.tile(IMAGE, (8, 1, 1, 1)), 0, 255)).astype(np.uint8)
LABELS = np.arange(16) % 3


def normalize(image):
    return jnp.asarray(image, jnp.float32) / 64 - 2


def reported(model, variables, **changed):
    probabilities = np.asarray(jax.nn.softmax(model.apply(variables, normalize(STORED))))
    examples = {"label": LABELS, "image": STORED} | changed
    report = classification.report(probabilities, examples, class_names=("a", "b", "c"))
    added = worst.with_worst_explained(report, model, variables, normalize, probabilities, examples)
    return report, added


def test_a_network_with_image_stages_gets_one_more_figure(tmp_path):
    report, added = reported(MODEL, VARIABLES)
    assert set(added.figures) - set(report.figures) == {"worst_explained"}
    assert added.scores == report.scores
    path = added.figures["worst_explained"](tmp_path / "worst.png")
    # Both colors of a map's scale and the images themselves.
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    assert ((pixels[:, 0] - pixels[:, 2]) > 60).any()


def test_others_are_left_as_they_were():
    for changed in ({}, {"image": STORED[:0]}):
        model = (LINEAR, LINEAR_VARIABLES) if not changed else (MODEL, VARIABLES)
        report, added = reported(*model, **changed)
        assert added is report


def test_the_second_class_is_the_true_one_or_the_runner_up():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert worst.other_classes(np.array([0, 2, 1]), probabilities).tolist() == [1, 2, 1]


def test_maps_are_those_of_grad_cam():
    classes = np.stack([LABELS, 2 - LABELS])
    maps = worst.class_maps(MODEL, VARIABLES, normalize, STORED, classes)
    for each, labels in zip(maps, classes, strict=True):
        target = explain.class_score(labels)
        expected = explain.grad_cam(MODEL, VARIABLES, normalize(STORED), target)
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-6)
