"""Mean corruption errors by hand, and as the paper reports them."""

import math

import numpy as np
import pytest

from cnnjax.augment.corruptions import COUNTED
from cnnjax.errors import UserError
from cnnjax.evaluation import calibration, corruption_error
from cnnjax.evaluation.corruption_error import Errors


def errors(clean, value, **others):
    return Errors(clean, {name: others.get(name, value) for name in COUNTED})


def test_errors_are_divided_by_the_references():
    own = errors(0.1, 0.3, fog=0.6)
    reference = errors(0.2, 0.4, fog=0.5)
    assert corruption_error.mean_error(own) == pytest.approx((14 * 0.3 + 0.6) / 15)
    ratios = corruption_error.corruption_errors(own, reference)
    assert ratios["fog"] == pytest.approx(1.2)
    mean = corruption_error.mean_of_counted(ratios)
    assert mean == pytest.approx((14 * 0.75 + 1.2) / 15)
    relative = corruption_error.relative_corruption_errors(own, reference)
    assert relative["fog"] == pytest.approx(0.5 / 0.3)
    assert relative["snow"] == pytest.approx(0.2 / 0.2)


def test_what_hurts_the_reference_not_at_all_has_no_ratio():
    own, reference = errors(0.1, 0.3), errors(0.2, 0.4, fog=0.2, snow=0.0)
    relative = corruption_error.relative_corruption_errors(own, reference)
    assert math.isnan(relative["fog"]) and math.isnan(relative["snow"])
    assert corruption_error.mean_of_defined(relative) == pytest.approx(1.0)
    ratios = corruption_error.corruption_errors(own, reference)
    assert math.isnan(ratios["snow"])
    assert math.isnan(corruption_error.mean_of_counted(ratios))
    with pytest.raises(UserError, match="needs snow"):
        corruption_error.mean_of_counted({name: 1.0 for name in COUNTED if name != "snow"})


def test_alexnet_against_itself_is_one_and_the_published_resnet_is_found():
    alexnet = corruption_error.published_reference()
    ratios = corruption_error.corruption_errors(alexnet, alexnet)
    assert set(ratios.values()) == {1.0}
    # Table 1 of the paper: ResNet-50's error 23.9%, corruption errors by corruption, mCE 76.7%.
    published = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)
    own = Errors(
        0.239,
        {
            name: alexnet.corrupted[name] * ce / 100
            for name, ce in zip(COUNTED, published, strict=True)
        },
    )
    mean = corruption_error.mean_of_counted(corruption_error.corruption_errors(own, alexnet))
    assert mean == pytest.approx(0.767, abs=0.003)
    # Table 2 there: its relative mean corruption error is 105.0%.
    relative = corruption_error.relative_corruption_errors(own, alexnet)
    assert corruption_error.mean_of_defined(relative) == pytest.approx(1.05, abs=0.03)


def test_brier_score_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    # (0.3^2 + 0.2^2 + 0.1^2 + 0) / 2, and of a wrong certain answer 2.
    assert calibration.brier_score(probabilities, np.array([0, 2])) == pytest.approx(0.07)
    assert calibration.brier_score(probabilities[1:], np.array([0])) == pytest.approx(2.0)
