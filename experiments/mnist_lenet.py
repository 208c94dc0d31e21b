"""LeNet-5 on MNIST.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition",
Proceedings of the IEEE 86(11), 1998. Section III-C there reports 99.05% without and 99.2% with
distorted training images; the network here is LeNet-5 as it is taught today (ReLU, max pooling,
dense C3), trained with Adam on slightly turned, scaled, sheared and shifted digits, and tested with
the moving average of its parameters. `--model lenet5_1998` is the network of the paper.

    python -m experiments.mnist_lenet

12 epochs take about a minute on 2 CPU cores. The table in the README has the scores of five seeds:

    python scripts/seeds_table.py mnist_lenet
"""

import dataclasses

from cnnjax.run import classifier, settings
from cnnjax.run.classifier import main


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """LeNet-5 on MNIST: trains, validates after each epoch, tests at the end."""

    model: str = "lenet5"
    epochs: int = 12
    learning_rate: float = 3e-3
    ema_decay: float = 0.999
    weight_decay: float = 0.05
    augment: str = "rotate:7,scale:0.07,translate:1.5,shear:7"


if __name__ == "__main__":
    settings.launch(Config, main)
