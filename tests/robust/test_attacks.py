"""Attacks: the closed form on linear models, the ball, masks, and what a broken one looks like."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import robust
from cnnjax.errors import UserError
from cnnjax.robust import attacks

SHAPE = (6, 6, 1)
generator = np.random.default_rng(0)
WEIGHTS = jnp.asarray(generator.normal(size=(*SHAPE, 3)), jnp.float32)
IMAGE = jnp.asarray(generator.uniform(0, 1, (5, *SHAPE)), jnp.float32)
GRAY = jnp.full((5, *SHAPE), 0.5)
LABEL = jnp.asarray([0, 1, 2, 0, 1])
KEY = jax.random.key(3)


def linear(image):
    return jnp.einsum("bhwc,hwck->bk", image, WEIGHTS)


def lengths(change):
    return np.sqrt(np.sum(np.square(change), axis=(1, 2, 3)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_of_two_classes_is_the_closed_form(norm):
    """Of a linear margin the worst change is -epsilon sign(w), or -epsilon w / |w|."""
    difference = np.asarray(WEIGHTS[..., 1] - WEIGHTS[..., 0])
    found = robust.fgsm(
        KEY, lambda x: linear(x)[:, :2], GRAY, jnp.zeros(5, int), epsilon=0.2, norm=norm
    )
    worst = np.sign(difference) if norm == "linf" else difference / np.linalg.norm(difference)
    np.testing.assert_allclose(found - GRAY, np.broadcast_to(0.2 * worst, found.shape), atol=1e-6)


@pytest.mark.parametrize("text", ["fgsm:0.1", "fgsm_l2:0.7", "pgd:0.1", "pgd_l2:0.7"])
def test_sound_attacks_reach_the_optimum_of_a_linear_model(text):
    attack = robust.parse_attack(text)
    assert robust.strength_on_linear_model(attack, (9, 9, 3)) > 0.97
    robust.check_attack(attack, (9, 9, 3))


@pytest.mark.parametrize("epsilon", [0.7, 3.0, 100.0])
def test_the_optimum_within_the_box_is_that_of_many_random_changes_pushed_out(epsilon):
    """No change in the ball and the box does better than the closed form."""
    weights = generator.uniform(0.5, 1.5, 30)
    best = robust.named._greatest_change(weights, epsilon, "l2")
    change = generator.normal(size=(2_000, 30)) * 0.3 + weights
    for _ in range(20):
        change = np.clip(change, -0.5, 0.5)
        change *= np.minimum(1, epsilon / np.linalg.norm(change, axis=1, keepdims=True))
    assert (change @ weights).max() <= best + 1e-6
    assert (change @ weights).max() >= 0.9 * best


def broken_sign(key, logits_fn, image, label, mask=None, **options):
    """Descends where it should climb."""
    gradient = jax.grad(lambda x: jnp.sum(attacks.cross_entropy(logits_fn(x), label)))(image)
    return attacks.ascend(image, image, -gradient, 0.1, 0.1, "linf")


def test_broken_attacks_are_refused(monkeypatch):
    timid = robust.parse_attack("pgd:0.3:5:1:0.01")
    with pytest.raises(UserError, match=r"pgd:0.3:5:1:0.01 reaches only \d+% of what is possible"):
        robust.check_attack(timid, SHAPE)
    monkeypatch.setattr(attacks, "pgd", broken_sign)
    with pytest.raises(UserError, match="linear model"):
        robust.check_attack(robust.parse_attack("pgd:0.1"), SHAPE)


@functools.partial(jax.jit, static_argnames="norm")
def attacked(key, epsilon, norm):
    return robust.pgd(
        key,
        linear,
        IMAGE,
        LABEL,
        epsilon=epsilon,
        num_steps=3,
        step_size=epsilon,
        restarts=2,
        norm=norm,
    )


@settings(max_examples=20)
@given(epsilon=st.floats(0.01, 2.0), norm=st.sampled_from(["linf", "l2"]), seed=st.integers(0, 99))
def test_every_adversarial_image_is_in_the_ball_and_in_range(epsilon, norm, seed):
    found = attacked(jax.random.key(seed), epsilon, norm)
    change = np.asarray(found - IMAGE)
    size = np.abs(change).max(axis=(1, 2, 3)) if norm == "linf" else lengths(change)
    assert (size <= epsilon * (1 + 1e-5) + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1


def test_starts_are_uniform_in_the_ball():
    keys = attacks.example_keys(KEY, 4000)
    gray = jnp.full((4000, 2, 2, 1), 0.5)
    change = np.asarray(attacks.uniform_start(keys, gray, 0.4, "l2") - gray)
    # In d dimensions the share within radius r is r^d.
    share = [np.mean(lengths(change) < 0.4 * r) for r in (0.5, 0.8)]
    np.testing.assert_allclose(share, [0.5**4, 0.8**4], atol=0.03)
    flat = np.asarray(attacks.uniform_start(keys, gray, 0.4, "linf") - gray).ravel()
    np.testing.assert_allclose(np.quantile(flat, [0.25, 0.5, 0.75]), [-0.2, 0, 0.2], atol=0.02)


def test_more_steps_and_restarts_never_weaken_an_attack():
    kernel = jnp.asarray(generator.normal(size=(36, 20)), jnp.float32)
    head = jnp.asarray(generator.normal(size=(20, 3)), jnp.float32)

    def logits_fn(image):
        return jnp.sin(image.reshape(len(image), -1) @ kernel) @ head

    def loss(num_steps, restarts):
        found = robust.pgd(
            KEY,
            logits_fn,
            IMAGE,
            LABEL,
            epsilon=0.05,
            num_steps=num_steps,
            step_size=0.01,
            restarts=restarts,
        )
        wrong = np.asarray(logits_fn(found)).argmax(1) != LABEL
        return wrong, np.asarray(attacks.cross_entropy(logits_fn(found), LABEL))

    results = [loss(2, 1), loss(5, 1), loss(5, 4)]
    for (wrong, less), (also, more) in itertools.pairwise(results):
        assert (also >= wrong).all()
        assert (more[wrong == also] >= less[wrong == also] - 1e-6).all()


def test_padding_is_left_alone_and_changes_nothing():
    attack = robust.parse_attack("pgd:0.3:3:2")
    mask = jnp.asarray([True, True, False, True, False])
    run = jax.jit(lambda mask: attack(KEY, linear, IMAGE, LABEL, mask))
    np.testing.assert_array_equal(run(mask)[~mask], IMAGE[~mask])
    np.testing.assert_array_equal(run(mask)[mask], run(jnp.ones(5, bool))[mask])


def test_an_example_s_draws_are_its_own_however_the_batch_is_cut():
    attack = robust.parse_attack("pgd_l2:0.5:2")
    keys = attacks.example_keys(KEY, 5)
    run = jax.jit(lambda keys, x, y: attack(keys, linear, x, y))
    whole = run(keys, IMAGE, LABEL)
    rows = np.split(np.arange(5), [2])
    parts = [run(keys[part], IMAGE[part], LABEL[part]) for part in rows]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-6)


def test_margin_has_a_gradient_where_the_softmax_is_saturated():
    logits = jnp.asarray([[200.0, 0.0, -5.0]])
    assert attacks.margin(logits, jnp.asarray([0])) == -200
    assert attacks.margin(logits, jnp.asarray([2])) == 205
    of_cross_entropy = jax.grad(lambda x: attacks.cross_entropy(x, jnp.asarray([0]))[0])(logits)
    of_margin = jax.grad(lambda x: attacks.margin(x, jnp.asarray([0]))[0])(logits)
    np.testing.assert_array_equal(of_cross_entropy, 0)
    np.testing.assert_array_equal(of_margin, [[-1, 1, 0]])


def test_one_logit_is_attacked_like_two():
    def one(image):
        return linear(image)[:, 1:2] - linear(image)[:, :1]

    attack = robust.parse_attack("pgd:0.1:3")
    label = jnp.asarray([0, 1, 1, 0, 1])
    functions = (one, lambda image: linear(image)[:, :2])
    found = [jax.jit(lambda f=f: attack(KEY, f, IMAGE, label))() for f in functions]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.slow
def test_masked_gradients_show():
    """A model that rounds its input has no gradient: noise beats PGD on it."""
    noise = jax.random.normal(KEY, (200, *SHAPE)) * 0.1
    label = jnp.arange(200) % 3
    image = jnp.clip(0.5 + 0.03 * WEIGHTS.transpose(3, 0, 1, 2)[label] + noise, 0, 1)
    batch = {"image": image, "label": label, "mask": jnp.ones(200, bool)}
    options = {"num_classes": 3, "image_shape": SHAPE}
    attack = robust.parse_attack("pgd:0.15")

    def rounded(_, image):
        return 30 * linear(jnp.round(image * 4) / 4 - 0.5)

    _, signs = robust.masking(rounded, {}, lambda: [batch], attack, **options)
    assert any("random noise" in sign for sign in signs)
    accuracies, signs = robust.masking(
        lambda _, x: linear(x - 0.5), {}, lambda: [batch], attack, **options
    )
    assert signs == []
    assert accuracies["unbounded"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pdg:0.3", "unknown attack 'pdg': did you mean pgd"),
        ("pgd", "attack 'pgd': missing a required argument: 'epsilon'"),
        ("pgd:a", "attack 'pgd:a': epsilon='a': give a number"),
        ("fgsm:0.3:4", "attack 'fgsm:0.3:4': too many positional arguments"),
        ("pgd:-1", "'pgd:-1': epsilon=-1: give a positive number"),
        ("pgd:nan", "epsilon='nan': give a number"),
        ("pgd:0.3:2.5", "num_steps=2.5: give a whole number"),
        ("pgd:0.3:20:0", "restarts=0: give a positive number"),
        ("pgd:0.3:20:1:0", "step_size=0: give a positive number"),
    ],
)
def test_bad_attacks_are_one_clear_error(text, words):
    with pytest.raises(UserError, match=words):
        robust.parse_attack(text)


def test_attacks_are_written_as_they_are_read():
    for text in ("fgsm:0.3", "pgd:0.3:20:5", "pgd_l2:2:7:1:0.5", "noise:0.1:10"):
        attack = robust.parse_attack(text)
        assert str(attack) == text
        assert robust.parse_attack(str(attack)) == attack
    default = robust.parse_attack("pgd:0.4")
    assert dataclasses.astuple(default) == ("pgd", 0.4, 20, 1, pytest.approx(0.05))
