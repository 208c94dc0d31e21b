"""The losses of distillation: closed forms, limits, invariances, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax.distill import losses
from tests.transforms import Case, assert_covered, check_transforms

GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


STUDENT, TEACHER = normal(5, 4), normal(5, 4)
IMAGES = normal(3, 4, 4, 2), normal(3, 4, 4, 5)
CASES = [
    Case(
        "softened_divergence",
        lambda s, t: losses.softened_divergence(s, t, temperature=3.0),
        (STUDENT, TEACHER),
        (0,),
    ),
    Case("hint_loss", losses.hint_loss, (STUDENT, TEACHER), (0,)),
    Case("attention_map", losses.attention_map, (IMAGES[0],), (0,)),
    Case("attention_loss", losses.attention_loss, IMAGES, (0,)),
    Case("attention_loss sizes", losses.attention_loss, (IMAGES[0], normal(3, 2, 2, 1)), (0,)),
    Case("of_one_size", losses.of_one_size, (IMAGES[0], normal(3, 2, 2, 1)), (0,)),
    Case("distance_loss", losses.distance_loss, (STUDENT, normal(5, 3)), (0,)),
    Case("angle_loss", losses.angle_loss, (STUDENT, normal(5, 3)), (0,)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms(case):
    check_transforms(case)


def test_every_loss_is_transformed():
    assert_covered(losses, CASES)


def test_at_temperature_1_it_is_the_divergence_of_the_probabilities():
    p, q = jnp.array([[0.7, 0.2, 0.1]]), jnp.array([[0.5, 0.3, 0.2]])
    found = losses.softened_divergence(jnp.log(q), jnp.log(p), temperature=1.0)
    by_hand = 0.7 * np.log(0.7 / 0.5) + 0.2 * np.log(0.2 / 0.3) + 0.1 * np.log(0.1 / 0.2)
    assert found[0] == pytest.approx(by_hand, rel=1e-5)


def test_at_a_high_temperature_it_is_half_the_mean_square_of_the_centered_logits():
    """Hinton et al. 2015, section 2.1: its gradient is then (z_i - v_i) / classes."""
    centered = (STUDENT - STUDENT.mean(-1, keepdims=True)) - (
        TEACHER - TEACHER.mean(-1, keepdims=True)
    )
    found, gradient = jax.value_and_grad(
        lambda s: losses.softened_divergence(s, TEACHER, temperature=200.0).sum()
    )(STUDENT)
    np.testing.assert_allclose(found, 0.5 * np.square(centered).mean(-1).sum(), rtol=0.02)
    np.testing.assert_allclose(gradient, centered / 4, rtol=0.03, atol=1e-3)


def test_at_a_low_temperature_only_the_teachers_class_counts():
    """T times the divergence is then how far the student's logit of it is below its largest."""
    student, teacher = jnp.array([[1.0, 3.0, 0.0]]), jnp.array([[5.0, 0.0, 1.0]])
    found = losses.softened_divergence(student, teacher, temperature=0.01)
    assert found[0] / 0.01 == pytest.approx(2.0, rel=1e-3)


def test_one_logit_counts_for_two_classes():
    one = losses.softened_divergence(STUDENT[:, :1], TEACHER[:, :1], temperature=2.0)
    two = losses.softened_divergence(
        *(jnp.pad(x[:, :1], ((0, 0), (1, 0))) for x in (STUDENT, TEACHER)), temperature=2.0
    )
    np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.slow
def test_where_they_agree_every_loss_is_0_and_so_is_its_gradient():
    for loss, x in (
        (lambda s, t: losses.softened_divergence(s, t, temperature=4.0), STUDENT),
        (losses.hint_loss, IMAGES[0]),
        (losses.attention_loss, IMAGES[0]),
        (losses.attention_loss, jnp.zeros((2, 3, 3, 1))),
        (losses.distance_loss, STUDENT),
        (losses.angle_loss, STUDENT),
        (losses.distance_loss, jnp.zeros((4, 3))),
        (losses.angle_loss, jnp.zeros((4, 3))),
    ):
        value, gradient = jax.value_and_grad(lambda s, f=loss, x=x: f(s, x).sum())(x)
        assert value == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(gradient, jnp.zeros_like(x), atol=1e-6)


