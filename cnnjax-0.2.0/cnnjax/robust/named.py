"""Attacks by name, such as `pgd:0.3:20:5`, and the checks that reject a broken one.

| name | attack |
|---|---|
| `fgsm` | fast gradient sign method, L-infinity |
| `fgsm_l2` | one step along the gradient, L2 |
| `pgd` | projected gradient descent, L-infinity |
| `pgd_l2` | the same, L2 |
| `pgd_margin` | L-infinity, up the margin of the logits instead of cross-entropy |
| `noise` | uniform noise, L-infinity: what no attack should fall behind |

They take `fgsm(epsilon)`, `pgd(epsilon, num_steps, restarts, step_size)` and `noise(epsilon,
tries)` in the grammar of `cnnjax.spec`: `pgd:0.3:20` is `pgd(0.3, num_steps=20)`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.robust import attacks

# name -> (norm, loss)
KINDS = {
    "fgsm": ("linf", attacks.cross_entropy),
    "fgsm_l2": ("l2", attacks.cross_entropy),
    "pgd": ("linf", attacks.cross_entropy),
    "pgd_l2": ("l2", attacks.cross_entropy),
    "pgd_margin": ("linf", attacks.margin),
    "noise": ("linf", attacks.cross_entropy),
}
# The fraction of the best possible that a sound attack reaches on a linear model.
SOUND = 0.95


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack with its numbers; called as `attack(key, logits_fn, image, label, mask=None)`.

    What it returns is never less wrong than the image: see `cnnjax.robust.pgd`.

    Attributes:
      kind: a key of `KINDS`.
      epsilon: the radius of the ball, in units where white is 1.
      num_steps: gradient steps of each run.
      restarts: the number of runs.
      step_size: the length of a step.
    """

    kind: str
    epsilon: float
    num_steps: int = 1
    restarts: int = 1
    step_size: float = 0.0

    def __call__(
        self,
        key: jax.Array,
        logits_fn: attacks.LogitsFunction,
        image: jax.Array,
        label: jax.Array,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        return attacks.pgd(
            key,
            logits_fn,
            image,
            label,
            mask,
            epsilon=self.epsilon,
            num_steps=self.num_steps,
            step_size=self.step_size,
            restarts=self.restarts,
            norm=self.norm,
            loss=KINDS[self.kind][1],
            random_start=not self.kind.startswith("fgsm"),
        )

    @property
    def norm(self) -> str:
        return KINDS[self.kind][0]

    def __str__(self) -> str:
        numbers: tuple[float, ...] = (self.epsilon,)
        if self.kind == "noise":
            numbers += (self.restarts,)
        elif not self.kind.startswith("fgsm"):
            numbers += (self.num_steps, self.restarts)
            if self.step_size != _reaching(self.epsilon, self.num_steps):
                numbers += (self.step_size,)
        return ":".join([self.kind, *(f"{number:g}" for number in numbers)])


def _fgsm(kind: str, epsilon: float) -> Attack:
    """One step of length epsilon from the image itself."""
    _check(epsilon=epsilon)
    return Attack(kind, epsilon, step_size=epsilon)


def _pgd(
    kind: str,
    epsilon: float,
    num_steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
) -> Attack:
    """Steps within the ball from random starts; by default of 2.5 epsilon / num_steps.

    The border of the ball is then within reach from any start (Madry et al. 2018, caption of
    figure 6).
    """
    reaching = _reaching(epsilon, max(num_steps, 1))
    _check(epsilon=epsilon, num_steps=num_steps, restarts=restarts, step_size=step_size)
    return Attack(kind, epsilon, num_steps, restarts, reaching if step_size is None else step_size)


def _noise(kind: str, epsilon: float, tries: int = 1) -> Attack:
    """The worst of some random changes."""
    _check(epsilon=epsilon, tries=tries)
    return Attack(kind, epsilon, 0, tries)


ATTACKS: spec.Registry = {
    "fgsm": functools.partial(_fgsm, "fgsm"),
    "fgsm_l2": functools.partial(_fgsm, "fgsm_l2"),
    "pgd": functools.partial(_pgd, "pgd"),
    "pgd_l2": functools.partial(_pgd, "pgd_l2"),
    "pgd_margin": functools.partial(_pgd, "pgd_margin"),
    "noise": functools.partial(_noise, "noise"),
}


def make_attack(kind: str, *numbers: Any, **named: Any) -> Attack:
    """Returns the attack of that kind, with the arguments that its name takes.

    Raises:
      UserError: an unknown kind, or a number that is missing, too much or out of its range.
    """
    return spec.call(spec.Spec(kind, numbers, named), ATTACKS, "attack")


def parse_attack(text: str) -> Attack:
    """Reads an attack such as `fgsm:0.3`, `pgd:0.3:20:5` or `pgd(0.3, restarts=5)`.

    Raises:
      UserError: as for `make_attack`.
    """
    return spec.call(spec.parse_one(text, "attack"), ATTACKS, "attack")


def strength_on_linear_model(attack: Attack, image_shape: tuple[int, ...]) -> float:
    """Returns how much of the greatest possible change of a linear model an attack achieves.

    The model is weak in a known way: two classes, whose margin is `w . (x - 1/2)` at a gray image.
    Its worst image in the ball within [0, 1] is known in closed form, so that an attack that
    does not climb, or does not reach the border of the ball, shows.

    Args:
      attack: the attack; `noise` is none and gets a share near 0.
      image_shape: (height, width, channels).

    Returns:
      A share in [0, 1]; a sound attack has at least `SOUND`.
    """
    generator = np.random.default_rng(0)
    weights = generator.uniform(0.5, 1.5, image_shape) * generator.choice([-1, 1], image_shape)
    greatest = _greatest_change(np.abs(weights).ravel(), attack.epsilon, attack.norm)
    # Scaled so that the softmax is nowhere near saturated, whatever the size of the image.
    scaled = jnp.asarray(weights / greatest, jnp.float32)

    def logits_fn(image: jax.Array) -> jax.Array:
        value = jnp.sum(scaled * (image - 0.5), axis=(1, 2, 3))
        return jnp.stack([-value, value + 1e-3], axis=-1)

    image = jnp.full((1, *image_shape), 0.5, jnp.float32)
    # Whole-valued labels of the class with the higher logit: the attack lowers `value`.
    found = jax.jit(
        lambda key: logits_fn(attack(key, logits_fn, image, jnp.ones(1, jnp.int32)))[0, 0]
    )(jax.random.key(0))
    return float(found)


def check_attack(attack: Attack, image_shape: tuple[int, ...]) -> None:
    """Raises a UserError unless the attack is sound on a linear model; `noise` always passes."""
    if attack.kind == "noise":
        return
    strength = strength_on_linear_model(attack, image_shape)
    if not strength >= SOUND:
        raise UserError(
            f"attack {attack} reaches only {strength:.0%} of what is possible on a linear model: "
            "it says nothing about robustness; give it more steps or a larger step size."
        )


def signs_of_masking(accuracies: dict[str, float], num_classes: int) -> list[str]:
    """Returns what in a model's accuracies suggests that its gradients mislead attacks.

    Athalye, Carlini and Wagner 2018, "Obfuscated Gradients Give a False Sense of Security", section
    3.1: then robust accuracy is overestimated. No sign is a proof, nor is the absence of all.

    Args:
      accuracies: under `attack`, and under `fgsm`, `noise` and `margin` within the same ball, and
        `unbounded`: the attack in a ball that holds every image.
      num_classes: the number of classes.

    Returns:
      One sentence a sign; none where all is well.
    """
    # A fraction of the images by which sound attacks differ too.
    slack = 0.02
    attack = accuracies["attack"]
    signs = []
    if accuracies["fgsm"] < attack - slack:
        signs.append("one step finds more than many: FGSM is stronger than the attack")
    if accuracies["noise"] < attack - slack:
        signs.append("random noise finds more than the gradient does")
    if accuracies["margin"] < attack - slack:
        signs.append("the margin finds more than cross-entropy: the softmax is saturated")
    if accuracies["unbounded"] > 1 / num_classes:
        signs.append("the attack fails even where every image is allowed")
    return signs


def _greatest_change(weights: np.ndarray, epsilon: float, norm: str) -> float:
    """The greatest `sum(weights * change)`, for changes in the ball of at most 1/2 each."""
    if norm == "linf":
        return float(weights.sum() * min(epsilon, 0.5))
    if epsilon >= 0.5 * np.sqrt(weights.size):
        return float(weights.sum() * 0.5)
    # Proportional to the weights but cut at 1/2; the factor follows from the length.
    low, high = 0.0, 0.5 / weights.min()
    for _ in range(100):
        middle = (low + high) / 2
        length = np.linalg.norm(np.minimum(middle * weights, 0.5))
        low, high = (middle, high) if length < epsilon else (low, middle)
    return float(weights @ np.minimum(low * weights, 0.5))


def _reaching(epsilon: float, num_steps: float) -> float:
    return 2.5 * epsilon / num_steps


def _check(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 < number < float("inf"):
            raise UserError(f"{name}={number:g}: give a positive number (white is 1)")
