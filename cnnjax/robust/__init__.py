"""Robustness to adversarial examples: attacks, accuracy under them, adversarial training.

Attacks are pure functions on images in [0, 1]; `parse_attack("pgd:0.3:20:5")` names one.
Adversarial training is a task changed by `adversarial`, or the step of `make_free_step`.
"""

from cnnjax.robust.accuracy import (
    make_attack_step,
    make_robust_eval_step,
    masking,
    robust_accuracies,
)
from cnnjax.robust.attacks import fgsm, margin, pgd
from cnnjax.robust.named import (
    KINDS,
    Attack,
    check_attack,
    make_attack,
    parse_attack,
    signs_of_masking,
    strength_on_linear_model,
)
from cnnjax.robust.training import (
    METHODS,
    adversarial,
    adversarial_factory,
    check_numbers,
    fgsm_rs_task,
    free_factory,
    make_free_step,
    pgd_task,
    trades_task,
)

__all__ = [
    "KINDS",
    "METHODS",
    "Attack",
    "adversarial",
    "adversarial_factory",
    "check_attack",
    "check_numbers",
    "fgsm",
    "fgsm_rs_task",
    "free_factory",
    "make_attack",
    "make_attack_step",
    "make_free_step",
    "make_robust_eval_step",
    "margin",
    "masking",
    "parse_attack",
    "pgd",
    "pgd_task",
    "robust_accuracies",
    "signs_of_masking",
    "strength_on_linear_model",
    "trades_task",
]