def test_attention_is_of_the_places_whatever_channels_and_scale():
    """By hand: maps (3, 4) / 5 and (1, 0) give ((3/5 - 1)^2 + (4/5)^2) / (2 * 2 positions)."""
    student = jnp.sqrt(jnp.array([3.0, 4.0])).reshape(1, 1, 2, 1)
    teacher = jnp.array([[1.0, 1.0], [0.0, 0.0]]).reshape(1, 1, 2, 2)
    by_hand = ((3 / 5 - 1) ** 2 + (4 / 5) ** 2) / 4
    assert losses.attention_loss(student, teacher)[0] == pytest.approx(by_hand, rel=1e-6)
    for same in (7 * student, jnp.concatenate([student, -student], axis=-1)):
        np.testing.assert_allclose(
            losses.attention_loss(same, teacher), losses.attention_loss(student, teacher), rtol=1e-5
        )


def test_a_larger_image_is_averaged_to_the_smaller_one():
    large, small = normal(2, 4, 4, 3), normal(2, 2, 2, 3)
    resized, same = losses.of_one_size(large, small)
    assert resized.shape == small.shape and (same == small).all()
    constant = losses.of_one_size(jnp.full((1, 6, 6, 1), 2.5), small)[0]
    np.testing.assert_allclose(constant, 2.5, rtol=1e-6)


def rotated(x, seed=1):
    size = x.shape[1]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return jnp.asarray(x @ rotation, jnp.float32)


@pytest.mark.parametrize("loss", [losses.distance_loss, losses.angle_loss])
def test_relations_do_not_change_with_scale_rotation_and_shift(loss):
    moved = 3 * rotated(STUDENT) + 2
    np.testing.assert_allclose(loss(moved, TEACHER), loss(STUDENT, TEACHER), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(loss(moved, STUDENT), jnp.zeros(5), atol=1e-6)
    # Nor with embeddings of more dimensions.
    wider = jnp.pad(STUDENT, ((0, 0), (0, 3)))
    np.testing.assert_allclose(loss(wider, TEACHER), loss(STUDENT, TEACHER), rtol=1e-4)


def huber(x):
    return np.where(np.abs(x) <= 1, 0.5 * x**2, np.abs(x) - 0.5)


def test_distances_by_hand():
    """Of three points on a line at 0, 1, 3, and at 0, 1, 2: distances over their mean."""
    student, teacher = np.array([[0.0], [1.0], [3.0]]), np.array([[0.0], [1.0], [2.0]])
    own, other = (np.abs(x - x.T) for x in (student, teacher))
    difference = own / (8 / 3 * 3 / 4) - other / (4 / 3)
    assert own.sum() / 6 == pytest.approx(2) and other.sum() / 6 == pytest.approx(4 / 3)
    expected = huber(difference).sum(axis=1) / 2
    np.testing.assert_allclose(losses.distance_loss(student, teacher), expected, rtol=1e-5)


def test_angles_by_loops():
    expected = np.zeros(5)
    for i in range(5):
        values = []
        for j in range(5):
            for k in range(5):
                if len({i, j, k}) == 3:
                    cosines = []
                    for x in (np.asarray(STUDENT), np.asarray(TEACHER)):
                        a, b = x[j] - x[i], x[k] - x[i]
                        cosines.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
                    values.append(huber(cosines[0] - cosines[1]))
        expected[i] = np.mean(values)
    np.testing.assert_allclose(losses.angle_loss(STUDENT, TEACHER), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [losses.distance_loss, losses.angle_loss])
def test_padding_is_nobodys_other(loss):
    counts = jnp.array([True] * 4 + [False] * 2)
    padded = [jnp.concatenate([x[:4], jnp.full((2, 4), 9.0)]) for x in (STUDENT, TEACHER)]
    np.testing.assert_allclose(loss(*padded, counts)[:4], loss(STUDENT[:4], TEACHER[:4]), rtol=1e-4)
    assert np.isfinite(np.asarray(loss(STUDENT[:1], TEACHER[:1]))).all()
