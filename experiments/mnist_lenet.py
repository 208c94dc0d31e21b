"""LeNet-5 on MNIST.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.

    python -m experiments.mnist_lenet
"""

import dataclasses

from cnnjax import runs
from experiments import classify
from experiments.classify import main


@dataclasses.dataclass(frozen=True)
class Config(classify.Config):
    """LeNet-5 on MNIST: trains, validates after each epoch, tests at the end."""

    model: str = "lenet5"
    epochs: int = 12


if __name__ == "__main__":
    runs.launch(Config, main)
