"""The checks of maps, on models whose right answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from cnnjax import explain, models, trees
from cnnjax.errors import UserError
from tests.explain.test_explain_methods import (
    IMAGE,
    LINEAR,
    LINEAR_VARIABLES,
    MODEL,
    TARGET,
    VARIABLES,
)

KEY = jax.random.key(3)


def test_integrated_gradients_are_complete():
    map_ = explain.integrated_gradients(MODEL, VARIABLES, IMAGE, TARGET, steps=200, baseline=0.3)
    total, difference = explain.completeness(MODEL, VARIABLES, IMAGE, TARGET, map_, baseline=0.3)
    np.testing.assert_allclose(total, difference, atol=0.01 * np.abs(difference).max())
    # The gradient alone is not.
    plain = explain.gradient(MODEL, VARIABLES, IMAGE, TARGET)
    total, _ = explain.completeness(MODEL, VARIABLES, IMAGE, TARGET, plain)
    assert np.abs(total - difference).max() > 0.1 * np.abs(difference).max()


def test_curves_begin_and_end_at_image_and_baseline():
    map_ = jnp.sum(IMAGE, -1)
    score = TARGET(LINEAR.apply(LINEAR_VARIABLES, IMAGE))
    blank = TARGET(LINEAR.apply(LINEAR_VARIABLES, jnp.zeros_like(IMAGE)))
    arguments = LINEAR, LINEAR_VARIABLES, IMAGE, TARGET, map_
    deletion = explain.deletion_curve(*arguments, steps=30)
    insertion = explain.insertion_curve(*arguments, steps=30)
    assert deletion.shape == (31, 2)
    np.testing.assert_allclose(deletion[0], score, rtol=1e-5)
    np.testing.assert_allclose(deletion[-1], blank, rtol=1e-5, atol=1e-6)
    # What one hides the other shows.
    np.testing.assert_allclose(deletion + insertion, score + blank + 0 * deletion, atol=1e-4)


def test_the_right_map_of_a_linear_model_has_the_best_curves():
    arguments = LINEAR, LINEAR_VARIABLES, IMAGE, TARGET
    best = explain.gradient_times_input(*arguments)
    for number in range(5):
        other = jax.random.normal(jax.random.key(number), best.shape)
        for curve, sign in ((explain.deletion_curve, 1), (explain.insertion_curve, -1)):
            ours, theirs = (jnp.mean(curve(*arguments, map_), 0) for map_ in (best, other))
            assert (sign * (theirs - ours) > 0).all()


def test_infidelity_of_a_linear_model():
    arguments = LINEAR, LINEAR_VARIABLES, IMAGE, TARGET
    right = explain.gradient(*arguments, channels="keep")
    np.testing.assert_allclose(explain.infidelity(KEY, *arguments, right), 0, atol=1e-8)
    # Attributions of 0 foretell nothing: the error is the variance of the change.
    wrong = explain.infidelity(KEY, *arguments, 0 * right, noise=0.1, samples=2000)
    np.testing.assert_allclose(wrong, 0.01 * jnp.sum(right**2, (1, 2, 3)), rtol=0.15)


def test_sensitivity_n_of_a_linear_model_is_1_of_its_contributions():
    arguments = LINEAR, LINEAR_VARIABLES, IMAGE, TARGET
    right = explain.gradient_times_input(*arguments)
    for fraction in (0.05, 0.5):
        found = explain.sensitivity_n(KEY, *arguments, right, fraction=fraction)
        np.testing.assert_allclose(found, 1, atol=1e-3)
    np.testing.assert_allclose(explain.sensitivity_n(KEY, *arguments, -right), -1, atol=1e-3)
    shifted = explain.integrated_gradients(*arguments, baseline=0.7)
    found = explain.sensitivity_n(KEY, *arguments, shifted, baseline=0.7)
    np.testing.assert_allclose(found, 1, atol=1e-3)
    other = jax.random.normal(KEY, right.shape)
    assert np.abs(explain.sensitivity_n(KEY, *arguments, other, subsets=500)).max() < 0.6
    np.testing.assert_array_equal(explain.sensitivity_n(KEY, *arguments, 0 * right), 0)


def test_the_pointing_game_by_hand():
    map_ = jnp.zeros((4, 8, 9)).at[:, 2, 3].set(1.0)
    mask = np.zeros((4, 8, 9), bool)
    mask[0, 2, 3] = True  # Hit.
    mask[1, 2, 6] = True  # Three to the right.
    mask[2, 5, 7] = True  # Five off, on the diagonal of 3 and 4.
    found = {
        tolerance: explain.pointing_game(map_, jnp.asarray(mask), tolerance=tolerance).tolist()
        for tolerance in (0, 2, 3, 4, 5)
    }
    assert found == {
        0: [True, False, False, False],
        2: [True, False, False, False],
        3: [True, True, False, False],
        4: [True, True, False, False],
        5: [True, True, True, False],
    }


def test_rank_correlation_is_scipys():
    one, two = jax.random.normal(KEY, (2, 3, 4, 5))
    # Ties, and a constant map.
    one, two = jnp.round(one), jnp.round(two).at[2].set(1.0)
    result = explain.rank_correlation(one, two)
    for index in range(2):
        expected = scipy.stats.spearmanr(one[index].ravel(), two[index].ravel()).statistic
        assert float(result[index]) == pytest.approx(expected, abs=1e-6)
    assert float(result[2]) == 0


def test_layers_are_reinitialized_from_the_top():
    model = models.create("lenet5", num_classes=10)
    image = jax.random.normal(KEY, (2, 28, 28, 1))
    variables = model.init(jax.random.key(5), image)
    known = trees.named_leaves(variables)
    cascade = list(explain.reinitialized_from_the_top(KEY, model, variables, image))
    layers = [layer for layer, _ in cascade]
    assert layers == ["head", "dense2", "dense1", "conv2", "conv1"]
    for count, (_, changed) in enumerate(cascade, 1):
        assert jax.tree.structure(changed) == jax.tree.structure(variables)
        different = {
            path.split("/")[1]
            for path, leaf in trees.named_leaves(changed).items()
            if path.endswith("kernel") and not np.array_equal(leaf, known[path])
        }
        assert different == set(layers[:count])
    alone = dict(explain.reinitialized_from_the_top(KEY, model, variables, image, cascade=False))
    np.testing.assert_array_equal(
        alone["conv1"]["params"]["head"]["kernel"], variables["params"]["head"]["kernel"]
    )


def test_a_map_that_does_not_fit_is_refused():
    arguments = LINEAR, LINEAR_VARIABLES, IMAGE, TARGET
    with pytest.raises(UserError, match="does not fit"):
        explain.deletion_curve(*arguments, jnp.zeros((2, 6, 6)))
    with pytest.raises(UserError, match="keep"):
        explain.infidelity(KEY, *arguments, jnp.zeros((2, 6, 5)))
    with pytest.raises(UserError, match="does not fit"):
        explain.sensitivity_n(KEY, *arguments, jnp.zeros((2, 6, 6)))
    with pytest.raises(UserError, match="between 0 and 1"):
        explain.sensitivity_n(KEY, *arguments, jnp.zeros((2, 6, 5)), fraction=1.0)
    with pytest.raises(UserError, match="one shape"):
        explain.pointing_game(jnp.zeros((2, 6, 5)), jnp.zeros((2, 6, 6)))
    with pytest.raises(UserError, match="steps"):
        explain.deletion_curve(*arguments, jnp.zeros((2, 6, 5)), steps=0)


class Nothing(nn.Module):
    """A network that does not look."""

    @nn.compact
    def __call__(self, image, *, train=False):
        return jnp.zeros((len(image), 3))


def test_a_network_that_does_not_look_has_flat_curves():
    curve = explain.insertion_curve(Nothing(), {}, IMAGE, TARGET, jnp.sum(IMAGE, -1))
    np.testing.assert_array_equal(curve, 0)
