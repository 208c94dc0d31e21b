"""A small network of 3x3 convolutions on MNIST: conv 32, pool, conv 64, pool, dense 10.

The network of many tutorials (such as Keras's "Simple MNIST convnet", about 99%), trained with the
recipe of `experiments.mnist_lenet`. Other networks of this kind by `--model`: cnn_32_64_dense64,
cnn_32_64_dense128_dropout, cnn_5conv_2dense.

    python -m experiments.mnist_cnn

The README has the scores of five seeds:

    python scripts/seeds_table.py mnist_cnn
"""

import dataclasses

from cnnjax.run import settings
from cnnjax.run.classifier import main
from experiments import mnist_lenet


@dataclasses.dataclass(frozen=True)
class Config(mnist_lenet.Config):
    """A CNN of 3x3 convolutions on MNIST: trains, validates after each epoch, tests at the end."""

    model: str = "cnn_32_64"


if __name__ == "__main__":
    settings.launch(Config, main)
