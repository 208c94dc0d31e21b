"""A multilayer perceptron on the 1,797 digits of 8x8 pixels that come with scikit-learn.

The smallest experiment here: dense layers of 64 and 32 units, trained in seconds, for trying things
out. A tenth of the digits is the test set, the same for every seed, and a tenth of the rest
validates. For comparison: scikit-learn's own example of these digits, a support vector machine with
a radial kernel, is right on 97% of its half.

    python -m experiments.digits_mlp
    python scripts/seeds_table.py digits_mlp
"""

import dataclasses

from cnnjax.run import classifier, settings
from cnnjax.run.classifier import main


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """An MLP on scikit-learn's digits: trains, validates after each epoch, tests at the end."""

    dataset: str = "digits"
    model: str = "mlp"
    model_arguments: tuple[str, ...] = ("dense_widths=(64,32)",)
    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.99


if __name__ == "__main__":
    settings.launch(Config, main)
