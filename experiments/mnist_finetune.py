"""MNIST digits to other digits with few labels.

python -m experiments.mnist_finetune                  # MNIST 0-4 to MNIST 5-9
python -m experiments.mnist_finetune --task digits    # MNIST to the 8x8 digits of scikit-learn

docs/few_labels.md says what is compared, on which network, and what a run leaves. `--sweep` tries
learning rates.
"""

import dataclasses
from typing import Literal

from cnnjax.finetune.defaults import RATES
from cnnjax.studies import few_labels

TASKS = {
    "halves": few_labels.Transfer(
        "mnist",
        "mnist",
        "0,1,2,3,4",
        "5,6,7,8,9",
        rates=RATES | {"layer-decay": 0.01, "gradual": 0.003, "l2-sp": 0.01},
    ),
    "digits": few_labels.Transfer(
        "mnist",
        "digits",
        rates={
            "scratch": 0.003,
            "full": 0.01,
            "layer-decay": 0.03,
            "gradual": 0.003,
            "l2-sp": 0.03,
            "head": 0.03,
            "last:2": 0.01,
            "bitfit": 0.1,
            "norm": 0.01,
            "lora:2": 0.01,
            "adapter:4": 0.01,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(few_labels.Config):
    """Compare ways of fine-tuning with few labels, on digits."""

    task: Literal["halves", "digits"] = "halves"
    """halves: MNIST digits 0-4 to 5-9; digits: MNIST to the optical digits of UCI."""


if __name__ == "__main__":
    few_labels.launch(Config, TASKS, "mnist_finetune")
