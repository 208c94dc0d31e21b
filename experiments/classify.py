"""Train any classifier of `cnnjax.models` on any image classification data.

    python -m experiments.classify --model cnn_32_64 --dataset tfds:fashion_mnist
    python -m experiments.classify --model dense_dropout --classes 3,8
    python -m experiments.classify --model cnn_32x32 --dataset folder:photos --image-size 32

The experiments named after a network are this one with that network's settings.
"""

from cnnjax.run import settings
from cnnjax.run.classifier import Config, main

if __name__ == "__main__":
    settings.launch(Config, main)
