"""What fine-tuning does when nobody says how long, how fast and in which batches."""

import pytest

from cnnjax.errors import UserError
from cnnjax.finetune import METHODS, defaults


@pytest.mark.parametrize(
    ("num_examples", "devices", "batch_size", "epochs"),
    [
        (50, 1, 24, 150),  # 2 updates an epoch
        (50, 4, 24, 150),
        (50, 5, 20, 150),
        (5, 1, 5, 300),
        (999, 1, 24, 10),  # 41 updates an epoch: 10 epochs are more than 300
        (1000, 1, 64, 20),
        (50_000, 8, 64, 10),
    ],
)
def test_batches_fit_few_examples_and_updates_suffice(num_examples, devices, batch_size, epochs):
    assert defaults.batch_size(num_examples, devices) == batch_size
    assert defaults.epochs(num_examples, batch_size) == epochs
    updates = epochs * (num_examples // batch_size)
    assert updates >= 300 and batch_size % devices == 0


def test_more_devices_than_examples_are_refused():
    with pytest.raises(UserError, match="5 training images cannot be shared by 8 devices"):
        defaults.batch_size(5, 8)


def test_every_method_has_a_rate_of_the_sweep():
    assert set(defaults.RATES) == set(METHODS) | {"scratch"}
    assert defaults.learning_rate("head", "adam", 60_000) == 0.03
    assert defaults.learning_rate("lora:4", "adam", 60_000) == 0.003
    assert defaults.learning_rate("last(stages=2)", "adamw", 60_000) == 0.01


def test_whole_layers_of_large_networks_get_a_tenth():
    assert defaults.learning_rate("full", "adam", 25_000_000) == pytest.approx(3e-4)
    assert defaults.learning_rate("head", "adam", 25_000_000) == 0.03


def test_rates_of_the_sweep_are_adams():
    assert defaults.learning_rate("head", "momentum", 60_000) == 1e-3
