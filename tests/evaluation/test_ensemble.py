"""Ensembles and views: averages by hand, disagreement by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import metrics
from cnnjax.errors import UserError
from cnnjax.evaluation import ensemble

IMAGE = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 4, 5, 1)), jnp.float32)


def constant(variables, image):
    return jnp.broadcast_to(variables, (len(image), len(variables)))


def test_averages_by_hand():
    first, second = jnp.log(jnp.asarray([0.8, 0.2])), jnp.log(jnp.asarray([0.4, 0.6])) + 7
    both = ensemble.ensemble_logits([constant, constant])
    mean = jax.nn.softmax(both((first, second), IMAGE))
    np.testing.assert_allclose(mean, [[0.6, 0.4]] * 3, rtol=1e-5)
    of_logits = ensemble.ensemble_logits([constant, constant], average="logits")
    geometric = np.sqrt([0.8 * 0.4, 0.2 * 0.6])
    found = jax.nn.softmax(of_logits((first, second), IMAGE))
    np.testing.assert_allclose(found, [geometric / geometric.sum()] * 3, rtol=1e-5)


def test_members_of_one_logit_become_two_columns():
    logits = ensemble.ensemble_logits([constant, constant])
    found = jax.nn.softmax(logits((jnp.asarray([2.0]), jnp.asarray([-1.0])), IMAGE))
    each = [metrics.probabilities(jnp.asarray([[value]])) for value in (2.0, -1.0)]
    np.testing.assert_allclose(found, np.repeat(np.mean(each, axis=0), 3, axis=0), rtol=1e-5)


def test_views_are_the_image_and_its_neighbors():
    views = ensemble.parse_views("shift:1,flip")
    assert len(views) == 18
    seen = [np.asarray(view(IMAGE)) for view in views]
    np.testing.assert_array_equal(seen[0], IMAGE)
    down_right = np.asarray(IMAGE)[:, [0, 0, 1, 2]][:, :, [0, 0, 1, 2, 3]]
    assert any(np.array_equal(view, down_right) for view in seen)
    assert sum(np.array_equal(view, np.asarray(IMAGE)[:, :, ::-1]) for view in seen) == 1
    assert len({view.tobytes() for view in seen}) == 18


def test_views_are_averaged_as_probabilities():
    def first_pixel(_, image):
        return jnp.stack([jnp.log(image[:, 0, 0, 0]), jnp.log1p(-image[:, 0, 0, 0])], axis=1)

    averaged = ensemble.with_views(first_pixel, ensemble.parse_views("flip"))
    found = jax.nn.softmax(averaged({}, IMAGE))[:, 0]
    np.testing.assert_allclose(found, (IMAGE[:, 0, 0, 0] + IMAGE[:, 0, -1, 0]) / 2, rtol=1e-5)


def test_disagreement_by_hand():
    sure = np.eye(2)
    members = [sure[[0, 0, 1, 1]], sure[[0, 1, 1, 1]], sure[[0, 1, 0, 1]]]
    found = ensemble.disagreement(members)
    assert found["pairs"] == [[0, 0.25, 0.5], [0.25, 0, 0.25], [0.5, 0.25, 0]]
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["any"] == 0.5
    # Sure members add nothing where they agree; where one of three differs, H(1/3).
    entropy = -(np.log(1 / 3) / 3 + 2 * np.log(2 / 3) / 3)
    assert found["mutual_information"] == pytest.approx(entropy / 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ensemble.parse_views("flop"), "unknown view 'flop': did you mean flip"),
        (lambda: ensemble.parse_views("shift:0"), "view 'shift:0': pixels=0: give a whole number"),
        (lambda: ensemble.ensemble_logits([]), "needs one member at least"),
        (lambda: ensemble.ensemble_logits([constant], average="mean"), "unknown average"),
        (lambda: ensemble.disagreement(np.zeros((1, 2, 3))), "two members at least"),
    ],
)
def test_bad_input_is_one_clear_error(call, words):
    with pytest.raises(UserError, match=words):
        call()
