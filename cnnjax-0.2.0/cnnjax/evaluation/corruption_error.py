"""Errors under corruptions as Hendrycks and Dietterich 2019 (arXiv 1903.12261) sum them up.

With E[c, s] the error under corruption c at severity s, and R that of a reference network:

    corruption error of c            sum_s E[c, s] / sum_s R[c, s]
    relative corruption error of c   sum_s (E[c, s] - E[clean]) / sum_s (R[c, s] - R[clean])

Their means over the fifteen corruptions that count are the mean corruption error and its relative
form (section 4.2 there); without a reference the mean of E itself says how often a network errs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cnnjax.augment.corruptions import COUNTED
from cnnjax.errors import UserError

# AlexNet on ImageNet-C: errors averaged over the severities, from the authors' spreadsheet (linked
# in the README of github.com/hendrycks/robustness); the clean error is that of table 1.
ALEXNET_CLEAN = 0.435
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


class Errors(NamedTuple):
    """What a network errs on.

    Attributes:
      clean: the error on images as they are.
      corrupted: corruption -> error averaged over the severities.
    """

    clean: float
    corrupted: Mapping[str, float]


def published_reference() -> Errors:
    """Returns the errors of AlexNet on ImageNet-C."""
    return Errors(ALEXNET_CLEAN, ALEXNET)


def mean_error(errors: Errors) -> float:
    """Returns the mean over the corruptions that count, without a reference."""
    return mean_of_counted(errors.corrupted)


def corruption_errors(errors: Errors, reference: Errors) -> dict[str, float]:
    """Returns the corruption error of each corruption that both have; NaN where the reference makes
    no error."""
    return {
        name: error / reference.corrupted[name] if reference.corrupted[name] > 0 else math.nan
        for name, error in errors.corrupted.items()
        if name in reference.corrupted
    }


def relative_corruption_errors(errors: Errors, reference: Errors) -> dict[str, float]:
    """Returns the relative corruption error of each corruption that both have; NaN where the
    reference errs no more than on clean images."""
    result = {}
    for name, error in errors.corrupted.items():
        if name in reference.corrupted:
            more = reference.corrupted[name] - reference.clean
            result[name] = (error - errors.clean) / more if more > 0 else math.nan
    return result


def mean_of_counted(values: Mapping[str, float]) -> float:
    """Returns the mean over the corruptions that count; NaN if one of them is.

    Raises:
      UserError: one is missing.
    """
    if missing := [name for name in COUNTED if name not in values]:
        raise UserError(f"the mean corruption error needs {', '.join(missing)} too.")
    return float(np.mean([values[name] for name in COUNTED]))


def mean_of_defined(values: Mapping[str, float]) -> float:
    """Returns the mean over those of the corruptions that count whose value is defined; NaN of
    none."""
    defined = [values[name] for name in COUNTED if math.isfinite(values.get(name, math.nan))]
    return float(np.mean(defined)) if defined else math.nan
