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
from experiments import mnist_finetune

FASHION = "tfds:fashion_mnist"
# No sweep was made back to clothes, nor of other methods than those below; --sweep makes one.
BORROWED = mnist_finetune.TASKS["halves"].rates
THERE = {
    "full": 0.01,
    "scratch": 0.01,
    "head": 0.03,
    "lora:2": 0.01,
    "lora(2, norms=True)": 0.01,
    "adapter:4": 0.03,
}
TASKS = {
    "there": few_labels.Transfer(FASHION, "mnist", rates=BORROWED | THERE),
    "back": few_labels.Transfer("mnist", FASHION, rates=BORROWED),
}


@dataclasses.dataclass(frozen=True)
class Config(few_labels.Config):
    """Compare ways of fine-tuning with few labels, between clothes and digits."""

    task: Literal["there", "back"] = "there"
    """there: Fashion-MNIST to MNIST; back: MNIST to Fashion-MNIST."""


if __name__ == "__main__":
    few_labels.launch(Config, TASKS, "fashion_finetune")
