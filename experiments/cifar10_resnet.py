"""CIFAR-10 with the residual networks of 20 to 110 layers, as they were published.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section
4.2 and Table 6: test errors of 8.75% (20 layers), 7.51% (32), 7.17% (44), 6.97% (56) and
6.61 ± 0.16% (110, five runs). 64,000 steps of 128 images, momentum 0.9, a learning rate of 0.1 that
is divided by 10 after 32,000 and 48,000 steps, weight decay 0.0001 (here of the kernels, in the
gradient: half of it is the factor of the sum of squares), images padded by 4 pixels, cropped and
flipped.

    python scripts/prepare_data.py cifar10 --download
    python -m experiments.cifar10_resnet
    python -m experiments.cifar10_resnet --model cifar_resnet110 --warmup-epochs 1

The paper trains on all 50,000 images, and so does this: nothing is held out (`--validation 0`), and
nothing is chosen by the test images. 164 epochs of 390 steps are 63,960 steps. For 110 layers the
paper starts at a rate of 0.01 until the training error is below 80%; an epoch of rising rate serves
the same end. Time and score are not measured here: CIFAR-10 cannot be had without a network.
`--smoke` runs on synthetic images where CIFAR-10 is not prepared, and says so.
"""

import dataclasses

from cnnjax.run import classifier, settings
from cnnjax.run.classifier import main


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """A residual network on CIFAR-10 by the recipe of its paper: trains, tests at the end."""

    model: str = "cifar_resnet20"
    dataset: str = "tfds:cifar10"
    epochs: int = 164
    batch_size: int = 128
    validation: float = 0.0
    optimizer: str = "momentum"
    learning_rate: float = 0.1
    schedule: str = "step"
    warmup_epochs: float = 0.0
    l2: float = 0.5e-4
    augment: str = "crop:4,flip"


if __name__ == "__main__":
    settings.launch(Config, main)
