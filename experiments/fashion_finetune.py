"""Fashion-MNIST to MNIST with few labels, and back.

    python scripts/prepare_data.py fashion_mnist ...      # once; see its --help
    python -m experiments.fashion_finetune                # Fashion-MNIST to MNIST
    python -m experiments.fashion_finetune --task back    # MNIST to Fashion-MNIST

Fashion-MNIST is read through tfds; MNIST is the shipped copy. docs/few_labels.md says what is
compared, on which network, and what a run leaves.
"""

import dataclasses
from typing import Literal

from cnnjax.studies import few_labels

FASHION = "tfds:fashion_mnist"
# The best learning rate of each method, as --sweep found it.
THERE = {
    "scratch": 0.01,
    "full": 0.01,
    "layer-decay": 0.01,
    "gradual": 0.01,
    "l2-sp": 0.1,
    "head": 0.1,
    "last:2": 0.01,
    "bitfit": 0.1,
    "norm": 0.1,
    "lora:2": 0.01,
    "lora(2, norms=True)": 0.03,
    "adapter:4": 0.01,
}
BACK = {
    "scratch": 0.01,
    "full": 0.01,
    "layer-decay": 0.03,
    "gradual": 0.01,
    "l2-sp": 0.03,
    "head": 0.01,
    "last:2": 0.03,
    "bitfit": 0.03,
    "norm": 0.1,
    "lora:2": 0.01,
    "lora(2, norms=True)": 0.01,
    "adapter:4": 0.01,
}
TASKS = {
    "there": few_labels.Transfer(FASHION, "mnist", rates=THERE),
    "back": few_labels.Transfer("mnist", FASHION, rates=BACK),
}


@dataclasses.dataclass(frozen=True)
class Config(few_labels.Config):
    """Compare ways of fine-tuning with few labels, between clothes and digits."""

    task: Literal["there", "back"] = "there"
    """there: Fashion-MNIST to MNIST; back: MNIST to Fashion-MNIST."""


if __name__ == "__main__":
    few_labels.launch(Config, TASKS, "fashion_finetune")
