"""Numbers that no run can have are refused by the name of their flag, before anything starts."""

import pytest

from cnnjax.errors import UserError
from cnnjax.run import checks
from experiments import classify, finetune


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs 0: give 1 or more"),
        ({"seed": -1}, "--seed -1: give 0 to 4,294,967,295"),
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"ema_decay": 2.0}, "--ema-decay 2.0: give 0 or more, below 1"),
        ({"ema_decay": float("nan")}, "--ema-decay nan: give 0 or more, below 1"),
        ({"ema_decay": 1.0}, "--ema-decay 1.0: give 0 or more, below 1"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0: give 0 or more, below 1"),
        ({"seed": 2**32}, "--seed 4294967296: give 0 to 4,294,967,295"),
        ({"sam": float("inf")}, "--sam inf: give 0 to 1,000,000"),
        ({"epochs": "2"}, "--epochs '2': give a whole number"),
        ({"batch_size": 16.0}, "--batch-size 16.0: give a whole number"),
        ({"l2": -1.0}, "--l2 -1.0: give 0 to 1,000,000"),
        ({"warmup_epochs": 11.0}, "--warmup-epochs 11 is more than --epochs 10"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        checks.check_specs(classify.Config(**settings))


def test_what_is_left_open_is_no_mistake():
    checks.check_specs(finetune.Config(base="runs/low"))
    with pytest.raises(UserError, match="--epochs -2: give 1 or more"):
        checks.check_specs(finetune.Config(base="runs/low", epochs=-2))
